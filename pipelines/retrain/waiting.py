"""Text that waits for more: when to look at a batch again.

Probes cost training. So a waiting batch is left alone until the champion, the settings or its documents change, or as
much text has joined it as would be worth a look by itself.
"""

from __future__ import annotations

import time
from contextlib import suppress

from lifelong_moe.data.text.documents import Document
from lifelong_moe.errors import ConfigError
from lifelong_moe.retraining.decision import Action
from lifelong_moe.store.runs import latest_timestamp, timestamp
from pipelines.retrain.plan import plan_path, settings_hash
from pipelines.retrain.plan_file import PlanFacts, read_plan
from pipelines.retrain.tick import Tick
from pipelines.shared.novelty import NewDocuments


def still_waiting(tick: Tick, new: NewDocuments) -> PlanFacts | None:
    """The plan by which the inbox's documents, or nearly all of them, wait; None if a tick should look at them.

    Prints how much text has joined them.
    """
    # The same batch: its own plan says whether it waits.
    if (made := _made_of(tick, new.hash)) is not None and made.sources == new.sources:
        return made if _waits(made) else None
    # Another batch, since documents have joined: the plan of the one that waited before them.
    before = tick.head.waiting
    facts = None if before is None else _made_of(tick, before)
    if before is None or facts is None or not _waits(facts):
        return None
    # With sources: a document that now names another source is another one to drift and gate.
    waiting = tick.batches.identities(before, facts.sources)
    joined = [document for document in new.documents if _identity(document) not in waiting]
    if not waiting <= {_identity(document) for document in new.documents}:
        return None  # some were taken away, or their sources changed
    trigger, tokens = tick.retraining.settings.trigger, tick.count_tokens(joined)
    # A plan that is dated in the future was made by a clock that was ahead: look again.
    oldest = timestamp(time.time() - 86400 * trigger.max_days) if trigger.max_days is not None else ""
    if tokens >= trigger.min_tokens or not oldest <= facts.made_at <= latest_timestamp():
        return None
    tick.console.print(
        f"{tokens:,} tokens have joined batch {facts.data}, which waits; trigger.min_tokens={trigger.min_tokens:,}",
    )
    return facts


def _made_of(tick: Tick, batch: str) -> PlanFacts | None:
    """A batch's plan, if champion and settings are still those that it was made for."""
    facts = None
    with suppress(ConfigError):  # absent or unreadable plans are made again
        facts = read_plan(plan_path(tick.record, batch))
    now = tick.head.champion.key, batch, settings_hash(tick.retraining)
    return facts if facts and (facts.champion.key, facts.batch, facts.settings) == now else None


def _waits(facts: PlanFacts) -> bool:
    return facts.decision.action == Action.wait


def _identity(document: Document) -> tuple[str, str]:
    return document.hash, document.source
