"""A tick's plan: findings, decision, and the stage to train with its cost; kept as a readable JSON file."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

from lifelong_moe.config.retraining.operation import LimitsConfig
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.retraining.decision import Action, Decision, decide
from lifelong_moe.retraining.drifted import Drift
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import RunRecord, latest_timestamp, timestamp
from pipelines.retrain.drifting import drift_notes, has_drifted, look_at_batch, measure_batch, untested
from pipelines.retrain.plan_file import Decided, PlanFacts, Serving, StageFacts, as_written, plan_path, settings_hash
from pipelines.retrain.probes import probe, require_room_for, shortened, stage_facts
from pipelines.shared.novelty import NewDocuments
from pipelines.versions.candidates import Candidate, CandidateTrainer
from pipelines.versions.gating import predicted_power

# Older ones are refused: the machine's speed, the disk and the week of limits.promotions_per_week have moved on.
VALID_DAYS = 7
"""Days for which a plan can be carried out."""


@dataclass(frozen=True)
class TickPlan:
    """A plan, with the candidate that it would train."""

    facts: PlanFacts
    """Contents of the plan's file."""
    candidate: Candidate | None
    """The stage to train; None to train nothing."""

    @property
    def action(self) -> Action:
        """The decision."""
        return self.facts.decision.action

    def path(self, record: RunRecord) -> Path:
        """Path of its file."""
        return plan_path(record, self.facts.batch)

    def write(self, record: RunRecord) -> None:
        """Write its file."""
        facts = json.dumps(self.facts.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomic(self.path(record), facts)


def make_plan(trainer: CandidateTrainer, new: NewDocuments, head: RunHead) -> TickPlan:
    """Measure drift, probe the affordable candidates, and decide.

    Args:
        trainer: Of the batch's candidates.
        new: The batch's documents.
        head: Of the run; its versions say how many promotions there were in the last week.
    """
    settings = trainer.retraining.settings
    grows = trainer.plan(None)
    seed = grows.config.seed
    with trainer.console.status(f"{trainer.new}: measuring drift"):
        drifts, nearest = measure_batch(trainer, grows, settings.drift, seed)
    fixed = why_fixed(trainer, nearest)
    options = _options(trainer, None if fixed else trainer.plan(nearest), grows, has_drifted(drifts), head)
    require_room_for(trainer, [*options.continuing, *options.affordable])
    decision = _decide(trainer, options, drifts)
    chosen = options.chosen(decision)
    corpus = trainer.texts.corpora[trainer.new]
    # Where nothing can train on, growing is considered whatever the drift is.
    notes = drift_notes([*corpus.train, *corpus.heldout], {} if fixed else drifts)
    notes += [f"Continuing is not considered, and growing takes its place: {fixed}."] if fixed else []
    notes += grows.measurements.unmeasurable() + _lost_text(options)
    notes += _not_considered(options)
    terms = {**decision.terms, "drifted": float(options.drifted)}
    decided = Decided(decision.action, {**terms}, [*notes, *decision.reasons])
    facts = plan_facts(trainer, new, drifts, decided, chosen, options.exceeded(decision))
    power = None if chosen is None else predicted_power(trainer, shortened(trainer, chosen))
    looks = look_at_batch(trainer, settings.drift.documents, seed)
    return TickPlan(dataclasses.replace(facts, power=power, looks=looks), chosen)


@dataclass(frozen=True)
class _Options:
    """Candidates of a tick, and what the limits forbid."""

    drifted: bool
    continues: Candidate | None
    """None if those experts cannot train on."""
    growing: list[Candidate]
    """Ways to grow that ``limits.experts`` allows; none where growing is not considered."""
    over: dict[str, list[str]]
    """Sentences on exceeded limits, by key of the candidate's stage."""
    full: list[str]
    """A sentence, if ``limits.experts`` forbids a way to grow."""

    @property
    def wants_growth(self) -> bool:
        """Whether growing is considered: the text drifted, or there is nothing that could train on."""
        return self.drifted or self.continues is None

    @property
    def continuing(self) -> list[Candidate]:
        """The candidate that continues, if it is affordable."""
        return [] if self.continues is None or self.over[self.continues.planned.key] else [self.continues]

    @property
    def affordable(self) -> list[Candidate]:
        """Ways to grow within all limits."""
        return [way for way in self.growing if not self.over[way.planned.key]]

    @property
    def probes(self) -> int:
        """Number of probes that the estimates of cost count."""
        return (self.continues is not None) + len(self.growing)

    def chosen(self, decision: Decision) -> Candidate | None:
        """The candidate to train; None to train nothing."""
        if decision.action == Action.continue_:
            return self.continues
        if decision.action == Action.grow:
            assert decision.way is not None
            return self.affordable[decision.way]
        return None

    def exceeded(self, decision: Decision) -> list[str]:
        """Why the limits, and not the probes, made the decision; empty if they did not."""
        # Nothing was said of growing, for which the text calls: it stays open until a limit is raised.
        if decision.action == Action.skip and self.wants_growth and not self.affordable:
            return self.over[self.growing[0].planned.key] if self.growing else self.full
        return [] if self.affordable or self.continues is None else self.over[self.continues.planned.key]


def why_fixed(trainer: CandidateTrainer, stage: str) -> str | None:
    """Why the experts of a generation cannot train on, in words; None if they can."""
    if stage not in {one.name for one in trainer.champion.stages}:
        return "the nearest experts are the checkpoint's, which stay as they came"
    return trainer.architecture.why_fixed(stage)


def _options(
    trainer: CandidateTrainer, continues: Candidate | None, grows: Candidate, drifted: bool, head: RunHead
) -> _Options:
    """The candidates, with what each would exceed."""
    settings = trainer.retraining.settings
    limits = settings.limits
    ways = [trainer.plan(None, grow=way) for way in settings.probe.grow] or [grows]
    rooms = [limits.experts is None or way.planned.architecture.num_experts <= limits.experts for way in ways]
    wanted = drifted or continues is None
    growing = [way for way, room in zip(ways, rooms, strict=True) if wanted and room]
    tried = [*filter(None, [continues]), *growing]
    # What cannot be afforded is not probed either.
    over = {way.planned.key: exceeded_limits(limits, stage_facts(trainer, way), head, len(tried)) for way in tried}
    return _Options(drifted, continues, growing, over, [] if all(rooms) else [no_room(limits.experts)])


def exceeded_limits(limits: LimitsConfig, stage: StageFacts, head: RunHead, probes: int) -> list[str]:
    """The limits that a stage and its probes would exceed, a sentence each."""
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


def no_room(limit: int | None) -> str:
    """The sentence on a way to grow that ``limits.experts`` forbids."""
    return (
        f"Growing is not considered where a layer would have more than limits.experts={limit} experts. Raise the "
        f"limit, merge similar experts (lifelong-moe consolidate), or drop a stage that is no longer needed "
        f"(lifelong-moe drop)."
    )


def _decide(trainer: CandidateTrainer, options: _Options, drifts: dict[str, Drift]) -> Decision:
    """Run the probes and choose an action."""
    settings = trainer.retraining.settings
    continued = [probe(trainer, one, options.probes) for one in options.continuing]
    grown = [probe(trainer, way, options.probes) for way in options.affordable]
    return decide(
        continued=continued[0] if continued else None,
        grown=list(zip(_names(options.affordable), grown, strict=True)),
        drifted=options.wants_growth,
        config=settings.decision,
        gate=settings.gate,
        untested=untested(drifts),
    )


def _names(ways: list[Candidate]) -> list[str]:
    """The ways to grow in words, with their settings where the words are the same."""
    words = [_way(way) for way in ways]
    return [
        f"{name} ({json.dumps(dict(way.grow or {}))})" if words.count(name) > 1 else name
        for name, way in zip(words, ways, strict=True)
    ]


def _way(grows: Candidate) -> str:
    """A way to grow in words."""
    generation = grows.planned.architecture.generations[-1]
    where = "" if generation.layers is None else f" in layers {', '.join(map(str, generation.layers))}"
    return f"Growing by {generation.experts} experts{where}"


def _lost_text(options: _Options) -> list[str]:
    """Text that can no longer be replayed, a sentence each."""
    notes = []
    continuing = [("Continuing", one) for one in filter(None, [options.continues])]
    for what, candidate in (*continuing, *(("Growing", way) for way in options.affordable[:1])):
        gone = candidate.data.gone
        if lost := [name for name in stage_specs(candidate.config)[-1].uses if name in gone]:
            notes.append(f"{what} replays nothing of {', '.join(lost)}, as it would otherwise: the text is gone.")
    return notes


def _not_considered(options: _Options) -> list[str]:
    """Ways to grow that a limit forbids, a sentence each."""
    forbidden = [way for way in options.growing if way not in options.affordable]
    return options.full + [f"{_way(way)} is not considered: {options.over[way.planned.key][0]}" for way in forbidden]


def plan_facts(
    trainer: CandidateTrainer,
    new: NewDocuments,
    drifts: dict[str, Drift],
    decided: Decided,
    chosen: Candidate | None,
    exceeded: list[str],
) -> PlanFacts:
    """Everything that the plan's file says, but for power and looks."""
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
        gate=as_written(settings.gate),
        # Garbage collection keeps these while the plan is there.
        reads=[stage.key for stage in trainer.champion.stages],
        stages=[] if stage is None else [stage.key],
    )
