"""Which old distributions are tested together, so that each test has sources enough. Numbers and names only.

Legend: K distributions, M of them in a group, S sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

from lifelong_moe.retraining.bounds import LEAST_SOURCES, Bounds, DocumentLosses, can_tell, effective

Sizes = Mapping[str, NDArray[np.integer[Any]]]
"""Tokens of each source ``(S,)``, by distribution."""
Group = tuple[str, ...]

PASSING = 0.8
"""Share of harmless candidates for which :func:`sources_needed` keeps the chance of passing."""


def sources_needed(num_checks: int, level: float) -> float:
    """Effective sources with which K checks together are passed as often as a single one with the fewest sources is.

    A check passes a harmless candidate with probability ``Phi(c sqrt(S) - z)``, z the normal quantile of the level. The
    chance that all do falls with K unless each has more sources: twice as many for 10 checks, three times for 50.

    Args:
        num_checks: K.
        level: Of each check.
    """
    quantile = -norm.ppf(level)
    each = norm.ppf(PASSING ** (1 / max(1, num_checks)))
    return float(LEAST_SOURCES * ((quantile + each) / (quantile + norm.ppf(PASSING))) ** 2)


def groups(sizes: Sizes, kinds: Mapping[str, str], *, level: float) -> list[Group]:
    """Put distributions together until each group has the sources that it needs.

    A distribution with enough of its own stands alone. The others join, smallest first, only until there are enough:
    first within a kind, then what is left of all kinds. If the last ones still are too few, they borrow the sources of
    others, of their own kind first, which keep the group that they are in. Only sizes count, not losses: a candidate
    must not choose its test.

    Args:
        sizes: Of each distribution.
        kinds: The kind of a distribution; one that is absent is a kind of its own.
        level: Of each group's test.

    Returns:
        Each distribution in at least one group. Only if all together are too few does a group have too few.
    """
    needed = sources_needed(len(sizes), level)

    def enough(names: Sequence[str]) -> bool:
        together = np.concatenate([sizes[name] for name in names])
        return can_tell(together) and effective(together) >= needed

    def kind(name: str) -> str:
        return kinds.get(name, name)

    order = sorted(sizes, key=lambda name: (effective(sizes[name]), name))
    alone = [name for name in order if enough([name])]
    small = [name for name in order if name not in alone]
    found: list[Group] = [(name,) for name in alone]
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


def _fill(names: Iterable[str], enough: Callable[[Sequence[str]], bool], found: list[Group]) -> list[str]:
    """Append groups that are just large enough; returns what is left over."""
    group: list[str] = []
    for name in names:
        group.append(name)
        if enough(group):
            found.append(tuple(group))
            group = []
    return group


def joined(losses: Mapping[str, DocumentLosses], group: Group) -> DocumentLosses:
    """The gate sets of a group as one; sources of the same name in two of them are two sources."""
    if len(group) == 1:
        return losses[group[0]]
    parts = [losses[name] for name in group]
    sources = [f"{name}/{source}" for name, part in zip(group, parts, strict=True) for source in part.sources]
    nats, tokens = (np.concatenate([getattr(part, key) for part in parts]) for key in ("nats", "tokens"))
    return DocumentLosses(nats, tokens, sources)


def worst_member(
    after: Mapping[str, DocumentLosses], before: Mapping[str, DocumentLosses], group: Group, level: float
) -> tuple[str, Bounds]:
    """The member of a group that most clearly lost, and what: a large loss of one could hide in the group's mean.

    Members are too small for a scatter of their own; sources are taken to scatter about their member's mean alike in
    all of them. The level is divided by M, since any of M may look bad by chance.

    Args:
        after: Losses of one version.
        before: Those of the other, on the same documents.
        group: Which.
        level: Chance that some member's truth lies below its ``lower``.

    Returns:
        Its name and bounds; they are infinite if no member has two sources, and NaN if a loss is not finite.
    """
    changes = {name: _by_source(after[name], before[name]) for name in group}
    means = {name: float(changed_S @ sizes_S / sizes_S.sum()) for name, (changed_S, sizes_S) in changes.items()}
    freedom = sum(len(changed_S) - 1 for changed_S, _ in changes.values())
    squares = sum(float(((changed_S - changed_S.mean()) ** 2).sum()) for changed_S, _ in changes.values())
    each = level / len(group)
    scatter = math.sqrt(squares / freedom) * float(t.ppf(1 - each, freedom)) if freedom else math.inf
    found = []
    for name, (_, sizes_S) in changes.items():
        half = scatter / math.sqrt(effective(sizes_S))
        found.append((name, Bounds(means[name], means[name] - half, means[name] + half)))
    return max(found, key=lambda one: (math.isnan(one[1].lower), one[1].lower, one[1].mean))


def _by_source(after: DocumentLosses, before: DocumentLosses) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Nats per token by which each source became worse, and its tokens."""
    source = np.unique(np.array(after.sources), return_inverse=True)[1]
    return np.bincount(source, np.asarray(after.nats) - np.asarray(before.nats)) / after.sizes, after.sizes
