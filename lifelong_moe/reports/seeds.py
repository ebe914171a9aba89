"""Statistics over seeds: t-intervals and paired t-tests. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
"""Of the two-sided interval."""
FEW = 2
"""Seeds up to which the range says more: a t-interval of two values is 13 times as wide."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % t-interval, which one seed has not, and the range."""

    mean: float
    low: float | None
    high: float | None
    n: int
    lowest: float
    highest: float


@dataclass(frozen=True)
class PairedDifference(Interval):
    """A mean difference over common seeds, and the p-value of the paired t-test."""

    p: float | None


def over_seeds(values: Sequence[float | None]) -> Interval | None:
    """Mean and 95 % t-interval of the known values; None if there are none."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    n = len(known)
    if not n:
        return None
    mean = float(known.mean())
    if n == 1:
        return Interval(mean, None, None, 1, mean, mean)
    from scipy.special import stdtrit  # here, since most commands compare no seeds

    # Few seeds: Student's t with n - 1 degrees of freedom, not the normal distribution.
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2) * known.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n, float(known.min()), float(known.max()))


def paired(values: Mapping[int, float | None], reference: Mapping[int, float | None]) -> PairedDifference | None:
    """Differences with the same seed, and the paired t-test of a mean difference of 0.

    Args:
        values: By seed.
        reference: By seed.

    Returns:
        None for fewer than two common seeds. Without any spread p is undefined and None.
    """
    pairs = [(value, reference.get(seed)) for seed, value in values.items()]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    if len(differences) < 2:
        return None
    from scipy.special import stdtr

    found, spread = over_seeds(differences), float(np.std(differences, ddof=1))
    assert found is not None
    # As scipy.stats.ttest_rel, which warns and returns NaN without spread.
    t = abs(found.mean) / (spread / math.sqrt(found.n)) if spread else None
    p = None if t is None else float(2 * stdtr(found.n - 1, -t))
    return PairedDifference(**vars(found), p=p)
