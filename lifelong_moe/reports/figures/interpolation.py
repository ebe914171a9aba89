"""Figure of a stage's way from the weights that it began with to those that it learned. Without pyplot."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lifelong_moe.reports.figures.run import MARKERS, _figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def interpolation_figure(
    shares: Sequence[float], losses: Mapping[str, Sequence[float]], learned: Collection[str], stage: str
) -> Figure:
    """Draw each distribution's loss over the share of the way, as its change from the better end.

    Args:
        shares: Of the learned weights in each mixture, ascending from 0 to 1.
        losses: Bits per byte at each of them, by distribution.
        learned: Distributions that the stage learned, drawn dashed.
        stage: Its name.

    Returns:
        The figure; a large marker shows each line's lowest loss.
    """
    figure, axes = _figure(7.6, 4.6)
    for index, (name, values) in enumerate(losses.items()):
        loss = np.asarray(values, dtype=np.float64)
        # Distributions differ in difficulty by more than any mixture changes one of them.
        rise, marker = loss - min(loss[0], loss[-1]), MARKERS[index % len(MARKERS)]
        label = f"{name} (learned here)" if name in learned else name
        (line,) = axes.plot(shares, rise, "--" if name in learned else "-", marker=marker, markersize=4, label=label)
        best = int(rise.argmin())
        axes.plot(shares[best], rise[best], marker, markersize=12, color=line.get_color(), mec="black", mew=1.5)
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_xticks(list(shares))
    axes.set_xlabel(f"share of the weights that {stage} learned (0: as it began)")
    axes.set_ylabel("held-out bits per byte,\nagainst the better end")
    axes.set_title("mixtures of a stage's first and last weights; large marker: lowest loss", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False)
    return figure
