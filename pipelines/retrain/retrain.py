"""`lifelong-moe retrain`: one tick. Look, measure drift, decide, plan, train, gate, promote or reject, and record it.

A tick is idempotent: stages, probes and measurements are found by content, a batch by its documents. After a kill, the
next tick repeats only what was not committed.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from lifelong_moe.config.data import KeepText
from lifelong_moe.config.routing.own import allow_router
from lifelong_moe.data.tokens.texts import Texts
from lifelong_moe.plan.retraining import Retraining
from lifelong_moe.storage.locks import locked
from lifelong_moe.store.runs import RunRecord, latest_timestamp, require_head
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.callbacks.interrupt import Interrupt, handling_signals
from lifelong_moe.training.callbacks.own import allow_own
from pipelines.retrain.arrivals import Counts, counts_before, near_copies_of, remember_counts, too_little
from pipelines.retrain.outcome import AWAITING, TickOutcome, awaiting
from pipelines.retrain.plan_file import read_plan, refuse_idle_plan
from pipelines.retrain.tick import Tick
from pipelines.shared.novelty import NewDocuments, look_at, new_documents, read_texts
from pipelines.shared.places import ROOT, remove_abandoned
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
    files = look_at(tick.retraining.settings.inbox)
    if (counts := counts_before(tick, files)) is not None and (reason := too_little(tick, counts)) is not None:
        return _idle(tick, reason, counts, plan_path)
    _require_trainer(tick)
    texts, new = _look(tick)
    counts = Counts.of(tick, new)
    if (reason := too_little(tick, counts)) is not None:
        remember_counts(tick, files, counts)
        return _idle(tick, reason, counts, plan_path)
    _warn_of_future_versions(tick)
    from pipelines.retrain.batch import carry_out  # imports torch, which an idle tick does without

    return carry_out(tick, texts, new, interrupt, plan_path, dry_run=dry_run)


def _look(tick: Tick) -> tuple[Texts, NewDocuments]:
    """Read the run's texts and the inbox, and print what the inbox held besides new documents."""
    with tick.console.status("looking at the inbox"):
        texts = read_texts(tick.config, tick.known)
        new = new_documents(tick.retraining.settings.inbox, texts, tick.head.batches, tick.batches)
    tick.quarantine(new.bad_lines)
    if new.known:
        tick.console.print(f"{new.known:,} documents in the inbox were seen before, or repeat others")
    if new.near_copies:
        tick.console.print(f"{near_copies_of(new.near_copies)}, and are left out")
    return texts, new


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
