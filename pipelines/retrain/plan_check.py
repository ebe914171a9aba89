"""Check a plan that is to be carried out: whoever wrote or edited its file, it allows what the configuration allows.

What follows from the configuration, the batch and the champion is computed again and compared. The choice between the
actions that they allow stays the file's: it is what a person approves.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from lifelong_moe.errors import StalePlanError
from lifelong_moe.retraining.decision import Action
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.store.runs import OpenRun, RunRecord, latest_timestamp, timestamp
from pipelines.retrain.plan import VALID_DAYS, TickPlan, exceeded_limits, no_room, plan_facts, why_fixed
from pipelines.retrain.plan_file import PlanFacts, read_plan, settings_hash
from pipelines.retrain.probes import stage_facts
from pipelines.shared.novelty import NewDocuments
from pipelines.versions.candidates import Candidate, CandidateTrainer

_COMPUTED = ("run", "data", "documents", "near_copies", "limits", "gate", "exceeded", "reads", "stages")
"""Fields of a plan's file that must be as they would be now; ``stage`` is compared field by field."""


def check_plan(path: Path, trainer: CandidateTrainer, new: NewDocuments, run: OpenRun) -> TickPlan:
    """Read a plan and refuse it if it is stale, or allows what the configuration does not.

    Args:
        path: Its file.
        trainer: Of the batch's candidates.
        new: The batch's documents.
        run: The run, whose ledger says when the batch was planned.

    Raises:
        ConfigError: If there is no such plan.
        StalePlanError: Naming what has changed or differs, or saying that it has expired.
    """
    facts = read_plan(path)
    old = (facts.champion.key, facts.batch, facts.settings)
    now = (trainer.champion.key, new.hash, settings_hash(trainer.retraining))
    for what, before, after in zip(("champion", "batch", "settings"), old, now, strict=True):
        if before != after:
            raise StalePlanError(f"{path}: made for {what} {before[:SHORT]}, which is {after[:SHORT]} now; plan again.")
    if facts.sources != new.sources:
        raise StalePlanError(f"{path}: made when the documents of its batch named other sources; plan again.")
    _require_recent(path, facts, run.record)
    candidate = _candidate(path, facts, trainer)
    _require_within_limits(path, facts, candidate, trainer, run)
    again = plan_facts(trainer, new, facts.drift, facts.decision, candidate, [] if candidate else facts.exceeded)
    for name in _COMPUTED:
        _require_same(path, name, getattr(facts, name), getattr(again, name))
    for field in dataclasses.fields(facts.stage) if facts.stage else ():
        _require_same(path, f"stage.{field.name}", getattr(facts.stage, field.name), getattr(again.stage, field.name))
    return TickPlan(facts, candidate)


def _require_recent(path: Path, facts: PlanFacts, record: RunRecord) -> None:
    """Require that the plan was made within ``VALID_DAYS``, by its own word and by the run's ledger."""
    if facts.made_at > latest_timestamp():
        raise StalePlanError(f"{path}: made at {facts.made_at}, which is in the future; plan again.")
    if timestamp() > facts.expires:
        raise StalePlanError(f"{path}: expired at {facts.expires}; plan again.")
    # Whoever edits the file can give it any date, so the ledger says when a tick last planned this batch.
    ticks = zip(record.logged("tick", "time"), record.logged("tick", "batch"), strict=True)
    planned = max((at for at, batch in ticks if batch == facts.batch and isinstance(at, str)), default=None)
    if planned is None:
        raise StalePlanError(f"{path}: no tick of run={record.run} has planned this batch; plan again.")
    if (made_at := min(facts.made_at, planned)) < timestamp(time.time() - VALID_DAYS * 86400):
        raise StalePlanError(f"{path}: made at {made_at}, over {VALID_DAYS} days ago; plan again.")


def _candidate(path: Path, facts: PlanFacts, trainer: CandidateTrainer) -> Candidate | None:
    """The candidate that the plan would train, if the configuration has such a one; None to train nothing."""
    stage, action = facts.stage, facts.decision.action
    trains = [] if stage is None else [Action.grow if stage.continues is None else Action.continue_]
    if action not in (trains or [Action.skip, Action.wait]):
        raise StalePlanError(f"{path}: decision.action={action} does not fit its stage; plan again.")
    if stage is None:
        return None
    known = [one.name for one in trainer.champion.stages]
    if stage.continues is not None and stage.continues not in known:
        raise StalePlanError(f"{path}: stage.continues={stage.continues} is no stage of the champion; plan again.")
    # Only what `probe.grow` says; without it, and where a stage continues, the configured settings as they are.
    ways = [*trainer.retraining.settings.probe.grow] if action == Action.grow else []
    if stage.grow not in ways if ways else stage.grow is not None:
        raise StalePlanError(f"{path}: stage.grow={stage.grow} is no way of probe.grow; plan again.")
    candidate = trainer.plan(stage.continues, grow=stage.grow)
    # The key covers all that the stage depends on, such as the text that it replays.
    if candidate.planned.key != stage.key:
        raise StalePlanError(f"{path}: its stage would be another one now; plan again.")
    return candidate


def _require_within_limits(
    path: Path, facts: PlanFacts, candidate: Candidate | None, trainer: CandidateTrainer, run: OpenRun
) -> None:
    """Require that the stage exceeds no limit as it is now."""
    if candidate is None:
        return
    limits = trainer.retraining.settings.limits
    # At least these probes were made: the one that continues, where all experts can, and the one of a way to grow.
    continued = not any(why_fixed(trainer, one.stage) for one in trainer.architecture.generations)
    probes = 1 + (facts.decision.action == Action.grow and continued)
    found = exceeded_limits(limits, stage_facts(trainer, candidate), run.head, probes)
    experts = candidate.planned.architecture.num_experts
    if facts.decision.action == Action.grow and limits.experts is not None and experts > limits.experts:
        found.append(no_room(limits.experts))
    if found:
        raise StalePlanError(f"{path}: {found[0]} Plan again.")


def _require_same(path: Path, name: str, before: object, after: object) -> None:
    if before != after:
        raise StalePlanError(f"{path}: {name} is {before} there and {after} by the configuration; plan again.")
