"""Figures of a run: its loss matrix, loss curves and the load of experts. Without pyplot, so safe in any thread.

Stages are rows (after stage i), distributions are columns (loss on j); lower is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Floats = NDArray[np.floating[Any]]

DPI = 110
LOSS_COLOURS = "YlOrRd"
LOAD_COLOURS = "Blues"
ABSENT_COLOUR = "#dddddd"
SMALLEST_SPREAD = 0.1
"""Least range of a column's colour scale, as a fraction of its best value, so that noise does not look dramatic."""
MARKERS = "osD^vP*Xhp"
MAX_INCHES = 18.0
MOST_NUMBERED = 30
"""Columns of a loss matrix up to which its cells hold numbers."""


def loss_matrix_figure(
    matrix: Floats,
    stages: Sequence[str],
    distributions: Sequence[str],
    unit: str = "bits per byte",
    init: Floats | None = None,
    learned_after: Sequence[int] | None = None,
) -> Figure:
    """Draw the loss matrix as a heat map with its values.

    Each column has its own colour scale, from its best to its worst value (at least 10 % apart). The cell of the stage
    that last trained on a distribution is outlined; cells below it also show the change since then, in brackets.

    Args:
        matrix: Loss ``(stages, distributions)``; NaN where nothing was measured.
        stages: Name of each row.
        distributions: Name of each column.
        unit: Unit of the losses.
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
    figure, axes = _figure(2.6 + 1.15 * len(distributions), 1.7 + 0.62 * len(rows))
    # Distributions differ in difficulty, so colours compare stages, not distributions.
    scaled = _per_column(values, first=len(rows) - len(stages))
    image = _heat_map(axes, scaled, LOSS_COLOURS, 0.0, 1.0)
    # Beyond, the cells are too narrow for numbers, and a number costs as much time as all colours together.
    for (row, column), value in np.ndenumerate(values) if len(distributions) <= MOST_NUMBERED else ():
        text = f"{value:.3f}" if np.isfinite(value) else "–"
        if column in trained and row > trained[column]:
            change = value - values[trained[column], column]
            text += f"\n({change:+.3f})" if np.isfinite(change) else ""
        axes.text(
            column, row, text, ha="center", va="center", fontsize=9, color=_ink(image, float(scaled[row, column]))
        )
    for column, row in trained.items():
        _outline(axes, row, column)
    _name_axes(axes, rows, distributions)
    axes.set_ylabel("after stage")
    note = "outlined: last trained in this stage; in brackets: change since"
    axes.set_title(f"held-out loss in {unit} (lower is better)\n{note}", fontsize=10)
    bar = figure.colorbar(image, ax=axes, ticks=[0, 1], shrink=0.8)
    bar.ax.set_yticklabels(["best of\ncolumn", f"worst of\ncolumn (≥ +{100 * SMALLEST_SPREAD:.0f} %)"], fontsize=8)
    return figure


def curves_figure(
    matrix: Floats,
    stages: Sequence[str],
    distributions: Sequence[str],
    unit: str = "bits per byte",
    init: Floats | None = None,
    learned_after: Sequence[int] | None = None,
) -> Figure:
    """Draw one line per distribution over the stages.

    Args:
        matrix: Loss ``(stages, distributions)``; NaN where nothing was measured leaves a gap.
        stages: Name of each stage.
        distributions: Name of each line.
        unit: Unit of the losses.
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
    figure, axes = _figure(4.5 + 0.9 * len(points), 4.4)
    for column, name in enumerate(distributions):
        marker = MARKERS[column % len(MARKERS)]
        style = "-" if column < 10 else "--"  # the colour cycle repeats after ten
        (line,) = axes.plot(values[:, column], style, marker=marker, markersize=4, label=name)
        if column in trained:
            row = trained[column]
            axes.plot(row, values[row, column], marker, markersize=12, color=line.get_color(), mec="black", mew=1.5)
    axes.set_xticks(range(len(points)), points, rotation=_tilt(points), ha=_side(points))
    axes.set_xlabel("after stage")
    axes.set_ylabel(f"held-out loss ({unit})")
    title = "large marker: last trained in this stage"
    if _frame_stages(axes, values, first=len(points) - len(stages)):
        title += "\ninit lies beyond the frame; the loss matrix has its values"
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False)
    return figure


def expert_load_figure(counts: Mapping[str, NDArray[Any]], births: Sequence[str]) -> Figure:
    """Draw which experts each distribution uses.

    Args:
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
    figure, axes = _figure(2.4 + 0.5 * len(births), 1.6 + 0.32 * len(share))
    finite = share[np.isfinite(share)]
    image = _heat_map(axes, share, LOAD_COLOURS, 0.0, float(finite.max()) if finite.size else 1.0)
    if 0.5 * len(births) + 2.4 <= MAX_INCHES and len(share) <= 2 * MAX_INCHES / 0.32:  # else too small for numbers
        for (row, column), value in np.ndenumerate(share):
            text = f"{100 * value:.0f}" if np.isfinite(value) else "–"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=_ink(image, float(value)))
    _name_births(axes, births)
    for border in range(layers, len(share), layers):
        axes.axhline(border - 0.5, color="black", linewidth=1.5)
    axes.set_yticks(np.arange(len(counts)) * layers + (layers - 1) / 2, list(counts))
    axes.set_ylabel("distribution, layers downwards" if layers > 1 else "distribution")
    axes.set_xlabel("expert")
    axes.set_title("share of each layer's assignments, %\n(top: stage that the experts were born in)", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8, format=lambda share, _: f"{100 * share:.3g} %")
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    # Bounded, because a long chain of stages would otherwise make an image too large to open.
    size = (min(width, MAX_INCHES), min(height, 2 * MAX_INCHES))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    return figure, figure.subplots()


def _heat_map(axes: Axes, values: Floats, colours: str, low: float, high: float) -> AxesImage:
    from matplotlib import colormaps

    palette = colormaps[colours].with_extremes(bad=ABSENT_COLOUR)
    return axes.imshow(np.ma.masked_invalid(values), cmap=palette, vmin=low, vmax=high, aspect="auto")


def _ink(image: AxesImage, value: float) -> str:
    """Choose black or white text, whichever is legible on the cell."""
    red, green, blue, _ = image.to_rgba(np.ma.masked_invalid([[value]]))[0, 0]
    # Luma of Rec. 601: the perceived brightness of a colour.
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def _outline(axes: Axes, row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    # Unclipped, or the edge of the axes would cut the outline in half.
    axes.add_patch(
        Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2, clip_on=False)
    )


def _name_axes(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    axes.set_xticks(range(len(columns)), columns, rotation=_tilt(columns), ha=_side(columns), rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)


def _name_births(axes: Axes, births: Sequence[str]) -> None:
    axes.set_xticks(range(0, len(births), -(-len(births) // 40)))  # more than 40 labels overlap
    # Experts stand in the order of birth, so a generation is a contiguous range.
    borders = [i for i in range(1, len(births)) if births[i] != births[i - 1]]
    for border in borders:
        axes.axvline(border - 0.5, color="black", linewidth=1.5)
    # Each generation is named once, above the middle of its experts.
    starts, ends = [0, *borders], [*borders, len(births)]
    names = [births[start] for start in starts]
    top = axes.secondary_xaxis("top")
    top.set_xticks([(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)], names, fontsize=8)
    top.tick_params(length=0)


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


def _tilt(names: Sequence[str]) -> int:
    return 30 if max(map(len, names)) > 12 else 0


def _side(names: Sequence[str]) -> str:
    return "right" if _tilt(names) else "center"
