"""`lifelong-moe retrain`: one tick. Look, measure drift, decide, plan, train, gate, promote or reject, and record it.

A tick is idempotent: stages, probes and measurements are found by content, a batch by its documents. After a kill, the
next tick repeats only what was not committed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lifelong_moe.config.data import KeepText
from lifelong_moe.config.routing.own import allow_router
from lifelong_moe.data.arrivals.inbox import Arrived
from lifelong_moe.data.formats.bad_lines import BadLines
from lifelong_moe.data.text.known_hashes import HashIndex
from lifelong_moe.plan.retraining import Retraining
from lifelong_moe.storage.locks import locked
from lifelong_moe.store.runs import RunRecord, latest_timestamp, require_head
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.callbacks.interrupt import Interrupt, handling_signals
from lifelong_moe.training.callbacks.own import allow_own
from pipelines.retrain.arrivals import Counts, Found, found_before, near_copies_of, remember_found, too_little
from pipelines.retrain.first_look import FirstLook, first_look, remember_rows
from pipelines.retrain.outcome import AWAITING, TickOutcome, awaiting
from pipelines.retrain.plan_file import read_plan, refuse_idle_plan
from pipelines.retrain.tick import Tick
from pipelines.retrain.waiting import decided_before, still_waiting
from pipelines.shared.novelty import known_text, look_at, new_documents, read_texts
from pipelines.shared.places import CACHE, ROOT, remove_abandoned
from pipelines.versions.served import with_versions


def retrain(
    retraining: Retraining,
    dry_run: bool,
    plan_path: str | None,
    console: Console,
    reopen: str | None = None,
) -> TickOutcome:
    """Run one tick.

    Args:
        retraining: Its file and its base.
        dry_run: Write and print the plan, and stop.
        plan_path: Plan of a dry run, to be carried out as it stands.
        console: Output for people.
        reopen: Name, or beginning of the hash, of a skipped or rejected batch to consider again.

    Raises:
        ConfigError: If the run does not exist.
        DataError: If the inbox holds something unusable.
        StalePlanError: If the plan no longer fits.
        TryAgainError: If another process works on the run, or SIGTERM came.
        KeyboardInterrupt: After Ctrl-C; a checkpoint is committed by then.
    """
    # Mistakes of the user are raised before the lock file is made.
    require_head(ROOT, retraining.run)
    if plan_path is not None:
        read_plan(Path(plan_path))
    with handling_signals() as interrupt:
        record, store = RunRecord(ROOT, retraining.run), StageStore(ROOT)
        with locked(record.lock_path, f"run {record.run}"):
            remove_abandoned()
            head = with_versions(store, require_head(ROOT, record.run))
            tick = Tick(retraining, record, head, console)
            # Its user gave the base to this command.
            allow_router(tick.config.routing.mode)
            allow_own(tick.config.trainer)
            try:
                if not dry_run:
                    tick.remove_text(working=True)  # left by a killed tick
                if reopen is not None:
                    tick.reopen(reopen)
                return _tick(tick, interrupt, dry_run, plan_path)
            except Exception as error:
                if not dry_run:
                    tick.fail(error)
                raise
            finally:
                # After a dry run the text stays for --plan, unless it stays anyway: then only its note is cleared.
                if not dry_run or retraining.settings.inbox.keep_text == KeepText.always:
                    tick.remove_text()


def _tick(tick: Tick, interrupt: Interrupt, dry_run: bool, plan_path: str | None) -> TickOutcome:
    """From the inbox to the outcome."""
    if not dry_run:
        tick.withdraw()
    if (waits := tick.head.candidate) is not None and waits.before == tick.head.champion_id:
        # Text gathers meanwhile: what would train on from a version that nobody wants would be lost with it.
        waiting_for = awaiting(tick.record.run, waits.id)
        refuse_idle_plan(plan_path, waiting_for)
        tick.tell_champion()
        batch = waits.stages[-1].batch
        return tick.end(TickOutcome(AWAITING, waiting_for, batch=batch, candidate=waits.key, version=waits.id))
    inbox = tick.retraining.settings.inbox
    files = look_at(inbox)
    # A dry run always looks, and a plan is carried out or refused as stale.
    may_repeat = plan_path is None and not dry_run
    if (found := found_before(tick, files)) is not None:
        if (reason := too_little(tick, found.counts)) is not None:
            return _idle(tick, reason, found.counts, plan_path)
        if may_repeat and found.batch and (ended := decided_before(tick, found.batch, found.sources)) is not None:
            tick.bad_lines = found.bad_lines
            return _repeat(tick, ended)
    texts, index = read_texts(tick.config, tick.known), HashIndex(CACHE)
    known = known_text(tick.config, texts, tick.head.batches, tick.batches)
    with tick.console.status("looking at the inbox"):
        look = first_look(tick, known, index)
    if (ended := _without_known_text(tick, files, look, plan_path, may_repeat=may_repeat)) is not None:
        texts.remember()
        index.save()
        return ended
    _require_trainer(tick)
    texts.remember()
    index.save()
    with tick.console.status("looking for copies of known text"):
        new = new_documents(inbox, known, tick.batches, look.glance)
    _tell(tick, new.bad_lines, new.known, new.near_copies)
    counts = Counts.of(tick, new)
    remember_rows(tick, files, look, new.copies)
    remember_found(tick, files, Found(counts, new.hash if new.documents else None, new.sources, tick.bad_lines))
    if (reason := too_little(tick, counts)) is not None:
        return _idle(tick, reason, counts, plan_path)
    _warn_of_future_versions(tick)
    from pipelines.retrain.batch import carry_out  # imports torch, which an idle tick does without

    return carry_out(tick, texts, new, interrupt, plan_path, dry_run=dry_run)


def _without_known_text(
    tick: Tick, files: Arrived | None, look: FirstLook, plan_path: str | None, *, may_repeat: bool
) -> TickOutcome | None:
    """End a tick whose new documents are too little, or wait; None if known text must be read to tell."""
    if (reason := too_little(tick, look.counts)) is not None:
        _keep_look(tick, files, look, Found(look.counts))
        return _idle(tick, reason, look.counts, plan_path)
    if not may_repeat:
        return None
    offered = look.offered(tick.batches.copy_with)
    ended = decided_before(tick, offered.batch, offered.sources) or still_waiting(tick, offered, look.tokens)
    if ended is None:
        return None
    _keep_look(tick, files, look, Found(look.counts, offered.batch, offered.sources))
    return _repeat(tick, ended)


def _keep_look(tick: Tick, files: Arrived | None, look: FirstLook, found: Found) -> None:
    """Print what the inbox held besides new documents, and keep all of it for the next tick."""
    _tell(tick, look.glance.bad_lines, look.repeats, len(look.copies))
    remember_found(tick, files, replace(found, bad_lines=tick.bad_lines))
    remember_rows(tick, files, look, look.copies)


def _tell(tick: Tick, bad_lines: BadLines | None, repeats: int, near_copies: int) -> None:
    """Print what the inbox held besides new documents."""
    tick.quarantine(bad_lines)
    if repeats:
        tick.console.print(f"{repeats:,} documents in the inbox were seen before, or repeat others")
    if near_copies:
        tick.console.print(f"{near_copies_of(near_copies)}, and are left out")


def _repeat(tick: Tick, ended: TickOutcome) -> TickOutcome:
    """End a tick as the one before it."""
    _warn_of_future_versions(tick)
    tick.tell_champion()
    return tick.end(ended)


def _require_trainer(tick: Tick) -> None:
    """Refuse an accelerator or strategy that this machine lacks, before anything is written."""
    from lifelong_moe.training.loop.device import require_trainer  # imports torch, which an idle tick does without

    require_trainer(tick.config.trainer)


def _warn_of_future_versions(tick: Tick) -> None:
    """Print a line for each version whose date is not believed."""
    believed = tick.head.versions_until(latest_timestamp())
    for version in tick.head.versions:
        if version not in believed:
            tick.console.print(
                f"Version {version.id} is dated {version.at}, which is in the future: a clock was ahead. It counts "
                f"neither for trigger.max_days nor for limits.promotions_per_week.",
            )


def _idle(tick: Tick, reason: str, counts: Counts, plan_path: str | None) -> TickOutcome:
    """End a tick that has nothing to do; a plan to be carried out is stale then."""
    if counts.documents:
        _warn_of_future_versions(tick)
    refuse_idle_plan(plan_path, reason)
    tick.tell_champion()
    return tick.end(TickOutcome("idle", reason))
