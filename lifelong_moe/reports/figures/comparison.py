"""Figures of a comparison, from the data of ``comparison.json``. Without pyplot, so safe in any thread.

Values are means over committed seeds; bars and bands span the lowest to the highest seed. An arm has the same colour
and marker in every figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from lifelong_moe.reports.figures.drawing import (
    DPI,
    LEGEND_CHARS,
    LINE,
    LOSS_COLOURS,
    PANEL_CHARS,
    PLOT_INCHES,
    TICK_CHARS,
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

Comparison = Mapping[str, Any]
Arm = Mapping[str, Any]

LARGEST_DOT = 420.0
"""Area of the largest dot, that of the arm with most FLOPs, in square points; smaller for many arms."""
# In bits per byte: in percent of perplexity, the worst arms would push all others into one corner.
FORGETTING, GAP = "forgetting_max_bits_per_byte", "plasticity_gap_bits_per_byte"
FINAL = "final_mean_bits_per_byte"
CLEAR = 0.01
"""Bits per byte: what is less is noise, as for a verdict."""
MANY_ARMS = 10
"""Beyond, names would cover each other, and the dots have numbers."""
KEY_CHARS = 80
"""Of a name beside its number: there is room, and this is the only place where it stands."""
PANELS_A_ROW = 3
PANEL_INCHES = 3.6
LABEL_ANGLES = (0, 180, 35, -35, 145, -145, 90, -90, 62, -62, 118, -118)
LABEL_POINTS = 8
LABEL_DISTANCES = (3, 10, 20, 34, 52, 74, 104, 140)
"""Distances from the edge of the dot at which a label is tried, in points."""
LEAK_INCHES = 0.36
"""Least width of a cell that holds a percentage."""
SMALLEST_LEAK = 0.1
"""The colour scale reaches at least this leak, so that noise does not look dramatic."""


def comparison_figures(comparison: Comparison) -> dict[str, Figure]:
    """All figures that have data, by file name."""
    drawn = {"pareto": pareto_figure(comparison), "curves": curves_figure(comparison), "leak": leak_figure(comparison)}
    return {f"{name}.png": figure for name, figure in drawn.items() if figure is not None}


def pareto_figure(comparison: Comparison) -> Figure | None:
    """Draw forgetting against plasticity; None unless an arm has both.

    Returns:
        The figure, in bits per byte: a dot an arm, its area in proportion to active FLOPs, and a line through the arms
        that no other one beats in both.
    """
    arms = [arm for arm in comparison["arms"] if None not in (_mean(arm, FORGETTING), _mean(arm, GAP))]
    if not arms:
        return None
    style, names = _styles(comparison), [arm["name"] for arm in arms]
    numbered = len(arms) > MANY_ARMS or max(map(len, names)) > TICK_CHARS
    labels = {name: str(number) if numbered else shown(name) for number, name in enumerate(names, 1)}
    beside = legend_inches(names, "99  ", KEY_CHARS) if numbered else 0.0
    figure, (axes,) = canvas(7.6 + beside, max(5.4, LINE * len(arms)))
    flops = {arm["name"]: _mean(arm, "active_flops") or 0.0 for arm in arms}
    most = max(flops.values()) or 1.0
    points = np.array([[np.mean(_values(arm, key)) for key in (FORGETTING, GAP)] for arm in arms])
    # The total area stays that of MANY_ARMS dots, or they would cover each other.
    largest = min(LARGEST_DOT, MANY_ARMS * LARGEST_DOT / len(arms))
    areas = [largest * flops[name] / most for name in names]
    for arm, (x, y), area in zip(arms, points, areas, strict=True):
        colour, marker = style[arm["name"]]["color"], style[arm["name"]]["marker"]
        bars = [_bar(arm, key) for key in (FORGETTING, GAP)]
        axes.errorbar(x, y, xerr=bars[0], yerr=bars[1], color=colour, linewidth=1, capsize=2, zorder=2)
        axes.scatter([x], [y], s=area, color=[colour], marker=marker, edgecolor="black", linewidth=0.6, zorder=3)
    front = points[_front(points)]
    axes.plot(front[:, 0], front[:, 1], color="black", linewidth=1, linestyle="--", alpha=0.5, zorder=1)
    axes.set_xlabel("forgetting: the worst old distribution, bits per byte above its own loss")
    axes.set_ylabel("plasticity gap: the worst new distribution,\nbits per byte above unrestrained")
    axes.grid(alpha=0.3)
    # Room for the labels, which are placed within the frame.
    axes.margins(0.12)
    lines = []
    if numbered:
        look = {name: {**style[name], "linestyle": "", "fillstyle": "full"} for name in names}
        lines = [_sample(f"{labels[name]}  {shown(name, KEY_CHARS)}", **look[name]) for name in names]
    note = f"lower is better; dot area: active FLOPs (largest {most:.2g}); dashed: arms that no other beats in both"
    # Of those that do not differ clearly in forgetting, the one that learned best.
    least = int(np.where(points[:, 0] < points[:, 0].min() + CLEAR, points[:, 1], np.inf).argmin())
    message = (
        f"{shown(names[least])} forgets as little as any, {signed(points[least, 0])} bits per byte, "
        f"at a plasticity gap of {signed(points[least, 1])}"
    )
    entitle(figure, comparison["compare"], message, note, lines=lines)
    # The half diagonal of a square, the farthest that a marker reaches.
    _label(figure, axes, points, np.sqrt(areas) / np.sqrt(2), list(labels.values()))
    return figure


def curves_figure(comparison: Comparison) -> Figure | None:
    """Draw each distribution's loss over the stages, a line an arm; None before the first run is committed.

    Returns:
        The figure: a panel a distribution; an arm with a single stage is a horizontal line.
    """
    names, arms = comparison["distributions"], [arm for arm in comparison["arms"] if _committed(arm)]
    if not arms:
        return None
    columns = 2 if len(names) == 4 else min(len(names), PANELS_A_ROW)
    rows = -(-len(names) // columns)
    # A joint arm has one stage; the longest chain names the axis.
    style, stages = _styles(comparison), max((arm["stages"] for arm in arms), key=len)
    below = ticks_across(stages, 0.85 * PANEL_INCHES / len(stages), "stages", overhang=PANEL_INCHES / 2)
    # The legend has a line per arm.
    height = max((2.6 + below.inches) * rows, LINE * len(arms)) + 0.5
    width = PANEL_INCHES * columns + 1.0 + legend_inches(arm["name"] for arm in arms)
    figure, panels = canvas(width, height, rows, columns)
    # More bands would cover each other.
    is_banded = len(arms) <= MANY_ARMS
    for axes, name in zip(panels, names, strict=False):
        kept = [_curve(axes, arm, name, len(stages), style[arm["name"]], is_banded) for arm in arms]
        _frame(axes, np.concatenate(kept))
        axes.set_title(shown(name, PANEL_CHARS), fontsize=10)
        below.put(axes.xaxis)
        axes.margins(x=0.08)
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.remove()
    for axes in panels[: len(names) : columns]:
        axes.set_ylabel("held-out bits per byte")
    for axes in panels[max(0, len(names) - columns) : len(names)]:
        axes.set_xlabel("after stage")
    lines = [_entry(arm, style[arm["name"]], len(stages)) for arm in arms]
    band = "band: lowest to highest seed; " if is_banded else ""
    note = f"held-out loss (lower is better); {band}before it is learned, a loss may lie beyond the frame"
    entitle(figure, comparison["compare"], _lowest(arms), note, [below.key], lines)
    return figure


def leak_figure(comparison: Comparison) -> Figure | None:
    """Draw the router leak by arm and distribution; None unless an arm that is committed can have any.

    Returns:
        The figure: a heat map, an arm a row; grey where no expert was born after the distribution was learned.
    """
    names, arms = comparison["distributions"], [arm for arm in comparison["arms"] if _committed(arm)]
    if not arms:
        return None
    leaks = np.full((len(arms), len(names)), np.nan)
    for (i, arm), (j, name) in product(enumerate(arms), enumerate(names)):
        known = [run["leak"][name] for run in _committed(arm) if name in run["leak"]]
        leaks[i, j] = np.mean(known) if known else np.nan
    if np.isnan(leaks).all():
        return None
    beside = ticks_beside([arm["name"] for arm in arms], 0.3, "arms")
    below = ticks_across(names, width := min(1.0, PLOT_INCHES / len(names)), "distributions")
    figure, (axes,) = canvas(beside.inches + width * len(names) + 1.6, 0.6 + below.inches + 0.3 * len(arms))
    image = heat_map(axes, leaks, LOSS_COLOURS, 0.0, max(SMALLEST_LEAK, float(np.nanmax(leaks, initial=0.0))))
    if width >= LEAK_INCHES:
        write_in(axes, image, [[f"{100 * one:.1f}" if np.isfinite(one) else "–" for one in row] for row in leaks])
    beside.put(axes.yaxis)
    below.put(axes.xaxis)
    axes.set_xlabel("held-out text")
    axes.set_ylabel("arm")
    colour_bar(figure, image, axes, format=lambda share, _: f"{100 * share:.0f} %")
    worst, text = divmod(int(np.nanargmax(leaks)), len(names))
    message = (
        f"most leaks from {shown(names[text])} with {shown(arms[worst]['name'])}, {100 * leaks[worst, text]:.1f} %"
    )
    note = "router leak: % of tokens sent to experts born after their stage"
    entitle(figure, comparison["compare"], message, note, (below.key, beside.key))
    return figure


def _curve(axes: Axes, arm: Arm, name: str, stages: int, style: Mapping[str, Any], is_banded: bool) -> Floats:
    """Draw one arm in one panel; return its losses since it learned the distribution, over all seeds."""
    found = [run["curves"][name] for run in _committed(arm) if name in run["curves"]]
    if not found:
        return np.empty(0)
    curves = np.array(found)
    mean, steps = curves.mean(axis=0), np.arange(curves.shape[1])
    if len(steps) == 1 < stages:
        axes.axhline(float(mean[0]), color=style["color"], linewidth=1.5, linestyle=":")
        return curves.ravel()
    axes.plot(steps, mean, **style, markersize=4, linewidth=1.3)
    if is_banded and len(curves) > 1:
        axes.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=style["color"], alpha=0.15, linewidth=0)
    return curves[:, arm["learned_after"].get(name, 0) :].ravel()


def _frame(axes: Axes, values: Floats) -> None:
    """Fit the frame to these values."""
    # Losses before a distribution was learned lie far above, and are cut off.
    if values.size:
        margin = 0.08 * float(np.ptp(values)) or 0.1
        axes.set_ylim(float(values.min()) - margin, float(values.max()) + margin)


def _entry(arm: Arm, style: Mapping[str, Any], stages: int) -> Line2D:
    """An arm in the legend; one with a single stage is a level, not a curve."""
    level = {"marker": "", "linestyle": ":"} if len(arm["stages"]) == 1 < stages else {}
    return _sample(shown(arm["name"], LEGEND_CHARS), **{**style, **level})


def _sample(label: str, **style: Any) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **style)


def _lowest(arms: Sequence[Arm]) -> str:
    """The arm with the lowest mean loss at the end."""
    final = {arm["name"]: found for arm in arms if (found := _mean(arm, FINAL)) is not None}
    if not final:
        return "no final loss yet"
    best = min(final, key=lambda name: final[name])
    return f"{shown(best)} ends lowest, {final[best]:.2f} bits per byte in the mean"


def _label(figure: Figure, axes: Axes, points: Floats, radii: Floats, names: Sequence[str]) -> None:
    """Place each name as near as possible to its dot without overlap; far names get a thin line to their dot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # positions in pixels are known only after the layout
    renderer, scale = canvas.get_renderer(), DPI / 72
    pixels = axes.transData.transform(points)
    taken = [Bbox.from_bounds(x - r, y - r, 2 * r, 2 * r) for (x, y), r in zip(pixels, scale * radii, strict=True)]
    frame = axes.get_window_extent(renderer)
    # Crowded dots choose first, as they have the fewest free places. Crowding: distance to the three nearest dots.
    crowd = np.sort(np.linalg.norm(pixels[:, None] - pixels[None], axis=-1), axis=1)[:, :4].sum(axis=1)
    for i in np.argsort(crowd, kind="stable"):
        for distance, angle in product(LABEL_DISTANCES, np.radians(LABEL_ANGLES)):
            note = _note(axes, names[i], points[i], float(radii[i]), distance, float(angle))
            box = _text_box(note, renderer).padded(scale)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not box.count_overlaps(taken):
                break
            note.remove()  # the last note returns below if no place is free
        else:
            axes.add_artist(note)
        taken.append(box)


def _note(axes: Axes, text: str, point: Floats, radius: float, distance: float, angle: float) -> Any:
    """A label at a distance from its dot; a far one has a line to it."""
    across, up = np.cos(angle), np.sin(angle)
    line = {"arrowstyle": "-", "linewidth": 0.6, "color": "gray", "shrinkA": 0, "shrinkB": radius}
    return axes.annotate(
        text,
        (float(point[0]), float(point[1])),
        ((radius + distance) * across, (radius + distance) * up),
        textcoords="offset points",
        fontsize=LABEL_POINTS,
        ha="left" if across > 0.3 else "right" if across < -0.3 else "center",
        va="center" if abs(up) < 0.5 else "bottom" if up > 0 else "top",
        arrowprops=line if distance > LABEL_DISTANCES[1] else None,
        zorder=4,
    )


def _text_box(note: Any, renderer: Any) -> Any:
    """Where the text stands, without the line to its dot."""
    from matplotlib.text import Text

    note.update_positions(renderer)
    return Text.get_window_extent(note, renderer)


def _front(points: Floats) -> list[int]:
    """Indices of the Pareto front, both coordinates to be minimized, from left to right."""
    # From left to right, a point is on the front if it is lower than all before it.
    front: list[int] = []
    for i in np.lexsort((points[:, 1], points[:, 0])):
        if not front or points[i, 1] < points[front[-1], 1]:
            front.append(int(i))
    return front


def _styles(comparison: Comparison) -> Mapping[str, Mapping[str, Any]]:
    """Colour and marker by arm."""
    return {arm["name"]: line_style(index) for index, arm in enumerate(comparison["arms"])}


def _committed(arm: Arm) -> list[Mapping[str, Any]]:
    return [run for run in arm["runs"] if run["status"] == "committed"]


def _mean(arm: Arm, key: str) -> float | None:
    found = arm["summary"].get(key)
    return None if found is None else float(found["mean"])


def _bar(arm: Arm, key: str) -> Floats | None:
    """Distances from the mean to the lowest and the highest seed; None with one seed."""
    values = _values(arm, key)
    mean = np.mean(values)
    return np.array([[mean - min(values)], [max(values) - mean]]) if len(values) > 1 else None


def _values(arm: Arm, key: str) -> list[float]:
    """A number of each seed that has it."""
    return [float(run["numbers"][key]) for run in _committed(arm) if run["numbers"][key] is not None]
