"""May a new version replace the one before? Differences of held-out loss with their uncertainty, against limits.

All losses are of fixed gate sets, so versions are compared document by document. Documents of one source are not
independent, so the bootstrap draws sources. What is not a number passes nothing.

Legend: n documents, S sources, R bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

from lifelong_moe.retraining.config import GateConfig

RATCHET = 3
"""What a distribution may lose against its best version ever, in units of what it may lose in one step."""


@dataclass(frozen=True, eq=False)
class DocumentLosses:
    """Losses of one version on the documents of one gate set."""

    nats: NDArray[np.float64]
    """Cross-entropy of each document, summed over its scored tokens, ``(n,)``; NaN if it could not be had."""
    tokens: NDArray[np.int64]
    """Scored tokens of each, ``(n,)``, positive."""
    sources: Sequence[str]
    """Source of each."""

    def __post_init__(self) -> None:
        if not len(self.nats) == len(self.tokens) == len(self.sources) > 0:
            raise ValueError(f"{len(self.nats)} losses, {len(self.tokens)} lengths, {len(self.sources)} sources")
        if np.min(self.tokens) < 1:
            raise ValueError("a document has no scored token")

    @property
    def nats_per_token(self) -> float:
        """Mean over tokens."""
        return float(np.sum(self.nats) / np.sum(self.tokens))


@dataclass(frozen=True)
class Bounds:
    """A difference in nats per token, and what it is with confidence at least and at most."""

    mean: float
    lower: float
    upper: float

    def __neg__(self) -> Bounds:
        return Bounds(-self.mean, -self.upper, -self.lower)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One condition of the gate."""

    name: str
    """Such as ``new/gain`` or ``old/NAME/step``."""
    value: float
    limit: float
    passed: bool
    sentence: str
    """The same for a person."""


@dataclass(frozen=True)
class Verdict:
    """Whether the new version may become the champion."""

    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether every check is."""
        return all(check.passed for check in self.checks)

    @property
    def reasons(self) -> list[str]:
        """What forbids it, a sentence each; empty if it passed."""
        return [check.sentence for check in self.checks if not check.passed]


def difference(after: DocumentLosses, before: DocumentLosses, *, level: float, resamples: int, seed: int) -> Bounds:
    """Mean loss of one version minus that of another, each token counting alike; positive is worse.

    Paired bootstrap over sources. With few sources percentiles lie too near to the mean; they are moved away from it
    by ``sqrt(S / (S - 1)) t / z``, the ratio of Student's quantile to the normal one and the root of the variance's
    bias. One source, or a loss that is not finite, gives no bounds: minus and plus infinity, or NaN.

    Args:
        after: The one.
        before: The other, on the same documents.
        level: Chance that the truth lies below ``lower``, and that it lies above ``upper``, each.
        resamples: R.
        seed: Of the draws; same seed, same bounds.

    Raises:
        ValueError: If the documents differ.

    Source:
        Hesterberg 2015, What Teachers Should Know About the Bootstrap (arXiv:1411.5279), section 4.
    """
    if list(after.sources) != list(before.sources) or not np.array_equal(after.tokens, before.tokens):
        raise ValueError("the two versions were not scored on the same documents")
    if not (np.isfinite(after.nats).all() and np.isfinite(before.nats).all()):
        return Bounds(math.nan, math.nan, math.nan)
    _, source = np.unique(np.array(after.sources), return_inverse=True)
    nats_S = np.bincount(source, np.asarray(after.nats) - np.asarray(before.nats))
    tokens_S = np.bincount(source, after.tokens)
    mean, num = float(nats_S.sum() / tokens_S.sum()), len(nats_S)
    if num == 1:
        return Bounds(mean, -math.inf, math.inf)
    drawn_RS = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=resamples)
    means_R = (drawn_RS @ nats_S) / (drawn_RS @ tokens_S)
    lowest, highest = np.quantile(means_R, level, method="lower"), np.quantile(means_R, 1 - level, method="higher")
    widening = math.sqrt(num / (num - 1)) * t.ppf(level, num - 1) / norm.ppf(level)
    return Bounds(mean, *(float(mean + widening * (bound - mean)) for bound in (lowest, highest)))


def judge(
    *,
    new: str,
    after: Mapping[str, DocumentLosses],
    before: Mapping[str, DocumentLosses],
    best: Mapping[str, DocumentLosses],
    changed_frozen: Sequence[str],
    leaks: Mapping[str, float],
    config: GateConfig,
    seed: int,
) -> Verdict:
    """Hold a new version against the champion before it, on gate sets that neither was trained on.

    - The new distribution improves: its gain is at least ``min_gain`` with confidence.
    - Each of K old ones loses at most ``tolerance``, with confidence ``1 - level / K``.
    - Against the best version that each ever had it loses at most three times that, with the same confidence, on the
      same documents: many small steps, each within its limit, must not add up.
    - Frozen tensors are what they were, and old text stays with the experts that know it.

    Args:
        new: Name of the new distribution; all others are old ones.
        after: The new version's losses on each distribution.
        before: The champion's.
        best: For each old distribution the losses of the version that had the lowest mean so far.
        changed_frozen: Names of frozen tensors whose hash is another now.
        leaks: For each old distribution the share of its tokens that go to experts born after it was learned; empty
            where that is not measured.
        config: Limits.
        seed: Of the bootstraps.

    Raises:
        ValueError: If the distributions do not fit, or versions were scored on other documents.
    """
    old = [name for name in after if name != new]
    if not set(after) == set(before) == {new, *best} or new in best:
        raise ValueError(
            f"new {new}, after {sorted(after)}, before {sorted(before)} and best {sorted(best)} do not fit"
        )
    checks = [_gain(after[new], before[new], config, seed)]
    for name in old:
        checks += _losses(name, after[name], before[name], best[name], len(old), config, seed)
    return Verdict([*checks, _frozen(changed_frozen), *_leaks(leaks, config)])


def unharmed(
    *, after: Mapping[str, DocumentLosses], before: Mapping[str, DocumentLosses], config: GateConfig, seed: int
) -> Verdict:
    """Hold a version that learned nothing new against the one before it: each of K distributions loses at most
    ``tolerance``, with confidence ``1 - level / K``.

    Args:
        after: Losses of the new version on each distribution.
        before: Those of the old one, on the same documents.
        config: Limits.
        seed: Of the bootstraps.
    """
    checks = [
        check for name in after for check in _losses(name, after[name], before[name], None, len(after), config, seed)
    ]
    return Verdict(checks)


def _gain(after: DocumentLosses, before: DocumentLosses, config: GateConfig, seed: int) -> Check:
    gain = -difference(after, before, level=config.level, resamples=config.resamples, seed=seed)
    passed = gain.lower >= config.min_gain
    return Check(
        name="new/gain",
        value=gain.lower,
        limit=config.min_gain,
        passed=passed,
        sentence=f"New text gains {gain.mean:.4f} nats per token, with confidence at least {gain.lower:.4f}; "
        f"{'enough' if passed else 'not enough'}: gate.min_gain={config.min_gain}.",
    )


def _losses(
    name: str,
    after: DocumentLosses,
    before: DocumentLosses,
    best: DocumentLosses | None,
    num_old: int,
    config: GateConfig,
    seed: int,
) -> Iterator[Check]:
    """One step of forgetting, and all steps since the best version."""
    for kind, other, words, limit in (
        ("step", before, "the version before", config.tolerance),
        ("ratchet", best, "its best version", RATCHET * config.tolerance),
    ):
        if other is None:
            continue
        lost = difference(after, other, level=config.level / num_old, resamples=config.resamples, seed=seed)
        passed = lost.upper <= limit
        yield Check(
            name=f"old/{name}/{kind}",
            value=lost.upper,
            limit=limit,
            passed=passed,
            sentence=f"{name} loses {lost.mean:.4f} nats per token against {words}, with confidence at most "
            f"{lost.upper:.4f}; {'within' if passed else 'more than'} {limit:g}.",
        )


def _frozen(changed: Sequence[str]) -> Check:
    first = ", ".join(changed[:3]) + (", …" if len(changed) > 3 else "")
    return Check(
        name="frozen",
        value=len(changed),
        limit=0,
        passed=not changed,
        sentence=f"{len(changed)} frozen tensor(s) changed: {first}." if changed else "Frozen tensors are unchanged.",
    )


def _leaks(leaks: Mapping[str, float], config: GateConfig) -> Iterator[Check]:
    for name, leak in leaks.items():
        yield Check(
            name=f"leak/{name}",
            value=leak,
            limit=config.max_leak,
            passed=leak <= config.max_leak,
            sentence=f"{leak:.1%} of {name} goes to experts born after it; gate.max_leak={config.max_leak}.",
        )
