"""Confidence bounds of the gate: by how much the losses of two versions differ on the same held-out documents.

Legend: n documents, S sources, R bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# With two or three sources the truth is missed half again as often as the level states (simulated by
# tests/benchmarks/simulate_gate.py).
LEAST_SOURCES = 5
"""Fewest sources that give finite bounds."""
# Below, one source holds most of the text: two thirds of it, if there are five.
LEAST_EFFECTIVE = 2.0
"""Fewest effective sources (:func:`effective_sources`) that give finite bounds."""


@dataclass(frozen=True, eq=False)
class DocumentLosses:
    """Losses of one version on the documents of one gate set."""

    nats: NDArray[np.float64]
    """Cross-entropy of each document, summed over its scored tokens, ``(n,)``; NaN if it could not be computed."""
    tokens: NDArray[np.int64]
    """Scored tokens of each document, ``(n,)``, positive."""
    sources: Sequence[str]
    """Source of each document."""

    def __post_init__(self) -> None:
        if not len(self.nats) == len(self.tokens) == len(self.sources) > 0:
            raise ValueError(f"{len(self.nats)} losses, {len(self.tokens)} lengths, {len(self.sources)} sources")
        if np.min(self.tokens) < 1:
            raise ValueError("a document has no scored token")

    @property
    def nats_per_token(self) -> float:
        """Mean over tokens."""
        return float(np.sum(self.nats) / np.sum(self.tokens))

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Scored tokens of each source, ``(S,)``, in the order of their names."""
        return np.bincount(np.unique(np.array(self.sources), return_inverse=True)[1], self.tokens).astype(np.int64)


@dataclass(frozen=True)
class Bounds:
    """A mean difference in nats per token with its one-sided confidence bounds."""

    mean: float
    lower: float
    upper: float

    def __neg__(self) -> Bounds:
        # A loss that rose is a gain that fell: the bounds change places.
        return Bounds(-self.mean, -self.upper, -self.lower)


UNKNOWN = Bounds(math.nan, -math.inf, math.inf)
"""Of what was not measured."""


def difference_bounds(
    after: DocumentLosses, before: DocumentLosses, *, level: float, resamples: int, seed: int
) -> Bounds:
    """Bootstrap bounds of one version's mean loss minus another's, each token counting alike; positive is worse.

    Paired bootstrap over sources. With few sources, or unequal ones, percentiles lie too near the mean; they are moved
    away from it by ``sqrt(E / (E - 1)) t / z``: the root of the variance's bias, and Student's quantile with ``E - 1``
    degrees of freedom over the normal one, with E the effective number of sources (:func:`effective_sources`).

    Args:
        after: Losses of the one version.
        before: Losses of the other, on the same documents.
        level: Chance that the truth lies below ``lower``, and that it lies above ``upper``, each.
        resamples: R.
        seed: Of the draws; same seed, same bounds.

    Returns:
        Infinite bounds where the sources are too few (:func:`has_enough_sources`); NaN where a loss is not finite.

    Raises:
        ValueError: If the documents differ.

    Source:
        Hesterberg 2015, What Teachers Should Know About the Bootstrap (arXiv:1411.5279), section 4, for sources of
        equal size, where E is their number.
    """
    if list(after.sources) != list(before.sources) or not np.array_equal(after.tokens, before.tokens):
        raise ValueError("the two versions were not scored on the same documents")
    if not (np.isfinite(after.nats).all() and np.isfinite(before.nats).all()):
        return Bounds(math.nan, math.nan, math.nan)
    # Documents of one source are not independent, so sources are the unit that is resampled.
    _, source = np.unique(np.array(after.sources), return_inverse=True)
    nats_S = np.bincount(source, np.asarray(after.nats) - np.asarray(before.nats))
    tokens_S = np.bincount(source, after.tokens)
    mean, num = float(nats_S.sum() / tokens_S.sum()), len(nats_S)
    if not has_enough_sources(tokens_S):
        return Bounds(mean, -math.inf, math.inf)
    # scipy.stats.bootstrap has no small-sample correction. And with sources drawn as counts, a ratio of sums takes two
    # matrix products, where scipy resamples arrays.
    drawn_RS = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=resamples)
    means_R = (drawn_RS @ nats_S) / (drawn_RS @ tokens_S)
    # "lower" and "higher" instead of interpolation: a bound errs towards the wider interval.
    lowest, highest = np.quantile(means_R, level, method="lower"), np.quantile(means_R, 1 - level, method="higher")
    from scipy.stats import norm, t  # on use: most commands have no bound to compute, and importing it takes long

    freedom = effective_sources(tokens_S) - 1
    widening = math.sqrt((freedom + 1) / freedom) * t.ppf(level, freedom) / norm.ppf(level)
    return Bounds(mean, *(float(mean + widening * (bound - mean)) for bound in (lowest, highest)))


def effective_sources(sizes_S: NDArray[np.integer[Any]]) -> float:
    """Effective sample size: the number of equal sources whose mean would be as uncertain as theirs, 1 to S.

    Args:
        sizes_S: Tokens of each source.

    Source:
        Kish 1965, Survey Sampling, section 11.7: ``(sum n)^2 / sum n^2``.
    """
    shares_S = np.asarray(sizes_S) / np.sum(sizes_S)
    return float(1 / np.sum(shares_S**2))


def has_enough_sources(sizes_S: NDArray[np.integer[Any]]) -> bool:
    """Whether bounds from sources of these sizes hold as often as their level states."""
    return len(sizes_S) >= LEAST_SOURCES and effective_sources(sizes_S) >= LEAST_EFFECTIVE
