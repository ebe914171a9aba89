"""Power of the gate: how often it would pass a harmless candidate. If rarely, training one is a waste."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from lifelong_moe.config.retraining.policy import GateConfig
from lifelong_moe.retraining.bounds import DocumentLosses, effective_sources, has_enough_sources
from lifelong_moe.retraining.pooling import Pool, pooled_losses, pools
from lifelong_moe.retraining.slices import slices_of


def passing_chances(
    after: Mapping[str, DocumentLosses],
    before: Mapping[str, DocumentLosses],
    kinds: Mapping[str, str],
    config: GateConfig,
) -> dict[Pool, float]:
    """Chance that each step check passes a candidate whose true losses equal the champion's.

    Only the variance over sources is estimated from ``after``, not the mean. A check is nearly a one-sided t-test that
    the loss increase is below ``tolerance``; its power is that of the non-central t distribution. The product over
    pools is the chance of passing all, as if they were independent; the ratchet checks are left out.

    Args:
        after: Losses of some version near the champion, such as a probe, on each old distribution. A stage that trains
            longer varies more, and passes less often.
        before: Losses of the champion, on the same documents.
        kinds: Kind of each distribution, for pooling.
        config: Level and tolerance.

    Returns:
        Chances by pool, and by slice, as ``("slice NAME",)``; 0 where there are too few sources, or a loss is not
        finite.
    """
    sizes, level = {name: losses.sizes for name, losses in after.items()}, config.level
    found = {
        pool: _power(pooled_losses(after, pool), pooled_losses(before, pool), config.tolerance, level)
        for pool in pools(sizes, kinds, level=level)
    }
    for name, tolerance, part in slices_of(after, before, config):
        found[f"slice {name}",] = 0.0 if part is None else _power(part.after, part.before, tolerance, level)
    return found


def _power(after: DocumentLosses, before: DocumentLosses, tolerance: float, level: float) -> float:
    from scipy.stats import nct, t  # on use, as in ``bounds.py``

    sizes_S = after.sizes
    source = np.unique(np.array(after.sources), return_inverse=True)[1]
    lost_S = np.bincount(source, np.asarray(after.nats) - np.asarray(before.nats))
    if not has_enough_sources(sizes_S) or not np.isfinite(lost_S).all():
        return 0.0
    number, total = effective_sources(sizes_S), sizes_S.sum()
    # Linearized variance of a ratio of sums: a source's nats minus what its tokens would have at the mean.
    residual_S = lost_S - lost_S.sum() / total * sizes_S
    error = math.sqrt(number / (number - 1) * float((residual_S**2).sum())) / float(total)
    # Certain, and scipy's non-central t is not computed so far out in its tail.
    if error <= tolerance / 50:
        return 1.0
    return float(nct.cdf(t.ppf(level, number - 1), number - 1, -tolerance / error))
