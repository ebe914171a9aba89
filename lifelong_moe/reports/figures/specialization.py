"""Figures of expert specialization, from ``inspection.json``. Without pyplot, so safe in any thread.

Layers may differ in their number of experts, so each layer has its own panel where experts are an axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lifelong_moe.reports.figures.run import DPI, LOAD_COLOURS, LOSS_COLOURS, MAX_INCHES, _heat_map, _ink

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COSINE_COLOURS = "RdBu_r"
PANEL_INCHES = 3.1
MAX_COLUMNS = 4
NUMBERED_EXPERTS = 8
"""Up to so many experts a cell is wide enough for its number."""

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
    drawn = {"information": information_figure(known)}
    # With one expert per token all shares are 0.
    if any(share for matrix in together for row in matrix for share in row):
        drawn["coactivation"] = coactivation_figure(together, births)
    drawn["similarity"] = similarity_figure([layer["similarity"] for layer in layers], births)
    if can_leak(inspection):
        drawn["leak"] = leak_figure(leak)
    if inspection["saturation"]:
        drawn["saturation"] = saturation_figure(inspection["saturation"], stage)
    return drawn


def can_leak(inspection: Mapping[str, Any]) -> bool:
    """Whether the model has more than one generation of experts."""
    # With one generation every leak is 0.
    return len({name.split("/")[0] for layer in inspection["layers"] for name in layer["experts"]}) > 1


def information_figure(information: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Draw mutual information per layer above its shuffled null.

    Args:
        information: For each thing that experts may know of, ``nats``, ``null_mean`` and ``null_95`` per layer.
    """
    figure, panels = _grid(len(information), 4.2, 3.4)
    for axes, (name, values) in zip(panels, information.items(), strict=True):
        layers = range(len(values))
        axes.plot(layers, [value["nats"] for value in values], "o-", label="measured")
        axes.plot(layers, [value["null_mean"] for value in values], "--", color="grey", label="shuffled, mean")
        axes.plot(layers, [value["null_95"] for value in values], ":", color="grey", label="shuffled, 95th percentile")
        axes.set_title(f"expert and {name}", fontsize=10)
        axes.set_xticks(_few(len(values)))
        axes.set_xlabel("layer")
        axes.set_ylabel("mutual information (nats)")
        axes.set_ylim(bottom=0.0)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    return figure


def coactivation_figure(matrices: Sequence[Matrix], births: Sequence[Sequence[str]]) -> Figure:
    """Draw which experts are chosen together, a heat map a layer with one colour scale.

    Args:
        matrices: For each layer the share of expert i's tokens that expert j gets too ``(E, E)``; None is grey.
        births: Birth stage of each expert of each layer; lines divide the generations.
    """
    arrays = [np.array(matrix, dtype=np.float64) for matrix in matrices]
    # One scale for all layers, without the empty diagonal.
    top = max((float(np.nanmax(array)) for array in arrays if np.isfinite(array).any()), default=1.0)
    title = "share of the row expert's tokens that the column expert gets too"
    return _pairs(arrays, births, title, LOAD_COLOURS, (0.0, top or 1.0))


def similarity_figure(matrices: Sequence[Matrix], births: Sequence[Sequence[str]]) -> Figure:
    """Draw how alike experts answer, a heat map a layer from −1 (opposite) over 0 to 1 (same direction).

    Args:
        matrices: For each layer mean cosines ``(E, E)``.
        births: Birth stage of each expert of each layer; lines divide the generations.
    """
    arrays = [np.array(matrix, dtype=np.float64) for matrix in matrices]
    return _pairs(arrays, births, "mean cosine of two experts' outputs on the same inputs", COSINE_COLOURS, (-1.0, 1.0))


def saturation_figure(saturation: Mapping[str, Mapping[str, Sequence[float]]], last: str) -> Figure:
    """Draw how far each earlier stage's routing already was the last one's: a panel a distribution, a line a layer.

    Args:
        saturation: For each earlier stage, oldest first, and distribution the agreement per layer, 0 … 1.
        last: Name of the stage compared with; it agrees with itself.
    """
    from matplotlib import colormaps

    distributions = list(next(iter(saturation.values())))
    figure, panels = _grid(len(distributions), PANEL_INCHES, 3.2)
    for axes, name in zip(panels, distributions, strict=True):
        agreed_SL = np.array([[*values[name]] for values in saturation.values()])
        layers = agreed_SL.shape[1]
        for layer in range(layers):
            colour = colormaps["viridis"](0.9 * layer / max(1, layers - 1))
            # The last stage agrees with itself.
            axes.plot([*agreed_SL[:, layer], 1.0], "o-", markersize=4, color=colour, label=f"L{layer}")
        axes.set_xticks(range(len(saturation) + 1), [*saturation, last], rotation=30, ha="right", fontsize=8)
        axes.set_ylim(0.0, 1.05)
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"share that {last} chooses too", fontsize=9)
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "ncols": -(-layers // 12)}
    panels[-1].legend(**place, fontsize=8, frameon=False)
    figure.suptitle("router saturation: chosen experts after each stage that the last model chooses too", fontsize=10)
    return figure


def leak_figure(leak: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the share of each distribution's assignments that go to experts born after it was learned.

    Args:
        leak: For each distribution the share per layer, 0 … 1.
    """
    shares_JL = np.array(list(leak.values()), dtype=np.float64)
    distributions, layers = shares_JL.shape
    figure, (axes,) = _grid(1, 3.2 + 0.6 * layers, 1.6 + 0.45 * distributions)
    image = _heat_map(axes, shares_JL, LOSS_COLOURS, 0.0, 1.0)
    for (row, column), value in np.ndenumerate(shares_JL):
        text = f"{100 * value:.0f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color=_ink(image, float(value)))
    axes.set_xticks(_few(layers))
    axes.set_yticks(range(distributions), list(leak))
    axes.set_xlabel("layer")
    axes.set_title("router leak: % of assignments to experts born later", fontsize=10)
    return figure


def _pairs(
    arrays: Sequence[np.ndarray],
    births: Sequence[Sequence[str]],
    title: str,
    colours: str,
    limits: tuple[float, float],
) -> Figure:
    figure, panels = _grid(len(arrays), PANEL_INCHES, PANEL_INCHES)
    for layer, (axes, array_EE) in enumerate(zip(panels, arrays, strict=True)):
        image = _heat_map(axes, array_EE, colours, *limits)
        axes.set_aspect("equal")
        axes.set_xticks(_few(len(array_EE)))
        axes.set_yticks(_few(len(array_EE)))
        axes.set_title(f"L{layer}", fontsize=10)
        axes.set_xlabel("expert", fontsize=8)
        for border in range(1, len(array_EE)):
            if births[layer][border] != births[layer][border - 1]:
                axes.axvline(border - 0.5, color="black", linewidth=1.2)
                axes.axhline(border - 0.5, color="black", linewidth=1.2)
        if len(array_EE) <= NUMBERED_EXPERTS:
            for (row, column), value in np.ndenumerate(array_EE):
                text = f"{value:.2f}" if np.isfinite(value) else "–"
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color=_ink(image, float(value)))
    panels[0].set_ylabel("expert", fontsize=8)
    names = " | ".join(dict.fromkeys(name for layer in births for name in layer))
    figure.suptitle(f"{title}\nexperts in order of birth: {names}", fontsize=10)
    figure.colorbar(image, ax=list(panels), shrink=0.7)
    return figure


def _grid(num: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of ``num`` panels, at most four side by side, each of about that size in inches."""
    from matplotlib.figure import Figure

    columns = min(num, MAX_COLUMNS)
    rows = -(-num // columns)
    size = (min(columns * width + 1.4, MAX_INCHES), min(rows * height + 0.5, 2 * MAX_INCHES))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    # The last row may be shorter than the grid.
    for unused in panels[num:]:
        unused.remove()
    return figure, panels[:num]


def _few(num: int) -> range:
    """At most 16 of the indices below ``num``, evenly apart."""
    # More labels would overlap.
    return range(0, num, -(-num // 16))
