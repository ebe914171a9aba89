"""Short versions of a tick's candidates: what they show, and what the stages that they stand for would cost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from lifelong_moe.plan.cost import count_parameters, training_flops
from lifelong_moe.plan.stages import stage_need
from lifelong_moe.retraining.bounds import difference_bounds
from lifelong_moe.retraining.decision import ProbeResult
from lifelong_moe.retraining.gate import forgetting_bounds
from lifelong_moe.retraining.pooling import pooled_losses
from pipelines.retrain.plan_file import StageFacts
from pipelines.shared.workspace import require_room
from pipelines.versions.candidates import Candidate, CandidateTrainer
from pipelines.versions.gating import kinds_of_text, old_losses

PROBE_LEVEL = 0.05
PROBE_RESAMPLES = 2000


def probe_tokens(trainer: CandidateTrainer, candidate: Candidate) -> int:
    """Tokens of a candidate's probe: ``probe.fraction`` of the stage's in whole steps, two at least."""
    fraction, batch_tokens = trainer.retraining.settings.probe.fraction, candidate.planned.spec.optim.batch_tokens
    return max(2, round(fraction * candidate.planned.tokens / batch_tokens)) * batch_tokens


def shortened(trainer: CandidateTrainer, candidate: Candidate) -> Candidate:
    """The candidate's probe: the same stage on fewer tokens."""
    return trainer.plan(candidate.planned.spec.continues, probe_tokens(trainer, candidate), candidate.grow)


def require_room_for(trainer: CandidateTrainer, candidates: list[Candidate]) -> None:
    """All probes, and then any of the candidates, must fit on the disk."""
    for candidate in candidates:
        stages = [*(shortened(trainer, one).planned for one in candidates), candidate.planned]
        todo = [stage for stage in stages if trainer.store.find(stage.key) is None]
        require_room(todo, candidate.config)


def probe(trainer: CandidateTrainer, candidate: Candidate, probes: int) -> ProbeResult:
    """Train a short version of a candidate, one of so many, and hold it against the champion."""
    short = shortened(trainer, candidate)
    stage = trainer.train(short, lambda points: None, None)
    seed, new, before = short.config.seed, trainer.new, trainer.parent

    def lost(name: str, **kinds: bool) -> Any:
        after = short.measurements.losses(stage.key, name, **kinds)
        other = short.measurements.losses(stage.key if kinds else before.key, name)
        return difference_bounds(after, other, level=PROBE_LEVEL, resamples=PROBE_RESAMPLES, seed=seed)

    gain = -lost(new)
    kinds, level = kinds_of_text(trainer.champion, trainer.store), trainer.retraining.settings.gate.level
    losses = old_losses(trainer, short, stage)
    forgotten = forgetting_bounds(*losses, kinds=kinds, level=level, resamples=PROBE_RESAMPLES, seed=seed)
    # Any of them rules an action out, and one of many looks bad by chance: for that the level is divided.
    each = level / max(1, len(forgotten))
    least = [
        difference_bounds(
            *(pooled_losses(side, pool) for side in losses), level=each, resamples=PROBE_RESAMPLES, seed=seed
        ).lower
        for pool in forgotten
    ]
    old, structure = count_parameters(trainer.architecture).total, lost(new, shuffled=True)
    return ProbeResult(
        gain=gain.mean,
        gain_lower=gain.lower,
        gain_upper=gain.upper,
        structure=structure.lower,
        structure_upper=structure.upper,
        forgetting=_largest(one.upper for one in forgotten.values()),
        forgetting_lower=_largest(least),
        leak=_largest(trainer.leak(stage, short, name) for name in short.measurements.measurable(without=new)),
        parameters_fraction=(candidate.planned.parameters.total - old) / old,
        cost_fraction=_cost_fraction(trainer, candidate, probes),
    )


def _largest(values: Iterable[float]) -> float:
    """The largest, or NaN if one is; 0 of none."""
    return max(values, key=lambda value: (math.isnan(value), value), default=0.0)


def _cost_fraction(trainer: CandidateTrainer, candidate: Candidate, probes: int) -> float:
    """Share of the budget that a stage and the probes before it take: of ``limits.tokens`` or ``limits.hours``, the
    larger share. Without either the budget is what training the champion's model on as many tokens costs."""
    limits, stage = trainer.retraining.settings.limits, stage_facts(trainer, candidate)
    hours = stage.hours_spent(probes)
    shares = [stage.tokens_spent(probes) / limits.tokens] if limits.tokens else []
    shares += [hours / limits.hours] if limits.hours and hours else []
    if shares:
        return max(shares)
    return candidate.planned.flops / training_flops(trainer.architecture, candidate.planned.tokens, None, 0)


def stage_facts(trainer: CandidateTrainer, chosen: Candidate) -> StageFacts:
    """What a plan says of a candidate's stage."""
    planned = chosen.planned
    speeds = [s.metrics["tokens_per_second"] for s in trainer.store.chain(trainer.champion.key) if s.metrics]
    speed = speeds[-1] if speeds else None  # a derived stage trained nothing
    return StageFacts(
        name=planned.spec.name,
        key=planned.key,
        continues=planned.spec.continues,
        grow=None if chosen.grow is None else dict(chosen.grow),
        tokens=planned.tokens,
        probe_tokens=probe_tokens(trainer, chosen),
        active_flops=planned.flops,
        experts_per_layer=planned.architecture.num_experts,
        parameters_total=planned.parameters.total,
        parameters_trainable=planned.trainable,
        replay_fraction=planned.spec.replay.fraction,
        disk_bytes=stage_need(planned, chosen.config).total,
        hours=None if not speed else planned.tokens / speed / 3600,
    )
