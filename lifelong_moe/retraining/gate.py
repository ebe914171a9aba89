"""May a new version replace the one before? Differences of held-out loss with their uncertainty, against limits.

All losses are of fixed gate sets, so versions are compared document by document. What is not a number passes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lifelong_moe.retraining.bounds import DocumentLosses, difference
from lifelong_moe.retraining.config import GateConfig

RATCHET = 3
"""What a distribution may lose against its best version ever, in units of what it may lose in one step."""


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
