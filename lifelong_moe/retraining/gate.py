"""May a new version replace the one before? Differences of held-out loss with their uncertainty, against limits.

All losses are of fixed gate sets, so versions are compared document by document. What is not a number passes nothing,
and neither does what has too few sources for an answer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lifelong_moe.retraining.bounds import LEAST_SOURCES, Bounds, DocumentLosses, difference
from lifelong_moe.retraining.config import GateConfig
from lifelong_moe.retraining.pooling import Group, groups, joined, worst_member

RATCHET = 3
"""What a distribution may lose against its best version ever, in units of what it may lose in one step."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One condition of the gate."""

    name: str
    """Such as ``new/gain``, ``old/NAME/step`` or ``old/pooled(NAME, NAME)/step``."""
    value: float
    limit: float
    passed: bool
    sentence: str
    """The same for a person."""
    is_open: bool = False
    """Whether it failed only because there is too little new text to tell."""


@dataclass(frozen=True)
class Verdict:
    """Whether the new version may become the champion."""

    checks: list[Check]
    notes: tuple[str, ...] = ()
    """What was not checked and why, a sentence each."""

    @property
    def passed(self) -> bool:
        """Whether every check is."""
        return all(check.passed for check in self.checks)

    @property
    def is_open(self) -> bool:
        """Whether more new text may change the answer: of what failed nothing was shown."""
        return not self.passed and all(check.passed or check.is_open for check in self.checks)

    @property
    def reasons(self) -> list[str]:
        """What forbids it, a sentence each; empty if it passed."""
        return [check.sentence for check in self.checks if not check.passed]


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
    kinds: Mapping[str, str] | None = None,
) -> Verdict:
    """Hold a new version against the champion before it, on gate sets that neither was trained on.

    - The new distribution improves: its gain is at least ``min_gain`` with confidence.
    - Each old one loses at most ``tolerance`` with confidence; small ones together
      (:func:`~lifelong_moe.retraining.pooling.groups`), and none of those may have been shown to lose more.
    - Against the best version that each ever had it loses at most three times that, with the same confidence, on the
      same documents: many small steps, each within its limit, must not add up.
    - Frozen tensors are what they were, and old text stays with the experts that know it.

    The level of a check is not divided by their number. All must be passed, so a version that harms one distribution
    passes no more often than that one's check lets it, which is ``level`` at most; divided, the harmless would fail.

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
        kinds: The kind of each old distribution, for pooling; one that is absent is a kind of its own.

    Raises:
        ValueError: If the distributions do not fit, or versions were scored on other documents.

    Source:
        The intersection-union test: Berger 1982, Multiparameter Hypothesis Testing and Acceptance Sampling,
        Technometrics 24(4).
    """
    if not set(after) == set(before) == {new, *best} or new in best:
        raise ValueError(
            f"new {new}, after {sorted(after)}, before {sorted(before)} and best {sorted(best)} do not fit"
        )
    old = {name: losses for name, losses in after.items() if name != new}
    checks = [
        _gain(after[new], before[new], config, seed),
        *_losses(old, before, best, kinds or {}, config, seed),
        _frozen(changed_frozen),
        *_leaks(leaks, config),
    ]
    return Verdict(checks)


def unharmed(
    *,
    after: Mapping[str, DocumentLosses],
    before: Mapping[str, DocumentLosses],
    config: GateConfig,
    seed: int,
    kinds: Mapping[str, str] | None = None,
) -> Verdict:
    """Hold a version that learned nothing new against the one before it: each distribution loses at most ``tolerance``
    with confidence, small ones together, as in :func:`judge`.

    Args:
        after: Losses of the new version on each distribution.
        before: Those of the old one, on the same documents.
        config: Limits.
        seed: Of the bootstraps.
        kinds: The kind of each distribution, for pooling.
    """
    return Verdict(list(_losses(after, before, None, kinds or {}, config, seed)))


def forgetting(
    after: Mapping[str, DocumentLosses],
    before: Mapping[str, DocumentLosses],
    *,
    kinds: Mapping[str, str],
    level: float,
    resamples: int,
    seed: int,
) -> dict[Group, Bounds]:
    """What each group of old distributions loses that the gate would test together; arguments as for :func:`judge`."""
    sizes = {name: losses.sizes for name, losses in after.items()}
    return {
        group: difference(joined(after, group), joined(before, group), level=level, resamples=resamples, seed=seed)
        for group in groups(sizes, kinds, level=level)
    }


def _gain(after: DocumentLosses, before: DocumentLosses, config: GateConfig, seed: int) -> Check:
    gain = -difference(after, before, level=config.level, resamples=config.resamples, seed=seed)
    passed = gain.lower >= config.min_gain
    sentence = (
        f"New text gains {gain.mean:.4f} nats per token, with confidence at least {gain.lower:.4f}; "
        f"{'enough' if passed else 'not enough'}: gate.min_gain={config.min_gain}."
    )
    if math.isinf(gain.lower):
        sentence = f"What new text gains cannot be told: {_too_few(after)}."
    is_open = not passed and gain.upper >= config.min_gain
    return Check(
        name="new/gain", value=gain.lower, limit=config.min_gain, passed=passed, sentence=sentence, is_open=is_open
    )


def _losses(
    after: Mapping[str, DocumentLosses],
    before: Mapping[str, DocumentLosses],
    best: Mapping[str, DocumentLosses] | None,
    kinds: Mapping[str, str],
    config: GateConfig,
    seed: int,
) -> Iterator[Check]:
    """One step of forgetting, and all steps since the best version."""
    for step, other, words, limit in (
        ("step", before, "the version before", config.tolerance),
        ("ratchet", best, "its best version", RATCHET * config.tolerance),
    ):
        if other is None:
            continue
        lost = forgetting(after, other, kinds=kinds, level=config.level, resamples=config.resamples, seed=seed)
        times = Counter(name for group in lost for name in group)
        for group, bounds in lost.items():
            yield _lost(group, step, joined(after, group), bounds, words, limit)
            if max(times[name] for name in group) > 1 and len(group) > 1:
                small = tuple(name for name in group if times[name] == 1)
                yield _borrowing(small, step, joined(after, small), joined(other, small), limit)
            if len(group) > 1:
                yield _worst(group, step, worst_member(after, other, group, config.level), limit)


def _lost(group: Group, step: str, after: DocumentLosses, lost: Bounds, words: str, limit: float) -> Check:
    """What a distribution, or several together, may have lost at most."""
    names, passed = ", ".join(group), lost.upper <= limit
    sentence = (
        f"{names} {'loses' if len(group) == 1 else 'together lose'} {lost.mean:.4f} nats per token against {words}, "
        f"with confidence at most {lost.upper:.4f}; {'within' if passed else 'more than'} {limit:g}."
    )
    if math.isinf(lost.upper):
        sentence = f"What {names} lost against {words} cannot be told: {_too_few(after)}."
    return Check(name=f"old/{_name(group)}/{step}", value=lost.upper, limit=limit, passed=passed, sentence=sentence)


def _worst(group: Group, step: str, worst: tuple[str, Bounds], limit: float) -> Check:
    """None of several that are tested together may have been shown to lose more than one alone may."""
    name, lost = worst
    passed = lost.lower <= limit
    return Check(
        name=f"old/{_name(group)}/{step}_worst",
        value=lost.lower,
        limit=limit,
        passed=passed,
        sentence=f"Of {', '.join(group)} {name} loses most clearly, {lost.mean:.4f} nats per token, with confidence at "
        f"least {lost.lower:.4f}; {'not shown to be' if passed else 'shown to be'} more than {limit:g}.",
    )


def _borrowing(small: Group, step: str, after: DocumentLosses, other: DocumentLosses, limit: float) -> Check:
    """What borrowed the sources of larger ones would vanish in their mean: its own is held to the limit as it is."""
    mean, names = after.nats_per_token - other.nats_per_token, ", ".join(small)
    passed = mean <= limit
    return Check(
        name=f"old/{_name(small)}/{step}_mean",
        value=mean,
        limit=limit,
        passed=passed,
        sentence=f"{names}, of too few sources for bounds, loses {mean:.4f} nats per token as measured; "
        f"{'within' if passed else 'more than'} {limit:g}.",
    )


def _name(group: Group) -> str:
    """Of a check; MLflow cuts what is longer than 250 characters."""
    if len(group) == 1:
        return group[0]
    return f"pooled({', '.join(group[:3])}{f' and {len(group) - 3} more' * (len(group) > 3)})"


def _too_few(losses: DocumentLosses) -> str:
    sizes = losses.sizes
    return (
        f"the held-out text is of {len(sizes)} source(s), the largest with {sizes.max() / sizes.sum():.0%} of it; at "
        f"least {LEAST_SOURCES} are needed, none with most of it"
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
