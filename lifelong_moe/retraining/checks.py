"""The conditions of the gate, one by one: a number, its limit, and the same as a sentence for a person."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lifelong_moe.config.retraining.policy import GateConfig
from lifelong_moe.retraining.bounds import LEAST_SOURCES, Bounds, DocumentLosses
from lifelong_moe.retraining.pooling import Group


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
class Comparison:
    """An earlier version that losses are held against."""

    name: str
    """``step`` or ``ratchet``."""
    words: str
    limit: float
    """Nats per token that may be lost against it."""


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


def new_text_gains(gain: Bounds, after: DocumentLosses, config: GateConfig) -> Check:
    """The new distribution improves by ``gate.min_gain`` with confidence."""
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


def loses_little(group: Group, against: Comparison, lost: Bounds, after: DocumentLosses) -> Check:
    """What a distribution, or several together, may have lost at most."""
    names, limit, passed = ", ".join(group), against.limit, lost.upper <= against.limit
    sentence = (
        f"{names} {'loses' if len(group) == 1 else 'together lose'} {lost.mean:.4f} nats per token against "
        f"{against.words}, "
        f"with confidence at most {lost.upper:.4f}; {'within' if passed else 'more than'} {limit:g}."
    )
    if math.isinf(lost.upper):
        sentence = f"What {names} lost against {against.words} cannot be told: {_too_few(after)}."
    name = f"old/{_name(group)}/{against.name}"
    return Check(name=name, value=lost.upper, limit=limit, passed=passed, sentence=sentence)


def worst_loses_little(group: Group, against: Comparison, name: str, lost: Bounds) -> Check:
    """None of several that are tested together may have been shown to lose more than one alone may."""
    limit, passed = against.limit, lost.lower <= against.limit
    return Check(
        name=f"old/{_name(group)}/{against.name}_worst",
        value=lost.lower,
        limit=limit,
        passed=passed,
        sentence=f"Of {', '.join(group)} {name} loses most clearly, {lost.mean:.4f} nats per token, with confidence at "
        f"least {lost.lower:.4f}; {'not shown to be' if passed else 'shown to be'} more than {limit:g}.",
    )


def borrower_loses_little(small: Group, against: Comparison, after: DocumentLosses, other: DocumentLosses) -> Check:
    """What borrowed the sources of larger ones would vanish in their mean: its own is held to the limit as it is."""
    mean, names = after.nats_per_token - other.nats_per_token, ", ".join(small)
    limit, passed = against.limit, mean <= against.limit
    return Check(
        name=f"old/{_name(small)}/{against.name}_mean",
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


def frozen_is_unchanged(changed: Sequence[str]) -> Check:
    """No frozen tensor is another one; ``changed`` names those that are."""
    first = ", ".join(changed[:3]) + (", …" if len(changed) > 3 else "")
    return Check(
        name="frozen",
        value=len(changed),
        limit=0,
        passed=not changed,
        sentence=f"{len(changed)} frozen tensor(s) changed: {first}." if changed else "Frozen tensors are unchanged.",
    )


def old_text_stays(leaks: Mapping[str, float], config: GateConfig) -> Iterator[Check]:
    """Old text stays with the experts that know it."""
    for name, leak in leaks.items():
        yield Check(
            name=f"leak/{name}",
            value=leak,
            limit=config.max_leak,
            passed=leak <= config.max_leak,
            sentence=f"{leak:.1%} of {name} goes to experts born after it; gate.max_leak={config.max_leak}.",
        )
