"""Figures of expert specialization, from ``inspection.json``. Without pyplot, so safe in any thread.

Layers may differ in their number of experts, so each layer has its own panel where experts are an axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lifelong_moe.reports.figures.drawing import (
    COSINE_COLOURS,
    LINE,
    LOAD_COLOURS,
    LOSS_COLOURS,
    MARKERS,
    PANEL_CHARS,
    PLOT_INCHES,
    SMALL_POINTS,
    canvas,
    colour_bar,
    entitle,
    few,
    heat_map,
    shown,
    ticks_across,
    ticks_beside,
    write_in,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

PANEL_INCHES = 3.1
MAX_COLUMNS = 4
NUMBERED_EXPERTS = 8
"""Up to so many experts a cell is wide enough for its number."""
SHARE_INCHES = 0.3
"""Least width of a cell that holds a percentage."""
MOST_NAMED = 8
"""Generations that a title names."""

Matrix = Sequence[Sequence[float | None]]


FIGURES = ("information", "coactivation", "similarity", "leak", "saturation")
"""Names of all figures that an inspection may have."""


def inspection_figures(inspection: Mapping[str, Any], stage: str) -> dict[str, Figure]:
    """All figures of an inspection that have data, by file name without suffix.

    Args:
        inspection: As :func:`lifelong_moe.reports.inspection.build_inspection` made it.
        stage: Name of the stage that was inspected.
    """
    layers = inspection["layers"]
    kinds = {"token id": "token", "distribution": "distribution"}
    # With one distribution there is no information about it, and the measure is null.
    known = {title: [layer[key] for layer in layers] for title, key in kinds.items() if layers[0][key]}
    births = [[name.split("/")[0] for name in layer["experts"]] for layer in layers]
    leak = {name: [layer["leak"][name] for layer in layers] for name in inspection["tokens"]}
    together = [layer["coactivation"] for layer in layers]
    run = inspection["run"]
    drawn = {"information": information_figure(run, known)}
    # With one expert per token all shares are 0.
    if any(share for matrix in together for row in matrix for share in row):
        drawn["coactivation"] = coactivation_figure(run, together, births)
    drawn["similarity"] = similarity_figure(run, [layer["similarity"] for layer in layers], births)
    if can_leak(inspection):
        drawn["leak"] = leak_figure(run, leak)
    if inspection["saturation"]:
        drawn["saturation"] = saturation_figure(run, inspection["saturation"], stage)
    return drawn


def can_leak(inspection: Mapping[str, Any]) -> bool:
    """Whether the model has more than one generation of experts."""
    # With one generation every leak is 0.
    return len({name.split("/")[0] for layer in inspection["layers"] for name in layer["experts"]}) > 1


def information_figure(run: str, information: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Draw mutual information per layer above its shuffled null.

    Args:
        run: Name of the run.
        information: For each thing that experts may know of, ``nats``, ``null_mean`` and ``null_95`` per layer.
    """
    figure, panels = _grid(len(information), 4.2, 3.2, beside=2.0)
    lines: list[Line2D] = []
    for axes, (name, values) in zip(panels, information.items(), strict=True):
        layers = range(len(values))
        lines = [
            *axes.plot(layers, [value["nats"] for value in values], "o-", color="black", label="measured"),
            *axes.plot(layers, [value["null_mean"] for value in values], "--", color="grey", label="shuffled, mean"),
            *axes.plot(layers, [value["null_95"] for value in values], ":", color="grey", label="shuffled, 95th perc."),
        ]
        axes.set_title(f"expert and {name}", fontsize=10)
        axes.set_xticks(few(len(values)))
        axes.set_xlabel("layer")
        axes.set_ylabel("mutual information (nats)")
        axes.set_ylim(bottom=0.0)
        axes.grid(alpha=0.3)
    found = [(value["nats"], layer, name) for name, one in information.items() for layer, value in enumerate(one)]
    nats, layer, name = max(found)
    message = f"experts tell most of the {name} in layer {layer}, {nats:.2f} nats"
    entitle(figure, run, message, "mutual information of chosen experts, beside that of shuffled ones", lines=lines)
    return figure


def coactivation_figure(run: str, matrices: Sequence[Matrix], births: Sequence[Sequence[str]]) -> Figure:
    """Draw which experts are chosen together, a heat map a layer with one colour scale.

    Args:
        run: Name of the run.
        matrices: For each layer the share of expert i's tokens that expert j gets too ``(E, E)``; None is grey.
        births: Birth stage of each expert of each layer; lines divide the generations.
    """
    arrays = [np.array(matrix, dtype=np.float64) for matrix in matrices]
    # One scale for all layers, without the empty diagonal.
    top = max((float(np.nanmax(array)) for array in arrays if np.isfinite(array).any()), default=1.0)
    figure = _pairs(arrays, births, LOAD_COLOURS, (0.0, top or 1.0))
    note = f"share of the row expert's tokens that the column expert gets too; {_order(births)}"
    entitle(figure, run, _strongest(arrays, "most often together: experts", 100, ".0f", " %"), note)
    return figure


def similarity_figure(run: str, matrices: Sequence[Matrix], births: Sequence[Sequence[str]]) -> Figure:
    """Draw how alike experts answer, a heat map a layer from −1 (opposite) over 0 to 1 (same direction).

    Args:
        run: Name of the run.
        matrices: For each layer mean cosines ``(E, E)``.
        births: Birth stage of each expert of each layer; lines divide the generations.
    """
    arrays = [np.array(matrix, dtype=np.float64) for matrix in matrices]
    figure = _pairs(arrays, births, COSINE_COLOURS, (-1.0, 1.0))
    note = f"mean cosine of two experts' outputs on the same inputs; {_order(births)}"
    entitle(figure, run, _strongest(arrays, "most alike: experts"), note)
    return figure


def saturation_figure(run: str, saturation: Mapping[str, Mapping[str, Sequence[float]]], last: str) -> Figure:
    """Draw how far each earlier stage's routing already was the last one's: a panel a distribution, a line a layer.

    Args:
        run: Name of the run.
        saturation: For each earlier stage, oldest first, and distribution the agreement per layer, 0 … 1.
        last: Name of the stage compared with; it agrees with itself.
    """
    from matplotlib import colormaps

    distributions = list(next(iter(saturation.values())))
    below = ticks_across(
        [*saturation, last], 0.8 * PANEL_INCHES / (len(saturation) + 1), "stages", overhang=PANEL_INCHES / 2
    )
    figure, panels = _grid(len(distributions), PANEL_INCHES, 2.6 + below.inches, beside=1.0)
    # shape: (stages, distributions, layers)
    agreed_SJL = np.array([[of[name] for name in distributions] for of in saturation.values()])
    layers = agreed_SJL.shape[2]
    lines: list[Line2D] = []
    for column, (axes, name) in enumerate(zip(panels, distributions, strict=True)):
        lines = []
        for layer in range(layers):
            # Layers have an order, and so have these colours, in grey too.
            look = {"color": colormaps["viridis"](0.9 * layer / max(1, layers - 1)), "marker": MARKERS[layer % 10]}
            # The last stage agrees with itself.
            lines += axes.plot([*agreed_SJL[:, column, layer], 1.0], **look, markersize=4, label=f"layer {layer}")
        below.put(axes.xaxis)
        axes.set_ylim(0.0, 1.05)
        axes.set_title(shown(name, PANEL_CHARS), fontsize=10)
        axes.grid(alpha=0.3)
    for axes in panels[::MAX_COLUMNS]:
        axes.set_ylabel("share of choices")
    for axes in panels[-MAX_COLUMNS:]:
        axes.set_xlabel("after stage")
    first, mean = next(iter(saturation)), agreed_SJL[0].mean()
    message = f"after {shown(first)}, {100 * mean:.0f} % of choices were already those of {shown(last)}"
    note = f"router saturation: chosen experts after each stage that {shown(last)} chooses too"
    entitle(figure, run, message, note, [below.key], lines)
    return figure


def leak_figure(run: str, leak: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the share of each distribution's assignments that go to experts born after it was learned.

    Args:
        run: Name of the run.
        leak: For each distribution the share per layer, 0 … 1.
    """
    shares_JL = np.array(list(leak.values()), dtype=np.float64)
    distributions, layers = shares_JL.shape
    beside = ticks_beside(list(leak), height := min(0.4, 2 * PLOT_INCHES / distributions), "distributions")
    width = min(0.6, PLOT_INCHES / layers)
    figure, (axes,) = canvas(1.6 + beside.inches + width * layers, 0.8 + height * distributions)
    image = heat_map(axes, shares_JL, LOSS_COLOURS, 0.0, 1.0)
    if width >= SHARE_INCHES and height > LINE:
        write_in(axes, image, [[f"{100 * share:.0f}" for share in row] for row in shares_JL])
    axes.set_xticks(few(layers))
    beside.put(axes.yaxis)
    axes.set_xlabel("layer")
    axes.set_ylabel("held-out text")
    colour_bar(figure, image, axes, format=lambda share, _: f"{100 * share:.0f} %")
    worst, layer = divmod(int(shares_JL.argmax()), layers)
    message = f"most leaks from {shown(list(leak)[worst])}, {100 * shares_JL.max():.0f} % in layer {layer}"
    entitle(figure, run, message, "router leak: % of assignments to experts born later", [beside.key])
    return figure


def _pairs(
    arrays: Sequence[np.ndarray], births: Sequence[Sequence[str]], colours: str, limits: tuple[float, float]
) -> Figure:
    figure, panels = _grid(len(arrays), PANEL_INCHES, PANEL_INCHES, beside=1.0)
    for layer, (axes, array_EE) in enumerate(zip(panels, arrays, strict=True)):
        image = heat_map(axes, array_EE, colours, *limits)
        axes.set_aspect("equal")
        axes.set_xticks(few(len(array_EE)))
        axes.set_yticks(few(len(array_EE)))
        axes.tick_params(labelsize=SMALL_POINTS)
        axes.set_title(f"layer {layer}", fontsize=10)
        axes.set_xlabel("expert", fontsize=8)
        for border in range(1, len(array_EE)):
            if births[layer][border] != births[layer][border - 1]:
                axes.axvline(border - 0.5, color="black", linewidth=1.2)
                axes.axhline(border - 0.5, color="black", linewidth=1.2)
        if len(array_EE) <= NUMBERED_EXPERTS:
            texts = [[f"{value:.2f}" if np.isfinite(value) else "–" for value in row] for row in array_EE]
            write_in(axes, image, texts, points=7)
    for axes in panels[::MAX_COLUMNS]:
        axes.set_ylabel("expert", fontsize=8)
    colour_bar(figure, image, panels)
    return figure


def _order(births: Sequence[Sequence[str]]) -> str:
    """The generations in which experts stand, of many the first and the last."""
    names = [shown(name) for name in dict.fromkeys(name for layer in births for name in layer)]
    names = [*names[:MOST_NAMED], "…", names[-1]] if len(names) > MOST_NAMED + 1 else names
    return f"experts in order of birth: {' | '.join(names)}"


def _strongest(arrays: Sequence[np.ndarray], words: str, scale: float = 1, form: str = ".2f", unit: str = "") -> str:
    """The pair of different experts with the largest value."""
    apart = [np.where(np.eye(len(array), dtype=bool), np.nan, array) for array in arrays]
    tops = [np.nanmax(array) if np.isfinite(array).any() else -np.inf for array in apart]
    layer = int(np.argmax(tops))
    if not np.isfinite(tops[layer]):
        return "no pair of experts to compare"
    row, column = divmod(int(np.nanargmax(apart[layer])), len(apart[layer]))
    return f"{words} {row} and {column} of layer {layer}, {scale * tops[layer]:{form}}{unit}"


def _grid(num: int, width: float, height: float, beside: float) -> tuple[Figure, list[Axes]]:
    """A figure of ``num`` panels, at most four side by side, each of about that size, and room at their right."""
    columns = min(num, MAX_COLUMNS)
    rows = -(-num // columns)
    figure, panels = canvas(columns * width + 0.4 + beside, rows * height + 0.5, rows, columns)
    # The last row may be shorter than the grid.
    for unused in panels[num:]:
        unused.remove()
    return figure, panels[:num]
