"""May a new version replace the one before? Differences of held-out loss with their uncertainty, against limits.

All losses are of fixed gate sets, so versions are compared document by document. What is not a number passes nothing,
and neither does what has too few sources for an answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lifelong_moe.config.retraining.policy import GateConfig
from lifelong_moe.retraining import checks
from lifelong_moe.retraining.bounds import Bounds, DocumentLosses, difference
from lifelong_moe.retraining.checks import Check, Comparison, Verdict
from lifelong_moe.retraining.pooling import Group, groups, joined, worst_member

RATCHET = 3
"""What a distribution may lose against its best version ever, in units of what it may lose in one step."""

Losses = Mapping[str, DocumentLosses]
"""By distribution."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was measured of a new version and of the champion before it, on gate sets that neither was trained on."""

    new: str
    """The new distribution; all others are old ones."""
    after: Losses
    """Of the new version."""
    before: Losses
    """Of the champion, on the same documents."""
    best: Losses
    """Of each old distribution's best version: the one that had the lowest mean so far."""
    changed_frozen: Sequence[str] = ()
    """Frozen tensors whose bits are others now."""
    leaks: Mapping[str, float] = field(default_factory=dict)
    """Share of an old distribution's tokens that go to experts born after it was learned, where that is measured."""
    kinds: Mapping[str, str] = field(default_factory=dict)
    """The kind of each old distribution, for pooling; one that is absent is a kind of its own."""

    def __post_init__(self) -> None:
        if not set(self.after) == set(self.before) == {self.new, *self.best} or self.new in self.best:
            raise ValueError(
                f"new {self.new}, after {sorted(self.after)}, before {sorted(self.before)} and best "
                f"{sorted(self.best)} do not fit"
            )


def judge(found: Evidence, config: GateConfig, *, seed: int) -> Verdict:
    """Hold a new version against the champion before it.

    - The new distribution improves: its gain is at least ``min_gain`` with confidence.
    - Each old one loses at most ``tolerance`` with confidence; small ones together
      (:func:`~lifelong_moe.retraining.pooling.groups`), and none of those may have been shown to lose more.
    - Against the best version that each ever had it loses at most three times that, with the same confidence, on the
      same documents: many small steps, each within its limit, must not add up.
    - Frozen tensors are what they were, and old text stays with the experts that know it.

    The level of a check is not divided by their number. All must be passed, so a version that harms one distribution
    passes no more often than that one's check lets it, which is ``level`` at most; divided, the harmless would fail.

    Args:
        found: What was measured.
        config: Limits.
        seed: Of the bootstraps.

    Raises:
        ValueError: If versions were scored on other documents.

    Source:
        The intersection-union test: Berger 1982, Multiparameter Hypothesis Testing and Acceptance Sampling,
        Technometrics 24(4).
    """
    new, old = found.after[found.new], {name: losses for name, losses in found.after.items() if name != found.new}
    gain = -difference(new, found.before[found.new], level=config.level, resamples=config.resamples, seed=seed)
    return Verdict(
        [
            checks.new_text_gains(gain, new, config),
            *_losses(old, found.before, found.kinds, _step(config), config, seed),
            *_losses(old, found.best, found.kinds, _ratchet(config), config, seed),
            checks.frozen_is_unchanged(found.changed_frozen),
            *checks.old_text_stays(found.leaks, config),
        ]
    )


def unharmed(
    *, after: Losses, before: Losses, config: GateConfig, seed: int, kinds: Mapping[str, str] | None = None
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
    return Verdict(list(_losses(after, before, kinds or {}, _step(config), config, seed)))


def forgetting(
    after: Losses, before: Losses, *, kinds: Mapping[str, str], level: float, resamples: int, seed: int
) -> dict[Group, Bounds]:
    """What each group of old distributions loses that the gate would test together.

    Args:
        after: Losses of one version.
        before: Those of another, on the same documents.
        kinds: The kind of each distribution, for pooling.
        level: Of each bound.
        resamples: Of the bootstrap.
        seed: Of the bootstraps.
    """
    sizes = {name: losses.sizes for name, losses in after.items()}
    return {
        group: difference(joined(after, group), joined(before, group), level=level, resamples=resamples, seed=seed)
        for group in groups(sizes, kinds, level=level)
    }


def _step(config: GateConfig) -> Comparison:
    return Comparison("step", "the version before", config.tolerance)


def _ratchet(config: GateConfig) -> Comparison:
    return Comparison("ratchet", "its best version", RATCHET * config.tolerance)


def _losses(
    after: Losses, other: Losses, kinds: Mapping[str, str], against: Comparison, config: GateConfig, seed: int
) -> Iterator[Check]:
    """What each distribution lost against another version, small ones together."""
    lost = forgetting(after, other, kinds=kinds, level=config.level, resamples=config.resamples, seed=seed)
    times = Counter(name for group in lost for name in group)
    for group, bounds in lost.items():
        yield checks.loses_little(group, against, bounds, joined(after, group))
        if len(group) > 1 and max(times[name] for name in group) > 1:
            # These borrow the sources of larger ones, which are in a group of their own too.
            small = tuple(name for name in group if times[name] == 1)
            yield checks.borrower_loses_little(small, against, joined(after, small), joined(other, small))
        if len(group) > 1:
            yield checks.worst_loses_little(group, against, *worst_member(after, other, group, config.level))
