"""How often a gate would pass a candidate that does no harm: too rarely, and it is no use to train one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import nct, t

from lifelong_moe.config.retraining.policy import GateConfig
from lifelong_moe.retraining.bounds import DocumentLosses, can_tell, effective
from lifelong_moe.retraining.pooling import Group, groups, joined


@dataclass(frozen=True)
class Power:
    """How often a gate would pass a candidate that does no harm."""

    passes: float
    """Chance that all checks of old text pass it."""
    checks: int
    weakest: str
    """Distributions of the check that passes it least often."""
    weakest_passes: float


def passing_chances(
    after: Mapping[str, DocumentLosses],
    before: Mapping[str, DocumentLosses],
    kinds: Mapping[str, str],
    config: GateConfig,
) -> dict[Group, float]:
    """Chance that each check of old text passes a candidate whose losses are, in truth, those of the champion.

    Of a comparison of two versions only the scatter over sources is used, not its mean. A check is nearly a one-sided
    t-test that the loss is below ``tolerance``; its power is the non-central t distribution's. The product is the
    chance of all, as if they were independent, which is the least if they help each other. The ratchet is left out.

    Args:
        after: Losses of some version near the champion, such as a probe, on each old distribution. A stage that trains
            longer scatters more, and passes less often.
        before: Those of the champion, on the same documents.
        kinds: The kind of each distribution, for pooling.
        config: Level and tolerance.

    Returns:
        By group of distributions that are tested together; 0 where there are too few sources, or a loss is not finite.
    """
    sizes = {name: losses.sizes for name, losses in after.items()}
    return {
        group: _power(joined(after, group), joined(before, group), config)
        for group in groups(sizes, kinds, level=config.level)
    }


def _power(after: DocumentLosses, before: DocumentLosses, config: GateConfig) -> float:
    sizes_S = after.sizes
    source = np.unique(np.array(after.sources), return_inverse=True)[1]
    lost_S = np.bincount(source, np.asarray(after.nats) - np.asarray(before.nats))
    if not can_tell(sizes_S) or not np.isfinite(lost_S).all():
        return 0.0
    number, total = effective(sizes_S), sizes_S.sum()
    residual_S = lost_S - lost_S.sum() / total * sizes_S
    error = math.sqrt(number / (number - 1) * float((residual_S**2).sum())) / float(total)
    if error <= config.tolerance / 50:  # certain; the distribution's tail is not computed so far out
        return 1.0
    return float(nct.cdf(t.ppf(config.level, number - 1), number - 1, -config.tolerance / error))
