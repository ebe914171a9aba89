"""Figures of what was measured: figures against goals, how times grow, and where a step's time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.performance.goals import bound

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
MET, MISSED = "#4c78a8", "#d62728"
PANELS = {
    "experts": ("experts a layer (top-k constant)", ("mixture", "two experts, both used")),
    "frozen_stages": ("earlier stages, frozen", ("step", "peak memory")),
    "context": ("tokens in a block", ("step",)),
    "model_size": ("active parameters", ("step",)),
}
"""Panels of the growth figure: the name of the horizontal axis, and of what stands above it."""


def draw(measured: Mapping[str, Any], folder: Path, device: str) -> list[Path]:
    """Draw what there is to be drawn; returns the files, whose names begin with the device's."""
    parts = measured["parts"]
    goals = {what: goal for part in parts.values() for what, goal in part.get("goals", {}).items()}
    curves = parts.get("growth_curves", {}).get("detail", {})
    shares = parts.get("profile", {}).get("detail", {})
    figures = {}
    if goals:
        figures["goals"] = goals_figure(goals)
    if any(curves.get(name) for name in PANELS):
        figures["growth"] = growth_figure(curves)
    if shares.get("shares"):
        figures["profile"] = profile_figure(shares["shares"])
    for name, figure in figures.items():
        figure.savefig(folder / f"{device}-{name}.png")
    return [folder / f"{device}-{name}.png" for name in figures]


def goals_figure(goals: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw each figure as a fraction of its goal, so that 1 and more meets it: at twice a speed or half a time, 2."""
    names = list(goals)
    values = [fraction(goal["value"], goal["goal"]) for goal in goals.values()]
    figure, (axes,) = _figure(8.0, 1.4 + 0.34 * len(names))
    places = range(len(names))
    axes.barh(places, values, color=[MET if goal["met"] else MISSED for goal in goals.values()])
    for place, value, goal in zip(places, values, goals.values(), strict=True):
        unit = f" {goal['unit']}" if goal.get("unit") else ""
        axes.text(value, place, f" {goal['value']:.3g}{unit} ({goal['goal']})", va="center", fontsize=8)
    axes.axvline(1.0, color="black", linewidth=1.2)
    axes.set_xscale("log")
    axes.set_xlim(0.8 * min(*values, 1.0), 12.0 * max(*values, 1.0))  # room for the figures
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel("fraction of the goal (1 and more: met)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def fraction(value: float, goal: str) -> float:
    """How much of its goal a figure reaches; one of which little is wanted, how often it fits into its goal.

    A figure of 0, of which little is wanted, counts as a thousandth of its goal, so that it can be drawn.
    """
    at_most, limit = bound(goal)
    if limit == 0:
        return 1.0 if value == 0 else 1e-3
    return limit / max(value, limit / 1000) if at_most else max(value / limit, 1e-3)


def growth_figure(curves: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Draw seconds of a step over what grows, a panel each; one that was not measured says so."""
    figure, panels = _figure(10.0, 7.0, 2, 2)
    for axes, (name, (label, lines)) in zip(panels, PANELS.items(), strict=True):
        points = [list(row) for row in curves.get(name, [])]
        axes.set_xlabel(label)
        axes.set_ylabel("seconds a step")
        if not points:
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
            continue
        across = [row[0] for row in points]
        axes.plot(across, [row[1] for row in points], "o-", label=lines[0])
        memory = name == "frozen_stages"
        if len(points[0]) > 2:
            other = axes.twinx() if memory else axes
            scale = 2**20 if memory else 1
            other.plot(across, [row[2] / scale for row in points], "s--", color="C1", label=lines[1])
            if memory:
                other.set_ylabel("peak memory, MiB")
                other.set_ylim(0, 1.15 * max(row[2] for row in points) / scale)
                other.legend(loc="lower right", fontsize=8, frameon=False)
        if name in ("experts", "context"):
            axes.set_xscale("log", base=2)
            axes.set_xticks(across, [f"{number:g}" for number in across])
        if name == "model_size":
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xticks(across, [f"{number / 1e6:.1f} M" for number in across])
            axes.set_xticks([], minor=True)
        else:
            axes.set_ylim(0, 1.15 * max(max(row[1 : 2 if memory else None]) for row in points))
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left" if name == "frozen_stages" else "best", fontsize=8, frameon=False)
    return figure


def profile_figure(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw the share that each kind of work has of each thing that was profiled."""
    kinds = list(dict.fromkeys(kind for of_one in shares.values() for kind in of_one))
    figure, (axes,) = _figure(8.0, 1.6 + 0.5 * len(kinds))
    height = 0.8 / len(shares)
    for i, (what, of_one) in enumerate(shares.items()):
        places = [place + (i - (len(shares) - 1) / 2) * height for place in range(len(kinds))]
        axes.barh(places, [100 * of_one.get(kind, 0.0) for kind in kinds], height, label=what)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("% of the time")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    return figure


def _figure(width: float, height: float, down: int = 1, across: int = 1) -> tuple[Figure, list[Axes]]:
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(down, across)).flat)
