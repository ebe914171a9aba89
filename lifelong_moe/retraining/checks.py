"""The gate's checks: each is a number, its limit, and a sentence for the operator."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lifelong_moe.config.retraining.policy import GateConfig
from lifelong_moe.retraining.bounds import LEAST_SOURCES, Bounds, DocumentLosses
from lifelong_moe.retraining.pooling import Pool
from lifelong_moe.retraining.slices import Slice


@dataclass(frozen=True, kw_only=True)
class Check:
    """One condition of the gate."""

    name: str
    """Such as ``new/gain``, ``old/NAME/step`` or ``old/pooled(NAME, NAME)/step``."""
    value: float
    limit: float
    passed: bool
    sentence: str
    """The check in words, for the operator."""
    is_open: bool = False
    """Whether it failed only for want of new text: the limit lies within the bounds."""


@dataclass(frozen=True)
class Comparison:
    """An earlier version as the baseline of a loss check."""

    name: str
    """``step`` or ``ratchet``."""
    words: str
    limit: float
    """Largest loss increase against it, in nats per token."""
    times: int = 1
    """The limit in units of a tolerance."""


@dataclass(frozen=True)
class Verdict:
    """Whether the new version may become the champion."""

    checks: list[Check]
    notes: tuple[str, ...] = ()
    """What was not checked and why, a sentence each."""

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def is_open(self) -> bool:
        """Whether more new text may change the answer: every check that failed is open."""
        return not self.passed and all(check.passed or check.is_open for check in self.checks)

    @property
    def reasons(self) -> list[str]:
        """Why it failed, a sentence for each check; empty if it passed."""
        return [check.sentence for check in self.checks if not check.passed]


def gain_check(gain: Bounds, after: DocumentLosses, config: GateConfig) -> Check:
    """Check that the gain on the new distribution is at least ``gate.min_gain`` with confidence."""
    passed = gain.lower >= config.min_gain
    sentence = (
        f"New text gains {gain.mean:z.4f} nats per token, with confidence at least {gain.lower:z.4f}; "
        f"{'enough' if passed else 'not enough'}: gate.min_gain={config.min_gain}."
    )
    if math.isinf(gain.lower):
        sentence = f"What new text gains cannot be told: {_too_few(after)}."
    # Comparisons with NaN are false, so a missing loss neither passes nor counts as open.
    is_open = not passed and gain.upper >= config.min_gain
    return Check(
        name="new/gain", value=gain.lower, limit=config.min_gain, passed=passed, sentence=sentence, is_open=is_open
    )


def loss_check(pool: Pool, against: Comparison, lost: Bounds, after: DocumentLosses) -> Check:
    """Check that the loss of a distribution, or of a pool of them, increased by at most the limit with confidence."""
    names, limit, passed = ", ".join(pool), against.limit, lost.upper <= against.limit
    sentence = (
        f"{names} {_change(lost.mean, len(pool))} nats per token against {against.words}, "
        f"with confidence {_bound(lost)}; {'within' if passed else 'more than'} {limit:g}."
    )
    if math.isinf(lost.upper):
        sentence = f"What {names} lost against {against.words} cannot be told: {_too_few(after)}."
    name = f"old/{_name(pool)}/{against.name}"
    return Check(name=name, value=lost.upper, limit=limit, passed=passed, sentence=sentence)


def slice_check(name: str, against: Comparison, lost: Bounds, part: Slice | None) -> Check:
    """Check that the loss of a slice increased by at most its limit with confidence; None if none of it is scored."""
    limit, passed = against.limit, lost.upper <= against.limit
    if part is None:
        sentence = f"What slice {name} lost against {against.words} cannot be told: none of its text is scored."
    elif math.isinf(lost.upper):
        sentence = f"What slice {name} lost against {against.words} cannot be told: {_too_few_documents(part.after)}."
    else:
        by = f", by its {len(part.after.tokens)} documents" if part.by_document else ""
        sentence = (
            f"Slice {name} {_change(lost.mean, 1)} nats per token against {against.words}, with confidence "
            f"{_bound(lost)}{by}; {'within' if passed else 'more than'} {limit:g}."
        )
    return Check(name=f"slice/{name}/{against.name}", value=lost.upper, limit=limit, passed=passed, sentence=sentence)


def worst_member_check(pool: Pool, against: Comparison, name: str, lost: Bounds) -> Check:
    """Check that no member of a pool has been shown to lose more than the limit."""
    # The lower bound: the member fails if its loss is shown; one alone has too few sources to be shown harmless.
    limit, passed = against.limit, lost.lower <= against.limit
    return Check(
        name=f"old/{_name(pool)}/{against.name}_worst",
        value=lost.lower,
        limit=limit,
        passed=passed,
        sentence=f"Of {', '.join(pool)}: {name} loses most clearly, {lost.mean:z.4f} nats per token, with confidence "
        f"at least {lost.lower:z.4f}; {'not shown to be' if passed else 'shown to be'} more than {limit:g}.",
    )


def borrower_check(small: Pool, against: Comparison, after: DocumentLosses, other: DocumentLosses) -> Check:
    """Check the measured mean of the small members of a pool that borrows sources of larger distributions."""
    # In the pool's mean they would vanish beside the lenders. They are too few for bounds, so the mean itself counts.
    mean, names = after.nats_per_token - other.nats_per_token, ", ".join(small)
    limit, passed = against.limit, mean <= against.limit
    return Check(
        name=f"old/{_name(small)}/{against.name}_mean",
        value=mean,
        limit=limit,
        passed=passed,
        sentence=f"{names}, of too few sources for bounds, loses {mean:z.4f} nats per token as measured; "
        f"{'within' if passed else 'more than'} {limit:g}.",
    )


def _change(lost: float, members: int) -> str:
    """What is lost or gained; nobody reads a loss below 0 as a gain at first sight."""
    lose, gain = ("loses", "gains") if members == 1 else ("together lose", "together gain")
    # By what is shown: the sign of a rounding error differs between processors.
    return f"{gain} {-lost:.4f}" if round(lost, 4) < 0 else f"{lose} {lost:z.4f}"


def _bound(lost: Bounds) -> str:
    """The upper bound of a loss; beside a gain, that it is one of the loss."""
    if round(lost.upper, 4) < 0:
        return f"a gain of at least {-lost.upper:.4f}"
    return f"a loss of at most {lost.upper:z.4f}" if round(lost.mean, 4) < 0 else f"at most {lost.upper:z.4f}"


def _name(pool: Pool) -> str:
    """Name of a pool within a check's."""
    if len(pool) == 1:
        return pool[0]
    # MLflow refuses metric names of more than 250 characters.
    return f"pooled({', '.join(pool[:3])}{f' and {len(pool) - 3} more' * (len(pool) > 3)})"


def _too_few(losses: DocumentLosses) -> str:
    sizes = losses.sizes
    return (
        f"the held-out text is of {len(sizes)} source(s), the largest with {sizes.max() / sizes.sum():.0%} of it; at "
        f"least {LEAST_SOURCES} are needed, none with most of it"
    )


def _too_few_documents(losses: DocumentLosses) -> str:
    sizes = losses.sizes
    return (
        f"{len(sizes)} document(s) of it are scored, the largest with {sizes.max() / sizes.sum():.0%} of its tokens; "
        f"at least {LEAST_SOURCES} are needed, none with most of them"
    )


def frozen_check(changed: Sequence[str]) -> Check:
    """Check that every frozen tensor kept its bits; ``changed`` names those that did not."""
    first = ", ".join(changed[:3]) + (", …" if len(changed) > 3 else "")
    return Check(
        name="frozen",
        value=len(changed),
        limit=0,
        passed=not changed,
        sentence=f"{len(changed)} frozen tensor(s) changed: {first}." if changed else "Frozen tensors are unchanged.",
    )


def leak_checks(leaks: Mapping[str, float], config: GateConfig) -> Iterator[Check]:
    """Check for each old distribution that the router leak is at most ``gate.max_leak``."""
    for name, leak in leaks.items():
        yield Check(
            name=f"leak/{name}",
            value=leak,
            limit=config.max_leak,
            passed=leak <= config.max_leak,
            sentence=f"{leak:.1%} of {name} goes to experts born after it; gate.max_leak={config.max_leak}.",
        )
