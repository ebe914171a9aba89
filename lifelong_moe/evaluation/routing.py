"""Statistics of how tokens of one distribution are spread over experts.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DEAD_SHARE = 1e-3
"""An expert that gets less than this fraction of an even share of a layer's assignments is unused."""


@dataclass(frozen=True)
class RoutingStatistics:
    """Summary of assignment counts; means over layers."""

    entropy: float
    """Of the load, in nats; ``ln E`` if even."""
    max_over_mean: float
    """Load of the busiest expert over the mean load; 1 if even."""
    unused_experts: int
    """Experts, over all layers, that almost none of these tokens reach; other text may use them."""
    leak: float
    """Share of assignments that go to experts born after the stage that learned this distribution."""


def routing_statistics(
    counts: Sequence[Sequence[float]], births: Sequence[Sequence[int]], learned_in: int
) -> RoutingStatistics:
    """Summarize assignment counts; layers may differ in their number of experts.

    Args:
        counts: Assignments per layer and expert, padding excluded.
        births: Stage in which each expert of each layer was born.
        learned_in: Stage that learned the distribution; the number of stages if none did.

    Raises:
        ValueError: If a layer has no assignments.
    """
    # Averaged over layers, not pooled: two collapsed layers can look balanced together.
    layers = [_layer_statistics(*one, learned_in) for one in zip(counts, births, strict=True) if one[1]]
    entropy, max_over_mean, unused, leak = zip(*layers, strict=True)
    return RoutingStatistics(
        entropy=float(np.mean(entropy)),
        max_over_mean=float(np.mean(max_over_mean)),
        unused_experts=int(sum(unused)),
        leak=float(np.mean(leak)),
    )


def _layer_statistics(
    counts: Sequence[float], births: Sequence[int], learned_in: int
) -> tuple[float, float, int, float]:
    counts_E: NDArray[np.float64] = np.asarray(counts, dtype=np.float64)
    if not counts_E.sum() > 0:
        raise ValueError("every layer needs at least one assignment")
    share_E = counts_E / counts_E.sum()
    # 0 log 0 counts as 0.
    log_E = np.log(np.where(share_E > 0, share_E, 1.0))
    later_E = np.asarray(births) > learned_in
    unused = int((~_in_use(counts_E)).sum())
    return -float((share_E * log_E).sum()), float(share_E.max() * len(share_E)), unused, float(share_E[later_E].sum())


def dead_experts(counts: Iterable[Sequence[Sequence[float]]]) -> int:
    """Number of experts, over all layers, that no distribution uses.

    Args:
        counts: For each distribution, assignments per layer and expert.
    """
    by_layer = zip(*counts, strict=True)
    used = [np.any([_in_use(np.asarray(one, dtype=np.float64)) for one in layer], axis=0) for layer in by_layer]
    return int(sum((~used_E).sum() for used_E in used))


def _in_use(counts_E: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Mask of the experts that are in use in a layer."""
    in_use: NDArray[np.bool_] = counts_E >= DEAD_SHARE / max(1, len(counts_E)) * counts_E.sum()
    return in_use
