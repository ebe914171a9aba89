"""A tick that has something to do: a batch of new documents, from its plan to its outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lifelong_moe.config.load import written_config
from lifelong_moe.config.retraining.policy import HELDOUT_SOURCES, PromoteRule
from lifelong_moe.data.tokens.texts import Texts
from lifelong_moe.errors import ConfigError
from lifelong_moe.retraining.checks import Verdict
from lifelong_moe.retraining.decision import Action
from lifelong_moe.store.runs import timestamp
from lifelong_moe.store.stages import CommittedStage
from lifelong_moe.store.ticks import BestLoss
from lifelong_moe.store.versions import Action as StageAction
from lifelong_moe.store.versions import VersionStage
from lifelong_moe.tracking.tracker import Tracker
from lifelong_moe.training.callbacks.interrupt import Interrupt
from pipelines.retrain.outcome import AWAITING, TickOutcome, awaiting
from pipelines.retrain.plan import TickPlan, make_plan
from pipelines.retrain.plan_check import check_plan
from pipelines.retrain.plan_file import PlanFacts
from pipelines.retrain.record import TickRecord
from pipelines.retrain.render import print_plan
from pipelines.retrain.tick import Tick
from pipelines.retrain.waiting import Offered, still_waiting
from pipelines.shared.kept_text import with_texts
from pipelines.shared.novelty import NewDocuments
from pipelines.shared.places import ROOT
from pipelines.versions.candidates import Candidate, CandidateTrainer, model_loader
from pipelines.versions.gating import best_losses, gate, require_slices, updated_best
from pipelines.versions.render import print_verdict
from pipelines.versions.served import batch_files


def carry_out(
    tick: Tick, texts: Texts, new: NewDocuments, interrupt: Interrupt, plan_path: str | None, *, dry_run: bool
) -> TickOutcome:
    """Plan, train, gate, promote or reject; arguments and errors as for :func:`pipelines.retrain.retrain.retrain`."""
    # A dry run always looks, and a plan is carried out or refused as stale.
    if plan_path is None and not dry_run and (before := _still_waiting(tick, new)) is not None:
        tick.tell_champion()
        return tick.end(before)
    require_slices(tick.retraining.settings.gate, texts.heldout)
    trainer = _candidate_trainer(tick, new, texts, interrupt)
    mlflow = TickRecord(Tracker.connect(tick.config.tracking, ROOT), tick)
    try:
        corpus = trainer.texts.corpora[new.name]
        mlflow.begin(new.name, new.hash, corpus, tick.retraining.settings, tick.bad_lines or 0)
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


def _still_waiting(tick: Tick, new: NewDocuments) -> TickOutcome | None:
    documents = {document.hash: document for document in new.documents}
    offered = Offered(new.hash, new.sources, {digest: document.source for digest, document in documents.items()})
    return still_waiting(tick, offered, lambda joined: sum(tick.tokens_of([documents[one] for one in joined])))


def _candidate_trainer(tick: Tick, new: NewDocuments, texts: Texts, interrupt: Interrupt) -> CandidateTrainer:
    """Keep the batch, and return the trainer of its candidates.

    Raises:
        ConfigError: If a distribution's text is no longer the one that its stage was trained on.
    """
    now = tick.head.champion
    for stage in now.stages:
        split = tick.store.get(stage.key).split
        for name in (stage.data, *stage.mixed):
            known, corpus = split.get(name), texts.corpora.get(name)
            if corpus is not None and known is not None and known != (found := corpus.split_hash):
                raise ConfigError(
                    f"distributions.{name}: its training text is {found[:16]}, but stage {stage.name} was trained on "
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
    ended, stage, verdict, best = _without_training(plan, dry_run), None, None, tick.head.best
    if ended is None:
        assert plan.candidate is not None
        stage, verdict, best = _train_and_judge(tick, trainer, plan.candidate, plan.facts, mlflow)
        ended = _after_gate(verdict, tick)
    if ended.outcome in ("skipped", "promoted", "rejected", AWAITING):
        tick.settle(new, ended.outcome, ended.reason)
    elif ended.outcome == "waiting":
        tick.head = replace(tick.head, waiting=new.hash)
        if verdict is not None:
            # Rewritten, so that the next tick finds a plan that waits and does not train the stage again.
            plan = replace(plan, facts=plan.facts.postponed(f"{ended.reason}."))
            plan.write(tick.record)
    if ended.outcome in ("promoted", AWAITING):
        assert stage is not None and verdict is not None and plan.candidate is not None
        kept = plan.candidate.config.evaluate.keep_heldout
        tick.head = with_texts(tick.head, written_config(tick.retraining.base), plan.candidate.data, kept)
        chain, reason = _chain(tick, stage, new, plan.action), _why(verdict)
        if ended.outcome == "promoted":
            tick.store.sign(stage.key, tick.head.centroids)
            tick.head = replace(tick.head.promoted("promoted", chain, reason, timestamp()), best=best)
        else:
            tick.head = tick.head.with_candidate(chain, reason, timestamp(), best)
    ended = replace(
        ended,
        batch=new.hash,
        data=new.name,
        action=plan.action.value,
        plan=str(plan.path(tick.record)),
        near_copies=plan.facts.near_copies,
        candidate=None if stage is None else stage.key,
        version=tick.head.versions[-1].id if ended.outcome == AWAITING else None,
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
        return TickOutcome("waiting" if plan.action == Action.wait else "skipped", plan.facts.last_reason)
    return None


def _train_and_judge(
    tick: Tick, trainer: CandidateTrainer, candidate: Candidate, facts: PlanFacts, mlflow: TickRecord
) -> tuple[CommittedStage, Verdict, Mapping[str, BestLoss]]:
    """Train the candidate and take it through the gate.

    Returns:
        The stage, what the gate says, and the lowest losses once it serves.
    """
    stage = trainer.train(candidate, mlflow.curves, mlflow.run_id)
    tick.trained(stage)
    mlflow.candidate(stage, facts)
    before = best_losses(trainer, candidate, tick.head.best)
    verdict = gate(trainer, candidate, stage, before)
    print_verdict(tick.console, verdict)
    mlflow.judged(verdict)
    # Only a version that serves raises the bar for later ones; what a rejected candidate reached does not count.
    measurements, after = candidate.measurements, before
    if verdict.passed:
        after = updated_best(measurements, stage, before, measurements.measurable())
    tick.head = replace(tick.head, best=before)
    return stage, verdict, after


def _why(verdict: Verdict) -> str:
    """What decided, in words."""
    return (verdict.checks[0].sentence if verdict.passed else verdict.reasons[0]).rstrip(".")


def _after_gate(verdict: Verdict, tick: Tick) -> TickOutcome:
    if verdict.passed and tick.retraining.settings.promote == PromoteRule.manual:
        return TickOutcome(AWAITING, awaiting(tick.record.run, len(tick.head.versions)))
    return TickOutcome("promoted" if verdict.passed else "waiting" if verdict.is_open else "rejected", _why(verdict))


def _chain(tick: Tick, stage: CommittedStage, new: NewDocuments, decided: Action) -> tuple[VersionStage, ...]:
    """The stages of the candidate's version."""
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
    return (*tick.head.champion.stages, added)
