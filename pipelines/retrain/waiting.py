"""Text that waits for more: when to look at a batch again.

Probes cost training. So a waiting batch is left alone until the champion, the settings or its documents change, or as
much text has joined it as would be worth a look by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from lifelong_moe.errors import ConfigError
from lifelong_moe.retraining.decision import Action
from lifelong_moe.store.runs import latest_timestamp, timestamp
from pipelines.retrain.outcome import TickOutcome
from pipelines.retrain.plan_file import PlanFacts, plan_path, read_plan, settings_hash
from pipelines.retrain.tick import Tick


@dataclass(frozen=True)
class Offered:
    """New documents without their text."""

    batch: str
    """The batch that they are."""
    sources: str | None
    """Which copy of it; see :attr:`pipelines.shared.novelty.NewDocuments.sources`."""
    documents: Mapping[str, str]
    """The source of each document, by its hash."""


def decided_before(tick: Tick, batch: str, sources: str | None) -> TickOutcome | None:
    """How the last tick that looked at a batch ended, if the present one would end in the same way; None otherwise.

    That is where it waits, and where it is over a budget that depends on nothing but batch, champion and settings.
    """
    if (facts := _made_of(tick, batch)) is None or facts.sources != sources:
        return None
    if _waits(facts):
        return _waiting(facts)
    last = tick.head.last_tick
    # How many promotions there were in a week depends on the day.
    if not facts.exceeded or any("promotions_per_week" in one for one in facts.exceeded):
        return None
    reason = facts.exceeded[0].rstrip(".")
    if last is None or (last.outcome, last.reason, last.batch) != ("over budget", reason, batch):
        return None
    return TickOutcome(
        "over budget",
        reason,
        batch=batch,
        data=facts.data,
        action=facts.decision.action.value,
        plan=str(plan_path(tick.record, batch)),
        near_copies=facts.near_copies,
    )


def still_waiting(tick: Tick, offered: Offered, count: Callable[[Sequence[str]], int]) -> TickOutcome | None:
    """The outcome if the inbox's documents, or nearly all of them, wait; None if a tick should look at them.

    Prints how much text has joined them.

    Args:
        tick: The present one.
        offered: The documents.
        count: Tokens of documents, by their hashes.
    """
    # The same batch: its own plan says whether it waits.
    if (made := _made_of(tick, offered.batch)) is not None and made.sources == offered.sources:
        return _waiting(made) if _waits(made) else None
    # Another batch, since documents have joined: the plan of the one that waited before them.
    before = tick.head.waiting
    facts = None if before is None else _made_of(tick, before)
    if before is None or facts is None or not _waits(facts):
        return None
    # With sources: a document that now names another source is another one to drift and gate.
    waiting = tick.batches.identities(before, facts.sources)
    if not waiting <= offered.documents.items():
        return None  # some were taken away, or their sources changed
    joined = [digest for digest, source in offered.documents.items() if (digest, source) not in waiting]
    trigger, tokens = tick.retraining.settings.trigger, count(joined)
    # A plan that is dated in the future was made by a clock that was ahead: look again.
    oldest = timestamp(time.time() - 86400 * trigger.max_days) if trigger.max_days is not None else ""
    if tokens >= trigger.min_tokens or not oldest <= facts.made_at <= latest_timestamp():
        return None
    tick.console.print(
        f"{tokens:,} tokens have joined batch {facts.data}, which waits; trigger.min_tokens={trigger.min_tokens:,}",
    )
    return _waiting(facts)


def _waiting(facts: PlanFacts) -> TickOutcome:
    return TickOutcome("waiting", facts.last_reason, batch=facts.batch, data=facts.data)


def _made_of(tick: Tick, batch: str) -> PlanFacts | None:
    """A batch's plan, if champion and settings are still those that it was made for."""
    facts = None
    with suppress(ConfigError):  # absent or unreadable plans are made again
        facts = read_plan(plan_path(tick.record, batch))
    now = tick.head.champion.key, batch, settings_hash(tick.retraining)
    return facts if facts and (facts.champion.key, facts.batch, facts.settings) == now else None


def _waits(facts: PlanFacts) -> bool:
    return facts.decision.action == Action.wait
