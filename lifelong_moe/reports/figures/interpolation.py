"""Figure of a stage's way from the weights that it began with to those that it learned. Without pyplot."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lifelong_moe.reports.figures.drawing import (
    LEGEND_CHARS,
    LINE,
    Floats,
    canvas,
    entitle,
    legend_inches,
    line_style,
    shown,
)
from lifelong_moe.reports.figures.run import LARGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

LEARNED = " (learned here)"


def interpolation_figure(
    run: str, shares: Sequence[float], losses: Mapping[str, Sequence[float]], learned: Collection[str], stage: str
) -> Figure:
    """Draw each distribution's loss over the share of the way, as its change from the better end.

    Args:
        run: Name of the run.
        shares: Of the learned weights in each mixture, ascending from 0 to 1.
        losses: Bits per byte at each of them, by distribution.
        learned: Distributions that the stage learned, drawn dashed.
        stage: Its name.

    Returns:
        The figure; a large marker shows each line's lowest loss.
    """
    beside = legend_inches(losses, LEARNED)
    figure, (axes,) = canvas(6.4 + beside, max(4.0, LINE * len(losses)))
    lines: list[Line2D] = []
    for index, (name, values) in enumerate(losses.items()):
        loss, style = np.asarray(values, dtype=np.float64), line_style(index)
        # Distributions differ in difficulty by more than any mixture changes one of them.
        rise = loss - min(loss[0], loss[-1])
        label = shown(name, LEGEND_CHARS) + (LEARNED if name in learned else "")
        lines += axes.plot(shares, rise, "--" if name in learned else "-", **style, markersize=5, label=label)
        if np.isfinite(rise).any():
            best = int(np.nanargmin(rise))
            axes.plot(shares[best], rise[best], **{**style, **LARGE})
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_xticks(list(shares))
    axes.set_xlabel(f"share of the weights that {shown(stage)} learned (0: as it began)")
    axes.set_ylabel("held-out bits per byte,\nagainst the better end")
    axes.grid(alpha=0.3)
    note = "mixtures of a stage's first and last weights; dashed: learned here; large marker: lowest loss"
    entitle(figure, run, _best(shares, np.array(list(losses.values()), dtype=np.float64), stage), note, lines=lines)
    return figure


def _best(shares: Sequence[float], losses: Floats, stage: str) -> str:
    """The share with the lowest mean loss; ``losses`` has a row for each distribution."""
    mean = losses[np.isfinite(losses).all(axis=1)].mean(axis=0) if np.isfinite(losses).all(axis=1).any() else None
    if mean is None:
        return "the mean loss is not known"
    best = int(mean.argmin())
    return (
        f"with {100 * shares[best]:.0f} % of what {shown(stage)} learned the mean loss is lowest, "
        f"{mean[best]:.2f} bits per byte"
    )
