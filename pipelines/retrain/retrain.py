"""`lifelong-moe retrain`: one tick. Look, measure drift, decide, plan, train, gate, promote or reject, and say so.

Idempotent: stages, probes and measurements are found by their content, a batch by its documents. A tick that was
killed is done again by the next one, which does again only what was not committed.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lifelong_moe.config.data import KeepText
from lifelong_moe.config.load import written_config
from lifelong_moe.data.tokens.prepare import Texts
from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.retraining import load_retraining
from lifelong_moe.retraining.bounds import LEAST_SOURCES
from lifelong_moe.retraining.decision import Action
from lifelong_moe.storage.locks import locked
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import RunRecord, latest_timestamp, require_head, timestamp
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.store.versions import Action as StageAction
from lifelong_moe.store.versions import VersionStage
from lifelong_moe.tracking.tracker import Tracker
from lifelong_moe.training.callbacks.interrupt import Interrupt, handling_sigterm
from lifelong_moe.training.loop.trainer import build_trainer
from pipelines.retrain.plan import TickPlan, check_plan, make_plan
from pipelines.retrain.plan_file import PlanFacts, read_plan, refuse_idle_plan
from pipelines.retrain.record import TickRecord
from pipelines.retrain.render import print_plan
from pipelines.retrain.tick import Tick, split_of
from pipelines.retrain.waiting import waits_still
from pipelines.shared.kept_text import with_texts
from pipelines.shared.novelty import NewDocuments, new_documents, read_texts
from pipelines.shared.places import ROOT, remove_abandoned
from pipelines.shared.recorded import show_champion
from pipelines.versions.candidates import CandidateTrainer, batch_files, model_loader
from pipelines.versions.drop import with_versions
from pipelines.versions.gating import best_losses, gate, updated_best
from pipelines.versions.render import print_verdict


def retrain(
    config_path: str,
    overrides: list[str],
    dry_run: bool,
    plan_path: str | None,
    console: Console,
    reopen: str | None = None,
) -> dict[str, Any]:
    """Do one tick; returns its outcome.

    Args:
        config_path: Retraining file.
        overrides: ``key=value``, for it or for its base.
        dry_run: Write and print the plan, and stop.
        plan_path: A plan that a dry run wrote, to be carried out as it stands.
        console: Where people read.
        reopen: Name, or beginning of the hash, of a skipped or rejected batch to look at again.

    Raises:
        ConfigError: If the configuration is wrong, or the run does not exist.
        DataError: If the inbox holds something unusable.
        StalePlanError: If the plan no longer fits.
        TryAgainError: If another process works on the run, or SIGTERM came.
    """
    retraining = load_retraining(config_path, overrides)
    require_head(ROOT, retraining.run)  # a mistake is told before a lock is made
    if plan_path is not None:
        read_plan(Path(plan_path))
    with handling_sigterm() as interrupt:
        record, store = RunRecord(ROOT, retraining.run), StageStore(ROOT)
        with locked(record.lock_path, f"run {record.run}"):
            remove_abandoned()
            head = with_versions(store, require_head(ROOT, record.run))
            tick = Tick(retraining, record, head, console)
            try:
                build_trainer(tick.config.trainer, 1)  # what this machine cannot do is said before all else
                if not dry_run:
                    tick.remove_text(working=True)  # of a tick that was killed
                if reopen is not None:
                    tick.reopen(reopen)
                return _tick(tick, interrupt, dry_run, plan_path)
            except Exception as error:
                if not dry_run:
                    tick.fail(error)
                raise
            finally:
                if not dry_run or retraining.settings.inbox.keep_text == KeepText.always:  # then only its note goes
                    tick.remove_text()


def _tick(tick: Tick, interrupt: Interrupt, dry_run: bool, plan_path: str | None) -> dict[str, Any]:
    with tick.console.status("looking at the inbox"):
        texts = read_texts(tick.config, tick.known)
        new = new_documents(tick.retraining.settings.inbox, texts, tick.head.batches, tick.batches)
    if new.known:
        tick.console.print(f"{new.known:,} documents in the inbox were seen before, or repeat others", highlight=False)
    copies = f"{new.near_copies:,} documents in the inbox are near copies of text seen before"
    if new.near_copies:
        tick.console.print(f"{copies}, and are left out", highlight=False)
    if not new.documents:
        refuse_idle_plan(plan_path, "nothing is new")
        return _idle(tick, "nothing new has arrived" + (f"; {copies}" if new.near_copies else ""))
    believed = tick.head.versions_until(latest_timestamp())
    for version in tick.head.versions:
        if version not in believed:
            tick.console.print(
                f"Version {version.id} is dated {version.at}, which is in the future: a clock was ahead. It counts "
                f"neither for trigger.max_days nor for limits.promotions_per_week.",
                highlight=False,
            )
    if (waiting := _waiting(tick, new)) is not None:
        refuse_idle_plan(plan_path, waiting)
        return _idle(tick, waiting)
    if plan_path is None and not dry_run:
        before = waits_still(tick, new)
        if before is not None:
            _show_champion(tick)
            return tick.end("waiting", _reason(before), batch=before.batch, data=before.data)
    trainer = _candidate_trainer(tick, new, texts, interrupt)
    mlflow = TickRecord(Tracker.connect(tick.config.tracking, ROOT), tick)
    try:
        mlflow.begin(new.name, new.hash, trainer.texts.corpora[new.name], tick.retraining.settings)
        if plan_path is None:
            plan = make_plan(trainer, new, tick.head)
            plan.write(tick.record)
        else:
            plan = check_plan(Path(plan_path), trainer, new)
        print_plan(tick.console, plan.facts)
        mlflow.planned(plan.facts, plan.candidate)
        return _carry_out(tick, trainer, new, plan, mlflow, dry_run)
    except BaseException as error:
        mlflow.ended_by(error)
        raise


def _idle(tick: Tick, reason: str) -> dict[str, Any]:
    """Nothing to do but to set MLflow right."""
    _show_champion(tick)
    return tick.end("idle", reason)


def _show_champion(tick: Tick) -> None:
    """Tell MLflow what it missed, and who serves."""
    tracker = Tracker.connect(tick.config.tracking, ROOT)
    if tracker.connected:
        show_champion(tick.head, tracker)


def _reason(facts: PlanFacts) -> str:
    """A plan's last word, why nothing is trained."""
    return facts.decision.reasons[-1].removeprefix("Skip: ").removeprefix("Wait: ").rstrip(".")


def _waiting(tick: Tick, new: NewDocuments) -> str | None:
    """Why this is not enough yet; None if it is."""
    trigger = tick.retraining.settings.trigger
    if len(new.documents) < trigger.least_documents:
        return f"{len(new.documents)} new documents are waiting; trigger.least_documents={trigger.least_documents}"
    # At most half of the sources are held out.
    if (sources := len({document.source for document in new.documents})) < 2 * LEAST_SOURCES:
        return f"{len(new.documents)} new documents are of {sources} source(s); {2 * LEAST_SOURCES} are needed"
    tokens = tick.count_tokens(new.documents)
    oldest = timestamp(time.time() - 86400 * trigger.max_days) if trigger.max_days is not None else ""
    newest = max((version.at for version in tick.head.versions_until(latest_timestamp())), default="")
    if tokens >= trigger.min_tokens or newest < oldest:
        return None
    return f"{tokens:,} new tokens are waiting; trigger.min_tokens={trigger.min_tokens:,}"


def _candidate_trainer(tick: Tick, new: NewDocuments, texts: Texts, interrupt: Interrupt) -> CandidateTrainer:
    """Keep the batch, and check that what it follows still is what the champion was trained on.

    Raises:
        ConfigError: If a distribution's text is another now.
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
    tick.open_batch(new.hash)
    tick.batches.add(new.documents, new.files)
    files, load = batch_files(new.hash, new.sources), model_loader(tick.store, tick.config.trainer)
    return CandidateTrainer(
        tick.retraining, now, new.name, files, tick.known, tick.store, interrupt, tick.console, load
    )


def _carry_out(
    tick: Tick, trainer: CandidateTrainer, new: NewDocuments, plan: TickPlan, mlflow: TickRecord, dry_run: bool
) -> dict[str, Any]:
    """From the plan to the outcome."""
    about: dict[str, Any] = {
        "batch": new.hash,
        "data": new.name,
        "action": plan.action.value,
        "plan": str(plan.path(tick.record)),
    }
    about["near_copies"] = plan.facts.near_copies
    stage, judged = None, None
    if dry_run:
        outcome, reason = "planned", f"{plan.action} is what a tick would do now"
    elif plan.facts.exceeded:
        outcome, reason = "over budget", plan.facts.exceeded[0].rstrip(".")
    elif plan.candidate is None:
        outcome, reason = "waiting" if plan.action == Action.wait else "skipped", _reason(plan.facts)
    else:
        stage = trainer.train(plan.candidate, mlflow.curves, mlflow.run_id)
        tick.trained(stage)
        mlflow.candidate(stage, plan.facts)
        best = best_losses(trainer, plan.candidate, tick.head.best)
        judged = gate(trainer, plan.candidate, stage, best)
        print_verdict(tick.console, judged)
        mlflow.judged(judged)
        outcome = "promoted" if judged.passed else "waiting" if judged.is_open else "rejected"
        reason = (judged.checks[0].sentence if judged.passed else judged.reasons[0]).rstrip(".")
        about["candidate"], measured = stage.key, plan.candidate.measurements
        best = updated_best(measured, stage, best, measured.measurable()) if judged.passed else best
        tick.head = replace(tick.head, best=best)
    if outcome in ("skipped", "promoted", "rejected"):
        tick.settle(new, outcome, reason)
    elif outcome == "waiting":
        tick.head = replace(tick.head, waiting=new.hash)
        if judged is not None:
            plan = replace(plan, facts=plan.facts.postponed(f"{reason}."))
            plan.write(tick.record)
    if outcome == "promoted":
        assert stage is not None and plan.candidate is not None
        kept = plan.candidate.config.evaluate.keep_heldout
        tick.head = with_texts(tick.head, written_config(tick.retraining.base), plan.candidate.data, kept)
        tick.head = _promotion(tick, stage, new, plan, reason)
    result = tick.end(outcome, reason, **about)
    mlflow.done(result, plan.facts, judged)
    return result


def _promotion(tick: Tick, stage: CommittedStage, new: NewDocuments, plan: TickPlan, reason: str) -> RunHead:
    """The head with the candidate serving."""
    action: StageAction = "grow" if plan.action == Action.grow else "continue"
    split = split_of(tick.retraining)
    added = VersionStage(
        name=stage.name, key=stage.key, data=new.name, action=action, batch=new.hash, sources=new.sources, **split
    )
    chain = (*tick.head.champion.stages, added)
    return tick.head.promoted("promoted", chain, reason, timestamp())
