"""Figures of a run: its loss matrix, loss curves and the load of experts. Without pyplot, so safe in any thread.

Stages are rows (after stage i), distributions are columns (loss on j); lower is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.reports.figures.drawing import (
    LEGEND_CHARS,
    LINE,
    LOAD_COLOURS,
    LOSS_COLOURS,
    PLOT_INCHES,
    Floats,
    canvas,
    colour_bar,
    entitle,
    heat_map,
    legend_inches,
    line_style,
    shown,
    signed,
    ticks_across,
    ticks_beside,
    write_in,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

SMALLEST_SPREAD = 0.1
"""Least range of a column's colour scale, as a fraction of its best value, so that noise does not look dramatic."""
NUMBER_INCHES = 0.58
"""Least width of a cell of a loss matrix that holds numbers."""
SHARE_INCHES = 0.3
"""Least width of a cell that holds a percentage."""
LARGE: Mapping[str, Any] = {"markersize": 12, "fillstyle": "full", "mec": "black", "mew": 1.5, "linestyle": ""}
"""The marker of a point that is spoken of."""


def loss_matrix_figure(
    run: str,
    matrix: Floats,
    stages: Sequence[str],
    distributions: Sequence[str],
    init: Floats | None = None,
    learned_after: Sequence[int] | None = None,
) -> Figure:
    """Draw the loss matrix as a heat map with its values.

    Each column has its own colour scale, from its best to its worst value (at least 10 % apart). The cell of the stage
    that last trained on a distribution is outlined; cells below it also show the change since then, in brackets.

    Args:
        run: Name of the run.
        matrix: Bits per byte ``(stages, distributions)``; NaN where nothing was measured.
        stages: Name of each row.
        distributions: Name of each column.
        init: Loss per distribution before the first stage, drawn as a first row.
        learned_after: For each of the first columns, the last stage that trained it; by default the last stage of the
            distribution's name, or the diagonal if no stage is named like a distribution.

    Returns:
        The figure.

    Raises:
        ValueError: If the names do not fit the matrix.
    """
    values, rows = _with_init(matrix, stages, distributions, init)
    trained = _trained_rows(stages, distributions, learned_after, offset=0 if init is None else 1)
    width, height = min(1.15, PLOT_INCHES / len(distributions)), min(0.5, 2 * PLOT_INCHES / len(rows))
    below = ticks_across(distributions, width, "distributions")
    beside = ticks_beside(rows, height, "stages")
    size = (width * len(distributions) + beside.inches + 2.2, height * len(rows) + below.inches + 0.6)
    figure, (axes,) = canvas(*size)
    # Distributions differ in difficulty, so colours compare stages, not distributions.
    scaled = _per_column(values, first=len(rows) - len(stages))
    image = heat_map(axes, scaled, LOSS_COLOURS, 0.0, 1.0)
    # Else the cells are too narrow, and a number costs as much time as all colours together.
    if width >= NUMBER_INCHES and height > 2 * LINE:
        write_in(axes, image, [[_cell(values, trained, i, j) for j in range(len(values[0]))] for i in range(len(rows))])
    for column, row in trained.items():
        _outline(axes, row, column)
    below.put(axes.xaxis)
    beside.put(axes.yaxis)
    axes.set_xlabel("held-out text")
    axes.set_ylabel("after stage")
    bar = colour_bar(figure, image, axes, ticks=[0, 1])
    bar.ax.set_yticklabels(["best of\ncolumn", f"worst of\ncolumn (≥ +{100 * SMALLEST_SPREAD:.0f} %)"], fontsize=8)
    note = (
        "held-out loss in bits per byte (lower is better); outlined: last trained in this stage; brackets: change since"
    )
    entitle(figure, run, _worst(values, distributions, trained), note, (below.key, beside.key))
    return figure


def curves_figure(
    run: str,
    matrix: Floats,
    stages: Sequence[str],
    distributions: Sequence[str],
    init: Floats | None = None,
    learned_after: Sequence[int] | None = None,
) -> Figure:
    """Draw one line per distribution over the stages.

    Args:
        run: Name of the run.
        matrix: Bits per byte ``(stages, distributions)``; NaN where nothing was measured leaves a gap.
        stages: Name of each stage.
        distributions: Name of each line.
        init: Loss per distribution before the first stage, drawn as a first point.
        learned_after: For each of the first columns, the last stage that trained it; by default the last stage of the
            distribution's name, or the diagonal if no stage is named like a distribution.

    Returns:
        The figure; a large marker shows the stage that last trained on the line's distribution.

    Raises:
        ValueError: If the names do not fit the matrix.
    """
    values, points = _with_init(matrix, stages, distributions, init)
    trained = _trained_rows(stages, distributions, learned_after, offset=0 if init is None else 1)
    room = max(min(1.2, PLOT_INCHES / len(points)), 4.0 / len(points))
    below = ticks_across(points, room, "stages")
    size = (
        room * len(points) + 1.0 + legend_inches(distributions),
        max(max(3.6, 0.35 * room * len(points)) + below.inches, LINE * len(distributions)),
    )
    figure, (axes,) = canvas(*size)
    lines: list[Line2D] = []
    for column, name in enumerate(distributions):
        style = line_style(column)
        lines += axes.plot(values[:, column], **style, markersize=5, label=shown(name, LEGEND_CHARS))
        if column in trained:
            row = trained[column]
            axes.plot(row, values[row, column], **{**style, **LARGE})
    below.put(axes.xaxis)
    axes.set_xlabel("after stage")
    axes.set_ylabel("held-out loss (bits per byte)")
    note = "held-out loss (lower is better); large marker: last trained in this stage"
    if _frame_stages(axes, values, first=len(points) - len(stages)):
        note += "; init lies beyond the frame, and the loss matrix has its values"
    axes.grid(alpha=0.3)
    entitle(figure, run, _worst(values, distributions, trained), note, [below.key], lines)
    return figure


def expert_load_figure(run: str, counts: Mapping[str, NDArray[Any]], births: Sequence[str]) -> Figure:
    """Draw which experts each distribution uses.

    Args:
        run: Name of the run.
        counts: Assignments per expert ``(layers, experts)``, by distribution; all of one shape.
        births: Birth stage of each expert; experts of one stage stand side by side.

    Returns:
        The figure: a row for each distribution and layer, which sums to 100 %.

    Raises:
        ValueError: If there is no distribution, or a shape does not fit ``births``.
    """
    if not counts:
        raise ValueError("expert_load_figure needs counts of at least one distribution")
    for name, table in counts.items():
        if table.ndim != 2 or table.shape[1] != len(births):
            raise ValueError(f"counts[{name!r}] must be (layers, {len(births)}), got {table.shape}")
    layers = max(len(table) for table in counts.values())
    # shape: (distributions * layers, experts), the layers of a distribution below each other
    share = np.concatenate([_shares(table) for table in counts.values()])
    width, height = min(0.5, PLOT_INCHES / len(births)), min(0.3, 2 * PLOT_INCHES / len(share))
    beside = ticks_beside(list(counts), height * layers, "distributions", _middles(len(counts), layers))
    figure, (axes,) = canvas(width * len(births) + beside.inches + 2.0, height * len(share) + 1.6)
    finite = share[np.isfinite(share)]
    image = heat_map(axes, share, LOAD_COLOURS, 0.0, float(finite.max()) if finite.size else 1.0)
    if width >= SHARE_INCHES and height > LINE:  # else too small for numbers
        write_in(axes, image, [[f"{100 * one:.0f}" if np.isfinite(one) else "–" for one in row] for row in share])
    key = _name_births(axes, births, width)
    for border in range(layers, len(share), layers):
        axes.axhline(border - 0.5, color="black", linewidth=1.5)
    beside.put(axes.yaxis)
    axes.set_ylabel("distribution, layer" if layers > 1 else "distribution")
    axes.set_xlabel("expert")
    colour_bar(figure, image, axes, format=lambda share, _: f"{100 * share:.3g} %")
    note = "share of each layer's assignments, %; top: stage that the experts were born in"
    entitle(figure, run, _busiest(share, list(counts), layers), note, (beside.key, key))
    return figure


def _cell(values: Floats, trained: Mapping[int, int], row: int, column: int) -> str:
    """A loss, and below it the change since its distribution was last trained."""
    value = values[row, column]
    text = f"{value:.3f}" if np.isfinite(value) else "–"
    if column in trained and row > trained[column]:
        change = value - values[trained[column], column]
        text += f"\n({change:+.3f})" if np.isfinite(change) else ""
    return text


def _worst(values: Floats, distributions: Sequence[str], trained: Mapping[int, int]) -> str:
    """What became of the worst old distribution, or without one the mean loss."""
    changes = {name: float(values[-1, column] - values[trained[column], column])
               for column, name in enumerate(distributions)
               if trained.get(column, len(values)) < len(values) - 1}  # fmt: skip
    changes = {name: change for name, change in changes.items() if np.isfinite(change)}
    if changes:
        name = max(changes, key=lambda name: changes[name])
        return f"worst old text {shown(name)} {signed(changes[name])} bits per byte"
    known = values[-1][np.isfinite(values[-1])]
    return (
        f"mean held-out loss {known.mean():.2f} bits per byte"
        if known.size
        else "nothing measured after the last stage"
    )


def _busiest(share: Floats, distributions: Sequence[str], layers: int) -> str:
    """The largest share that an expert has."""
    if not np.isfinite(share).any():
        return "no assignments"
    row, expert = divmod(int(np.nanargmax(share)), share.shape[1])
    name, layer = shown(distributions[row // layers]), row % layers
    return f"the busiest expert, {expert} of layer {layer}, takes {100 * share[row, expert]:.0f} % of {name}"


def _outline(axes: Axes, row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    # Unclipped, or the edge of the axes would cut the outline in half.
    axes.add_patch(
        Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2, clip_on=False)
    )


def _middles(num: int, size: int) -> list[float]:
    """The middle of each of ``num`` groups of ``size`` rows."""
    return [group * size + (size - 1) / 2 for group in range(num)]


def _name_births(axes: Axes, births: Sequence[str], width: float) -> str:
    """Number the experts, and name their generations above; returns the key of what has no room for names."""
    axes.set_xticks(range(0, len(births), -(-len(births) // 40)))  # more than 40 labels overlap
    # Experts stand in the order of birth, so a generation is a contiguous range.
    borders = [i for i in range(1, len(births)) if births[i] != births[i - 1]]
    for border in borders:
        axes.axvline(border - 0.5, color="black", linewidth=1.5)
    # Each generation is named once, above the middle of its experts.
    starts, ends = [0, *borders], [*borders, len(births)]
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    room = width * float(np.diff(middles).min() if borders else len(births))
    above = ticks_across([births[start] for start in starts], room, "stages", middles)
    top = axes.secondary_xaxis("top")
    above.put(top.xaxis, side="left")
    top.tick_params(length=0)
    return above.key


def _per_column(values: Floats, first: int) -> Floats:
    """Scale each column to 0 (its best) … 1 (its worst); a column without spread is 0."""
    # Rows before ``first`` are clipped and do not set the scale: beside an untrained model all stages look alike.
    result = np.full(values.shape, np.nan)
    for column in range(values.shape[1]):
        stages = values[first:, column]
        known = stages[np.isfinite(stages)]
        if known.size:
            spread = max(known.max() - known.min(), SMALLEST_SPREAD * known.min()) or 1.0
            result[:, column] = np.clip((values[:, column] - known.min()) / spread, 0.0, 1.0)
    return result


def _frame_stages(axes: Axes, values: Floats, first: int) -> bool:
    """Fit the frame to the rows from ``first`` on; return whether a finite value lies outside."""
    axes.margins(x=0.08)
    stages = values[first:][np.isfinite(values[first:])]
    if not stages.size:
        return False
    margin = 0.1 * (stages.max() - stages.min()) or 0.1
    low, high = float(stages.min() - margin), float(stages.max() + margin)
    axes.set_ylim(low, high)
    return bool((values[:first] > high).any() or (values[:first] < low).any())


def _shares(table: NDArray[Any]) -> Floats:
    """Divide each row by its sum; a row without assignments is NaN."""
    # NaN, not 0: a row without assignments is drawn as absent.
    totals = table.sum(axis=1, keepdims=True).astype(np.float64)
    return np.divide(table, totals, out=np.full(table.shape, np.nan), where=totals > 0)


def _with_init(
    matrix: Floats, stages: Sequence[str], distributions: Sequence[str], init: Floats | None
) -> tuple[Floats, list[str]]:
    values = np.asarray(matrix, dtype=np.float64)
    if values.shape != (len(stages), len(distributions)) or not values.size:
        raise ValueError(
            f"the loss matrix must be ({len(stages)} stages, {len(distributions)} distributions), none of them 0, "
            f"got {values.shape}"
        )
    if init is None:
        return values, list(stages)
    first = np.asarray(init, dtype=np.float64)
    if first.shape != (len(distributions),):
        raise ValueError(f"init must be ({len(distributions)},), got {first.shape}")
    return np.vstack([first, values]), ["init", *stages]


def _trained_rows(
    stages: Sequence[str], distributions: Sequence[str], learned_after: Sequence[int] | None, offset: int
) -> dict[int, int]:
    """Map each trained column to the row of its stage in the drawing."""
    if learned_after is not None:
        return {column: stage + offset for column, stage in enumerate(learned_after)}
    # Names may repeat: the last stage of a name is the one that trained last.
    last = {name: row for row, name in enumerate(stages)}
    named = {column: last[name] + offset for column, name in enumerate(distributions) if name in last}
    return named or {i: i + offset for i in range(min(len(stages), len(distributions)))}
