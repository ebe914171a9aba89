"""The gate: may a candidate replace the champion? Bounds of held-out loss differences against limits.

The bounds are computed by :func:`lifelong_moe.retraining.bounds.difference_bounds`, on fixed gate sets, so that
versions are compared document by document. NaN passes no check, and neither do infinite bounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lifelong_moe.config.retraining.policy import GateConfig
from lifelong_moe.retraining import checks
from lifelong_moe.retraining.bounds import UNKNOWN, Bounds, DocumentLosses, difference_bounds
from lifelong_moe.retraining.checks import Check, Comparison, Verdict
from lifelong_moe.retraining.pooling import Pool, pooled_losses, pools, worst_member
from lifelong_moe.retraining.slices import slices_of

RATCHET = 3
"""Loss increase allowed against a distribution's best version ever, in units of ``gate.tolerance``.

1 would count one step's whole tolerance against all later ones, and no limit would let each promotion lose a tolerance
more. 3 is a choice, not a measurement: room for the noise of several steps, and an end to slow forgetting."""

Losses = Mapping[str, DocumentLosses]
"""By distribution."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Measurements of a candidate and of the champion, on gate sets that neither was trained on."""

    new: str
    """The new distribution; all others are old ones."""
    after: Losses
    """Losses of the candidate."""
    before: Losses
    """Losses of the champion, on the same documents."""
    best: Losses
    """Losses of each old distribution's best version: the one with the lowest mean so far."""
    changed_frozen: Sequence[str] = ()
    """Names of frozen tensors whose bits changed."""
    leaks: Mapping[str, float] = field(default_factory=dict)
    """Router leak of old distributions, where it was measured: share of tokens routed to later experts."""
    kinds: Mapping[str, str] = field(default_factory=dict)
    """Kind of each old distribution, for pooling; one that is absent is a kind of its own."""

    def __post_init__(self) -> None:
        if not set(self.after) == set(self.before) == {self.new, *self.best} or self.new in self.best:
            raise ValueError(
                f"new {self.new}, after {sorted(self.after)}, before {sorted(self.before)} and best "
                f"{sorted(self.best)} do not fit"
            )


def judge(found: Evidence, config: GateConfig, *, seed: int) -> Verdict:
    """Judge a candidate against the champion. All checks must pass.

    - Gain: the loss on the new distribution falls by at least ``min_gain`` with confidence.
    - Step: the loss on each old distribution rises by at most ``tolerance`` with confidence. Small distributions are
      pooled (:func:`~lifelong_moe.retraining.pooling.pools`), and no member may have been shown to lose more.
    - Ratchet: against the best version of each old distribution, at most ``RATCHET`` times as much.
    - Slices: both for each part of the old text that has a tolerance of its own.
    - Frozen tensors keep their bits, and the router leak of old distributions is at most ``max_leak``.

    Args:
        found: Measurements.
        config: Limits and level.
        seed: Of the bootstraps.

    Raises:
        ValueError: If versions were scored on other documents.

    Source:
        The intersection-union test: Berger 1982, Multiparameter Hypothesis Testing and Acceptance Sampling,
        Technometrics 24(4).
    """
    new, old = found.after[found.new], {name: losses for name, losses in found.after.items() if name != found.new}
    gain = -difference_bounds(new, found.before[found.new], level=config.level, resamples=config.resamples, seed=seed)
    # The level is not divided by the number of checks. As all must pass, a candidate that harms one distribution passes
    # no more often than that check alone lets it, which is `level` at most; divided, harmless candidates would fail.
    return Verdict(
        [
            checks.gain_check(gain, new, config),
            *_loss_checks(old, found.before, found.kinds, _step(config), config, seed),
            # Many small steps, each within its limit, must not add up.
            *_loss_checks(old, found.best, found.kinds, _ratchet(config), config, seed),
            checks.frozen_check(found.changed_frozen),
            *checks.leak_checks(found.leaks, config),
        ]
    )


def judge_derived(
    *, after: Losses, before: Losses, config: GateConfig, seed: int, kinds: Mapping[str, str] | None = None
) -> Verdict:
    """Judge a version derived without training: only the step check of :func:`judge`, on each distribution.

    Args:
        after: Losses of the derived version on each distribution.
        before: Losses of the version that it was derived from, on the same documents.
        config: Limits and level.
        seed: Of the bootstraps.
        kinds: Kind of each distribution, for pooling.
    """
    return Verdict(list(_loss_checks(after, before, kinds or {}, _step(config), config, seed)))


def forgetting_bounds(
    after: Losses, before: Losses, *, kinds: Mapping[str, str], level: float, resamples: int, seed: int
) -> dict[Pool, Bounds]:
    """Bounds of the loss increase of each pool of old distributions that the gate tests together.

    Args:
        after: Losses of one version.
        before: Losses of another, on the same documents.
        kinds: Kind of each distribution, for pooling.
        level: Of each bound.
        resamples: Of the bootstrap.
        seed: Of the bootstraps.
    """
    sizes = {name: losses.sizes for name, losses in after.items()}
    return {
        pool: difference_bounds(
            pooled_losses(after, pool), pooled_losses(before, pool), level=level, resamples=resamples, seed=seed
        )
        for pool in pools(sizes, kinds, level=level)
    }


def _step(config: GateConfig) -> Comparison:
    return Comparison("step", "the version before", config.tolerance)


def _ratchet(config: GateConfig) -> Comparison:
    return Comparison("ratchet", "its best version", RATCHET * config.tolerance, RATCHET)


def _loss_checks(
    after: Losses, other: Losses, kinds: Mapping[str, str], against: Comparison, config: GateConfig, seed: int
) -> Iterator[Check]:
    """Step or ratchet checks: one or more for each pool of distributions, and one for each slice."""
    lost = forgetting_bounds(after, other, kinds=kinds, level=config.level, resamples=config.resamples, seed=seed)
    times = Counter(name for pool in lost for name in pool)
    for pool, bounds in lost.items():
        yield checks.loss_check(pool, against, bounds, pooled_losses(after, pool))
        if len(pool) > 1 and max(times[name] for name in pool) > 1:
            # Members of no other pool are the small ones; the rest lend their sources and have a pool of their own.
            small = tuple(name for name in pool if times[name] == 1)
            yield checks.borrower_check(small, against, pooled_losses(after, small), pooled_losses(other, small))
        if len(pool) > 1:
            yield checks.worst_member_check(pool, against, *worst_member(after, other, pool, config.level))
    for name, tolerance, part in slices_of(after, other, config):
        change = UNKNOWN
        if part is not None:
            change = difference_bounds(
                part.after, part.before, level=config.level, resamples=config.resamples, seed=seed
            )
        yield checks.slice_check(name, replace(against, limit=against.times * tolerance), change, part)
