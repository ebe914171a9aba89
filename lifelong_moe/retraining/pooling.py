"""Pool small old distributions, so that each check of the gate has enough sources. Numbers and names only.

Legend: K distributions, M of them in a pool, S sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.retraining.bounds import LEAST_SOURCES, Bounds, DocumentLosses, effective_sources, has_enough_sources

Sizes = Mapping[str, NDArray[np.integer[Any]]]
"""Tokens of each source ``(S,)``, by distribution."""
Pool = tuple[str, ...]
"""Names of distributions that one check covers."""

PASSING = 0.8
"""Share of harmless candidates for which :func:`sources_needed` keeps the chance of passing."""


def sources_needed(num_checks: int, level: float) -> float:
    """Effective sources with which K checks pass a harmless candidate as often as one check of the fewest sources.

    A check passes it with probability ``Phi(c sqrt(S) - z)``, z the normal quantile of the level. The chance that all
    do falls with K unless each has more sources: twice as many for 10 checks, three times for 50.

    Args:
        num_checks: K.
        level: Of each check.
    """
    from scipy.stats import norm  # on use, as in ``bounds.py``

    quantile = -norm.ppf(level)
    each = norm.ppf(PASSING ** (1 / max(1, num_checks)))
    return float(LEAST_SOURCES * ((quantile + each) / (quantile + norm.ppf(PASSING))) ** 2)


def pools(sizes: Sizes, kinds: Mapping[str, str], *, level: float) -> list[Pool]:
    """Pool distributions until each pool has :func:`sources_needed`.

    A distribution with enough sources stands alone. The others join, smallest first, only until there are enough:
    first within a kind, then across kinds. If the last ones still have too few, they borrow sources of others, of
    their own kind first; the lenders keep the pool that they are in.

    Args:
        sizes: Tokens of each source, by distribution.
        kinds: Kind of a distribution; one that is absent is a kind of its own.
        level: Of each pool's check.

    Returns:
        Each distribution in at least one pool. A pool has too few sources only if all distributions together have.
    """
    # Pools depend on sizes alone and never on losses: a candidate must not choose its own test.
    needed = sources_needed(len(sizes), level)

    def enough(names: Sequence[str]) -> bool:
        together = np.concatenate([sizes[name] for name in names])
        return has_enough_sources(together) and effective_sources(together) >= needed

    def kind(name: str) -> str:
        return kinds.get(name, name)

    # Names break ties, so that pools do not depend on the order of a mapping.
    order = sorted(sizes, key=lambda name: (effective_sources(sizes[name]), name))
    alone = [name for name in order if enough([name])]
    small = [name for name in order if name not in alone]
    found: list[Pool] = [(name,) for name in alone]
    left: list[str] = []
    for one in dict.fromkeys(kind(name) for name in small):
        left += _fill((name for name in small if kind(name) == one), enough, found)
    left = _fill((name for name in order if name in left), enough, found)
    if left:
        own = {kind(name) for name in left}
        lenders = sorted((name for name in order if name not in left), key=lambda name: kind(name) not in own)
        while lenders and not enough(left):
            left.append(lenders.pop(0))
        found.append(tuple(left))
    return found


def _fill(names: Iterable[str], enough: Callable[[Sequence[str]], bool], found: list[Pool]) -> list[str]:
    """Append pools that are just large enough to ``found``; returns the names left over."""
    pool: list[str] = []
    for name in names:
        pool.append(name)
        if enough(pool):
            found.append(tuple(pool))
            pool = []
    return pool


def pooled_losses(losses: Mapping[str, DocumentLosses], pool: Pool) -> DocumentLosses:
    """The gate sets of a pool as one set."""
    if len(pool) == 1:
        return losses[pool[0]]
    parts = [losses[name] for name in pool]
    # Prefixed: sources of the same name in two distributions are two sources.
    sources = [f"{name}/{source}" for name, part in zip(pool, parts, strict=True) for source in part.sources]
    nats, tokens = (np.concatenate([getattr(part, key) for part in parts]) for key in ("nats", "tokens"))
    return DocumentLosses(nats, tokens, sources)


def worst_member(
    after: Mapping[str, DocumentLosses], before: Mapping[str, DocumentLosses], pool: Pool, level: float
) -> tuple[str, Bounds]:
    """The member of a pool with the highest lower bound of its loss increase, and its bounds.

    A large increase of one member could hide in the pool's mean.

    Args:
        after: Losses of one version.
        before: Losses of the other, on the same documents.
        pool: Names of its members.
        level: Chance that some member's truth lies below its ``lower``.

    Returns:
        Name and bounds; the bounds are infinite if no member has two sources, and NaN if a loss is not finite.
    """
    from scipy.stats import t

    changes = {name: _by_source(after[name], before[name]) for name in pool}
    means = {name: float(changed_S @ sizes_S / sizes_S.sum()) for name, (changed_S, sizes_S) in changes.items()}
    # Members are too small for variances of their own, so the variance within members is pooled (one-way ANOVA).
    freedom = sum(len(changed_S) - 1 for changed_S, _ in changes.values())
    squares = sum(float(((changed_S - changed_S.mean()) ** 2).sum()) for changed_S, _ in changes.values())
    each = level / len(pool)  # Bonferroni: any of M members may look bad by chance
    scatter = math.sqrt(squares / freedom) * float(t.ppf(1 - each, freedom)) if freedom else math.inf
    found = []
    for name, (_, sizes_S) in changes.items():
        half = scatter / math.sqrt(effective_sources(sizes_S))
        found.append((name, Bounds(means[name], means[name] - half, means[name] + half)))
    # NaN first: a member without a number must not hide behind one that has a number.
    return max(found, key=lambda one: (math.isnan(one[1].lower), one[1].lower, one[1].mean))


def _by_source(after: DocumentLosses, before: DocumentLosses) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Loss increase of each source in nats per token, and its tokens, both ``(S,)``."""
    source = np.unique(np.array(after.sources), return_inverse=True)[1]
    return np.bincount(source, np.asarray(after.nats) - np.asarray(before.nats)) / after.sizes, after.sizes
