"""`lifelong-moe retrain`: one tick. Look, measure drift, decide, plan, train, gate, promote or reject, and record it.

A tick is idempotent: stages, probes and measurements are found by content, a batch by its documents. After a kill, the
next tick repeats only what was not committed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lifelong_moe.config.data import KeepText
from lifelong_moe.config.load import written_config
from lifelong_moe.config.retraining.policy import HELDOUT_SOURCES
from lifelong_moe.config.routing.own import allow_router
from lifelong_moe.data.tokens.prepare import Texts
from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.retraining import Retraining
from lifelong_moe.retraining.checks import Verdict
from lifelong_moe.retraining.decision import Action
from lifelong_moe.storage.locks import locked
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import RunRecord, latest_timestamp, require_head, timestamp
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.store.versions import Action as StageAction
from lifelong_moe.store.versions import VersionStage
from lifelong_moe.tracking.tracker import Tracker
from lifelong_moe.training.callbacks.interrupt import Interrupt, handling_signals
from lifelong_moe.training.callbacks.own import allow_own
from lifelong_moe.training.loop.device import require_trainer
from pipelines.retrain.outcome import TickOutcome
from pipelines.retrain.plan import TickPlan, make_plan
from pipelines.retrain.plan_check import check_plan
from pipelines.retrain.plan_file import PlanFacts, read_plan, refuse_idle_plan
from pipelines.retrain.record import TickRecord
from pipelines.retrain.render import print_plan
from pipelines.retrain.tick import Tick
from pipelines.retrain.waiting import still_waiting, too_little
from pipelines.shared.kept_text import with_texts
from pipelines.shared.novelty import NewDocuments, new_documents, read_texts
from pipelines.shared.places import ROOT, remove_abandoned
from pipelines.shared.recorded import show_champion
from pipelines.versions.candidates import Candidate, CandidateTrainer, batch_files, model_loader
from pipelines.versions.drop import with_versions
from pipelines.versions.gating import best_losses, gate, updated_best
from pipelines.versions.render import print_verdict


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
                # An accelerator or strategy that this machine lacks is refused before anything is written.
                require_trainer(tick.config.trainer)
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
    texts, new = _look(tick)
    if not new.documents:
        refuse_idle_plan(plan_path, "nothing is new")
        copies = f"; {_near_copies(new)}" if new.near_copies else ""
        return _idle(tick, f"nothing new has arrived{copies}")
    _warn_of_future_versions(tick)
    if (reason := too_little(tick, new)) is not None:
        refuse_idle_plan(plan_path, reason)
        return _idle(tick, reason)
    # A dry run always looks, and a plan is carried out or refused as stale.
    if plan_path is None and not dry_run and (before := still_waiting(tick, new)) is not None:
        _show_champion(tick)
        return tick.end(TickOutcome("waiting", _last_reason(before), batch=before.batch, data=before.data))
    trainer = _candidate_trainer(tick, new, texts, interrupt)
    mlflow = TickRecord(Tracker.connect(tick.config.tracking, ROOT), tick)
    try:
        mlflow.begin(new.name, new.hash, trainer.texts.corpora[new.name], tick.retraining.settings)
        if plan_path is None:
            plan = make_plan(trainer, new, tick.head)
            plan.write(tick.record)
        else:
            plan = check_plan(Path(plan_path), trainer, new, tick)
        print_plan(tick.console, plan.facts)
        mlflow.planned(plan.facts, plan.candidate)
        return _carry_out(tick, trainer, new, plan, mlflow, dry_run)
    except BaseException as error:
        mlflow.ended_by(error)
        raise


def _look(tick: Tick) -> tuple[Texts, NewDocuments]:
    """Read the run's texts and the inbox, and print what the inbox held besides new documents."""
    with tick.console.status("looking at the inbox"):
        texts = read_texts(tick.config, tick.known)
        new = new_documents(tick.retraining.settings.inbox, texts, tick.head.batches, tick.batches)
    if new.known:
        tick.console.print(f"{new.known:,} documents in the inbox were seen before, or repeat others")
    if new.near_copies:
        tick.console.print(f"{_near_copies(new)}, and are left out")
    return texts, new


def _near_copies(new: NewDocuments) -> str:
    return f"{new.near_copies:,} documents in the inbox are near copies of text seen before"


def _warn_of_future_versions(tick: Tick) -> None:
    """Print a line for each version whose date is not believed."""
    believed = tick.head.versions_until(latest_timestamp())
    for version in tick.head.versions:
        if version not in believed:
            tick.console.print(
                f"Version {version.id} is dated {version.at}, which is in the future: a clock was ahead. It counts "
                f"neither for trigger.max_days nor for limits.promotions_per_week.",
            )


def _idle(tick: Tick, reason: str) -> TickOutcome:
    """End a tick that has nothing to do."""
    _show_champion(tick)
    return tick.end(TickOutcome("idle", reason))


def _show_champion(tick: Tick) -> None:
    """Send MLflow what it missed, and which version serves."""
    # A server that was away during an earlier tick learns of its outcome even if nothing new arrives.
    tracker = Tracker.connect(tick.config.tracking, ROOT)
    if tracker.connected:
        show_champion(tick.head, tracker)


def _last_reason(facts: PlanFacts) -> str:
    """The last of a plan's reasons: why nothing is trained."""
    return facts.decision.reasons[-1].removeprefix("Skip: ").removeprefix("Wait: ").rstrip(".")


def _candidate_trainer(tick: Tick, new: NewDocuments, texts: Texts, interrupt: Interrupt) -> CandidateTrainer:
    """Keep the batch, and return the trainer of its candidates.

    Raises:
        ConfigError: If a distribution's text is no longer the one that its stage was trained on.
    """
    now = tick.head.champion
    for stage in now.stages:
        known = tick.store.get(stage.key).split.get(stage.data)
        corpus = texts.corpora.get(stage.data)
        if corpus is not None and known is not None and known != (found := corpus.split_hash):
            raise ConfigError(
                f"distributions.{stage.data}: its training text is {found[:16]}, but stage {stage.name} was trained on "
                f"{known[:16]}. Bring that text back, or begin another run."
            )
    # Noted before the text is written: whoever is killed in between, the next tick knows that there is text to remove.
    tick.open_batch(new.hash)
    tick.batches.add(new.documents, new.files, new.mode)
    files, load = batch_files(new.hash, new.sources), model_loader(tick.store, tick.config.trainer)
    return CandidateTrainer(
        tick.retraining, now, new.name, files, tick.known, tick.store, interrupt, tick.console, load
    )


def _carry_out(
    tick: Tick, trainer: CandidateTrainer, new: NewDocuments, plan: TickPlan, mlflow: TickRecord, dry_run: bool
) -> TickOutcome:
    """From the plan to the outcome: train and gate if the plan says so, then settle the batch."""
    ended, stage, verdict = _without_training(plan, dry_run), None, None
    if ended is None:
        assert plan.candidate is not None
        stage, verdict = _train_and_judge(tick, trainer, plan.candidate, plan.facts, mlflow)
        ended = _after_gate(verdict)
    if ended.outcome in ("skipped", "promoted", "rejected"):
        tick.settle(new, ended.outcome, ended.reason)
    elif ended.outcome == "waiting":
        tick.head = replace(tick.head, waiting=new.hash)
        if verdict is not None:
            # Rewritten, so that the next tick finds a plan that waits and does not train the stage again.
            plan = replace(plan, facts=plan.facts.postponed(f"{ended.reason}."))
            plan.write(tick.record)
    if ended.outcome == "promoted":
        assert stage is not None and plan.candidate is not None
        kept = plan.candidate.config.evaluate.keep_heldout
        tick.head = with_texts(tick.head, written_config(tick.retraining.base), plan.candidate.data, kept)
        tick.head = _promoted(tick, stage, new, plan.action, ended.reason)
    ended = replace(
        ended,
        batch=new.hash,
        data=new.name,
        action=plan.action.value,
        plan=str(plan.path(tick.record)),
        near_copies=plan.facts.near_copies,
        candidate=None if stage is None else stage.key,
    )
    # The head is saved here, in one write: a kill before it repeats the gate, and finds all measurements.
    ended = tick.end(ended)
    mlflow.done(ended, plan.facts, verdict)
    return ended


def _without_training(plan: TickPlan, dry_run: bool) -> TickOutcome | None:
    """The outcome of a plan that trains nothing now; None if its candidate is to be trained."""
    if dry_run:
        return TickOutcome("planned", f"{plan.action} is what a tick would do now")
    if plan.facts.exceeded:
        return TickOutcome("over budget", plan.facts.exceeded[0].rstrip("."))
    if plan.candidate is None:
        return TickOutcome("waiting" if plan.action == Action.wait else "skipped", _last_reason(plan.facts))
    return None


def _train_and_judge(
    tick: Tick, trainer: CandidateTrainer, candidate: Candidate, facts: PlanFacts, mlflow: TickRecord
) -> tuple[CommittedStage, Verdict]:
    """Train the candidate and take it through the gate."""
    stage = trainer.train(candidate, mlflow.curves, mlflow.run_id)
    tick.trained(stage)
    mlflow.candidate(stage, facts)
    best = best_losses(trainer, candidate, tick.head.best)
    verdict = gate(trainer, candidate, stage, best)
    print_verdict(tick.console, verdict)
    mlflow.judged(verdict)
    # Only a version that serves raises the bar for later ones; what a rejected candidate reached does not count.
    if verdict.passed:
        measurements = candidate.measurements
        best = updated_best(measurements, stage, best, measurements.measurable())
    tick.head = replace(tick.head, best=best)
    return stage, verdict


def _after_gate(verdict: Verdict) -> TickOutcome:
    outcome = "promoted" if verdict.passed else "waiting" if verdict.is_open else "rejected"
    reason = verdict.checks[0].sentence if verdict.passed else verdict.reasons[0]
    return TickOutcome(outcome, reason.rstrip("."))


def _promoted(tick: Tick, stage: CommittedStage, new: NewDocuments, decided: Action, reason: str) -> RunHead:
    """The head with the candidate as champion, signed if there is a key."""
    tick.store.sign(stage.key, tick.head.centroids)
    action: StageAction = "grow" if decided == Action.grow else "continue"
    added = VersionStage(
        name=stage.name,
        key=stage.key,
        data=new.name,
        action=action,
        batch=new.hash,
        sources=new.sources,
        # The split is noted with the stage: text that it was trained on must never count as held out later.
        heldout_fraction=tick.retraining.settings.inbox.heldout_fraction,
        heldout_sources=HELDOUT_SOURCES,
    )
    chain = (*tick.head.champion.stages, added)
    return tick.head.promoted("promoted", chain, reason, timestamp())
