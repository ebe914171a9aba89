"""How tokens of one distribution are spread over experts.

Legend: L layers, E experts. Statistics are per layer and then averaged: two collapsed layers look balanced when
pooled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DEAD_SHARE = 1e-3
"""An expert with less than this share of a layer's assignments, relative to an even share, is dead."""


@dataclass(frozen=True)
class RoutingStatistics:
    """Summary of assignment counts; means over layers."""

    entropy: float
    """Of the load, in nats; ``ln E`` if even."""
    max_over_mean: float
    """Load of the busiest expert over the mean load; 1 if even."""
    dead_experts: int
    """Experts that next to no token reaches, over all layers."""
    leak: float
    """Share of assignments that go to experts born after the stage that learned this distribution."""


def routing_statistics(counts_LE: NDArray[np.int64], births_E: list[int], learned_in: int) -> RoutingStatistics:
    """Summarize assignment counts.

    Args:
        counts_LE: Assignments per layer and expert, padding excluded.
        births_E: Stage in which each expert was born.
        learned_in: Stage that learned the distribution; the number of stages if none did.

    Raises:
        ValueError: If a layer has no assignments.
    """
    counts = np.asarray(counts_LE, dtype=np.float64)
    if not (counts.sum(axis=1) > 0).all():
        raise ValueError("every layer needs at least one assignment")
    share = counts / counts.sum(axis=1, keepdims=True)
    logs = np.log(np.where(share > 0, share, 1.0))
    later = np.asarray(births_E) > learned_in
    return RoutingStatistics(
        entropy=float(-(share * logs).sum(axis=1).mean()),
        max_over_mean=float((share.max(axis=1) * share.shape[1]).mean()),
        dead_experts=int((share < DEAD_SHARE / share.shape[1]).sum()),
        leak=float(share[:, later].sum(axis=1).mean()),
    )
