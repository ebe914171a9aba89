"""A tick's plan: what was found, what it means, what would be done and at what cost. A file that a person can read."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

from lifelong_moe.config.retraining.operation import LimitsConfig
from lifelong_moe.errors import StalePlanError
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.plan.retraining import Retraining
from lifelong_moe.retraining.decision import Action, decide
from lifelong_moe.retraining.drift import Drift
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.keys import SHORT, content_key
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import RunRecord, latest_timestamp, timestamp
from pipelines.retrain.drifting import drift_notes, has_drifted, look_at_batch, measure_batch, untested
from pipelines.retrain.plan_file import Decided, PlanFacts, Serving, StageFacts, read_plan
from pipelines.retrain.probes import probe, require_room_for, shortened, stage_facts
from pipelines.shared.novelty import NewDocuments
from pipelines.versions.candidates import Candidate, CandidateTrainer
from pipelines.versions.gating import predicted_power

VALID_DAYS = 7


@dataclass(frozen=True)
class TickPlan:
    """What one tick would do."""

    facts: PlanFacts
    """As written to the file."""
    candidate: Candidate | None
    """The stage to train; None to skip."""

    @property
    def action(self) -> Action:
        """What was decided."""
        return self.facts.decision.action

    def path(self, record: RunRecord) -> Path:
        """Where it is kept."""
        return plan_path(record, self.facts.batch)

    def write(self, record: RunRecord) -> None:
        """Keep it."""
        facts = json.dumps(self.facts.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomic(self.path(record), facts)


def make_plan(trainer: CandidateTrainer, new: NewDocuments, head: RunHead) -> TickPlan:
    """Measure drift, probe what is worth a probe, and decide.

    Args:
        trainer: Of the batch's candidates.
        new: Its documents.
        head: The run's; its versions say how often was promoted lately.
    """
    settings = trainer.retraining.settings
    grows = trainer.plan(None)
    seed = grows.config.seed
    with trainer.console.status(f"{trainer.new}: measuring drift"):
        drifts, nearest = measure_batch(trainer, grows, settings.drift, seed)
    continues = trainer.plan(nearest)
    drifted = has_drifted(drifts)
    ways = [trainer.plan(None, grow=way) for way in settings.probe.grow] or [grows]
    rooms = [_has_room(trainer.retraining, way) for way in ways]
    # What cannot be afforded is not probed either; of the cheapest way it is said why.
    growing = [way for way, room in zip(ways, rooms, strict=True) if drifted and room]
    probes = 1 + len(growing)
    limits = settings.limits
    over = {
        way.planned.key: _exceeded(limits, stage_facts(trainer, way), head, probes) for way in (continues, *growing)
    }
    affordable = [way for way in growing if not over[way.planned.key]]
    exceeded = [] if affordable or not over[continues.planned.key] else over[continues.planned.key]
    require_room_for(trainer, [*([] if over[continues.planned.key] else [continues]), *affordable])
    continued = None if over[continues.planned.key] else probe(trainer, continues, probes)
    decision = decide(
        continued=continued,
        grown=list(zip(_names(affordable), (probe(trainer, way, probes) for way in affordable), strict=True)),
        drifted=drifted,
        config=settings.decision,
        gate=settings.gate,
        untested=untested(drifts),
    )
    if decision.action == Action.skip and drifted and not affordable:  # no verdict on growing: the text stays open
        exceeded = over[growing[0].planned.key] if growing else [_full(settings.limits.experts)]
    chosen = continues if decision.action == Action.continue_ else None
    if decision.action == Action.grow:
        assert decision.way is not None
        chosen = affordable[decision.way]
    corpus = trainer.texts.corpora[trainer.new]
    notes = drift_notes([*corpus.train, *corpus.heldout], drifts)
    notes += _left_out(continues, *affordable)
    notes += [] if all(rooms) else [_full(settings.limits.experts)]
    notes += [f"{_way(way)} is not considered: {over[way.planned.key][0]}" for way in growing if way not in affordable]
    decided = Decided(decision.action, {**decision.terms}, [*notes, *decision.reasons])
    facts = _facts(trainer, new, drifts, decided, chosen, exceeded)
    power = None if chosen is None else predicted_power(trainer, shortened(trainer, chosen))
    looks = look_at_batch(trainer, settings.drift.documents, seed)
    return TickPlan(dataclasses.replace(facts, power=power, looks=looks), chosen)


def _way(grows: Candidate) -> str:
    """How a stage grows, in words."""
    generation = grows.planned.architecture.generations[-1]
    where = "" if generation.layers is None else f" in layers {', '.join(map(str, generation.layers))}"
    return f"Growing by {generation.experts} experts{where}"


def _names(ways: list[Candidate]) -> list[str]:
    """The ways to grow in words, with their settings where words are the same."""
    words = [_way(way) for way in ways]
    return [
        f"{name} ({json.dumps(dict(way.grow or {}))})" if words.count(name) > 1 else name
        for name, way in zip(words, ways, strict=True)
    ]


def _left_out(continues: Candidate, *growing: Candidate) -> list[str]:
    """What cannot be replayed or measured any more, a sentence each."""
    notes = continues.measurements.unmeasurable()
    for what, candidate in (("Continuing", continues), *(("Growing", way) for way in growing[:1])):
        gone = candidate.data.gone
        if lost := [name for name in stage_specs(candidate.config)[-1].uses if name in gone]:
            notes.append(f"{what} replays nothing of {', '.join(lost)}, as it would otherwise: the text is gone.")
    return notes


def _full(limit: int | None) -> str:
    return (
        f"Growing is not considered where a layer would have more than limits.experts={limit} experts. Raise the "
        f"limit, merge similar experts (lifelong-moe consolidate), or drop a stage that is no longer needed "
        f"(lifelong-moe drop)."
    )


def check_plan(path: Path, trainer: CandidateTrainer, new: NewDocuments) -> TickPlan:
    """Read a plan that was made before, and refuse it if it no longer fits.

    Raises:
        ConfigError: If there is no such plan.
        StalePlanError: If champion, batch or settings are others now, or it has expired.
    """
    facts = read_plan(path)
    old, stage = (facts.champion.key, facts.batch, facts.settings), facts.stage
    now = (trainer.champion.key, new.hash, settings_hash(trainer.retraining))
    for what, before, after in zip(("champion", "batch", "settings"), old, now, strict=True):
        if before != after:
            raise StalePlanError(f"{path}: made for {what} {before[:SHORT]}, which is {after[:SHORT]} now; plan again.")
    if facts.sources != new.sources:
        raise StalePlanError(f"{path}: made when the documents of its batch named other sources; plan again.")
    if facts.made_at > latest_timestamp():
        raise StalePlanError(f"{path}: made at {facts.made_at}, which is in the future; plan again.")
    if timestamp() > facts.expires:
        raise StalePlanError(f"{path}: expired at {facts.expires}; plan again.")
    candidate = None if stage is None else trainer.plan(stage.continues, grow=stage.grow)
    if stage is not None and candidate is not None and candidate.planned.key != stage.key:
        raise StalePlanError(f"{path}: its stage would be another one now; plan again.")
    return TickPlan(facts, candidate)


def plan_path(record: RunRecord, batch: str) -> Path:
    """Where a batch's plan is kept."""
    return record.path / "plans" / f"{batch[:SHORT]}.json"


def settings_hash(retraining: Retraining) -> str:
    """Of everything that a person configured."""
    return content_key([dataclasses.asdict(retraining.settings), retraining.raw()])


def _has_room(retraining: Retraining, grows: Candidate) -> bool:
    most = retraining.settings.limits.experts
    return most is None or grows.planned.architecture.num_experts <= most


def _facts(
    trainer: CandidateTrainer,
    new: NewDocuments,
    drifts: dict[str, Drift],
    decided: Decided,
    chosen: Candidate | None,
    exceeded: list[str],
) -> PlanFacts:
    settings, corpus = trainer.retraining.settings, trainer.texts.corpora[trainer.new]
    stage = None if chosen is None else stage_facts(trainer, chosen)
    return PlanFacts(
        run=trainer.retraining.run,
        made_at=timestamp(),
        expires=timestamp(time.time() + VALID_DAYS * 86400),
        champion=Serving(trainer.champion.id, trainer.champion.key),
        batch=new.hash,
        sources=new.sources,
        data=trainer.new,
        documents=len(corpus.train) + len(corpus.heldout),
        near_copies={"of_known_text": new.near_copies, "of_its_held_out_text": len(corpus.near_copies)},
        settings=settings_hash(trainer.retraining),
        drift=drifts,
        decision=decided,
        stage=stage,
        limits=dataclasses.asdict(settings.limits),
        exceeded=exceeded,
        gate=dataclasses.asdict(settings.gate),
        reads=[stage.key for stage in trainer.champion.stages],
        stages=[] if stage is None else [stage.key],
    )


def _exceeded(limits: LimitsConfig, stage: StageFacts, head: RunHead, probes: int) -> list[str]:
    week = timestamp(time.time() - 7 * 86400)
    lately = sum(v.kind == "promoted" and v.at > week for v in head.versions_until(latest_timestamp()))
    needed = {
        "tokens": stage.tokens_spent(probes),
        "hours": stage.hours_spent(probes),
        "disk_bytes": stage.disk_bytes,
        "promotions_per_week": lately + 1,
    }
    found = {key: (value, getattr(limits, key)) for key, value in needed.items()}
    return [
        f"limits.{key}={limit} would be exceeded: {value:g}."
        for key, (value, limit) in found.items()
        if limit is not None and value is not None and value > limit
    ]
