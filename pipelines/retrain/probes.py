"""Probes: short trainings of a tick's candidates, and the cost of the stages that they stand for."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lifelong_moe.plan.cost import count_parameters, training_flops
from lifelong_moe.plan.stages import stage_need
from lifelong_moe.retraining.bounds import Bounds, DocumentLosses, difference_bounds
from lifelong_moe.retraining.decision import ProbeResult
from lifelong_moe.retraining.gate import forgetting_bounds
from lifelong_moe.retraining.pooling import pooled_losses
from lifelong_moe.training.callbacks.points import Row
from pipelines.retrain.plan_file import StageFacts
from pipelines.shared.workspace import require_room
from pipelines.versions.candidates import Candidate, CandidateTrainer
from pipelines.versions.gating import kinds_of_text, old_losses

PROBE_LEVEL = 0.05
"""Level of each bound on gain and structure: 95 % confidence, one-sided. Forgetting is bounded at the gate's level."""
# At level 0.05 they leave 100 samples beyond a bound; the gate requires 20.
PROBE_RESAMPLES = 2000
"""Bootstrap samples of each bound."""


def probe_tokens(trainer: CandidateTrainer, candidate: Candidate) -> int:
    """Tokens of a candidate's probe: ``probe.fraction`` of the stage's in whole steps, two at least."""
    fraction, batch_tokens = trainer.retraining.settings.probe.fraction, candidate.planned.spec.optim.batch_tokens
    return max(2, round(fraction * candidate.planned.tokens / batch_tokens)) * batch_tokens


def shortened(trainer: CandidateTrainer, candidate: Candidate) -> Candidate:
    """The candidate's probe: the same stage on fewer tokens."""
    return trainer.plan(candidate.planned.spec.continues, probe_tokens(trainer, candidate), candidate.grow)


def require_room_for(trainer: CandidateTrainer, candidates: list[Candidate]) -> None:
    """Require disk space for all probes and then any one of the candidates.

    Raises:
        ResourceError: If there is too little.
    """
    # Checked before the first probe: space that runs out after hours of probes is found out too late.
    probes = [shortened(trainer, one).planned for one in candidates]
    for candidate in candidates:
        todo = [stage for stage in (*probes, candidate.planned) if trainer.store.find(stage.key) is None]
        require_room(todo, candidate.config)


def probe(trainer: CandidateTrainer, candidate: Candidate, probes: int) -> ProbeResult:
    """Train a candidate's probe and compare it with the champion.

    Args:
        trainer: Of the batch's candidates.
        candidate: The stage that the probe stands for.
        probes: Number of probes of this tick, for the cost.
    """
    short = shortened(trainer, candidate)
    stage = trainer.train(short, _discard, None)
    seed, new, before = short.config.seed, trainer.new, trainer.parent

    def bounds(after: DocumentLosses, other: DocumentLosses) -> Bounds:
        return difference_bounds(after, other, level=PROBE_LEVEL, resamples=PROBE_RESAMPLES, seed=seed)

    probed = short.measurements.losses(stage.key, new)
    # A gain is a loss that fell, so the difference changes sign and its bounds change places.
    gain = -bounds(probed, short.measurements.losses(before.key, new))
    kinds, level = kinds_of_text(trainer.champion, trainer.store), trainer.retraining.settings.gate.level
    losses = old_losses(trainer, short, stage)
    forgotten = forgetting_bounds(*losses, kinds=kinds, level=level, resamples=PROBE_RESAMPLES, seed=seed)
    # Divided by their number (Bonferroni): any pool rules the action out, and one of many looks bad by chance.
    pool_level = level / max(1, len(forgotten))
    lower_bounds = [
        difference_bounds(
            *(pooled_losses(side, pool) for side in losses), level=pool_level, resamples=PROBE_RESAMPLES, seed=seed
        ).lower
        for pool in forgotten
    ]
    structure = bounds(short.measurements.losses(stage.key, new, shuffled=True), probed)
    old = count_parameters(trainer.architecture).total
    return ProbeResult(
        gain=gain.mean,
        gain_lower=gain.lower,
        gain_upper=gain.upper,
        structure=structure.lower,
        structure_upper=structure.upper,
        forgetting=_largest(one.upper for one in forgotten.values()),
        forgetting_lower=_largest(lower_bounds),
        leak=_largest(trainer.leak(stage, short, name) for name in short.measurements.measurable(without=[new])),
        parameters_fraction=(candidate.planned.parameters.total - old) / old,
        cost_fraction=_cost_fraction(trainer, candidate, probes),
    )


def _discard(points: list[Row]) -> None:
    """Send no training curve: a probe has no MLflow run."""


def _largest(values: Iterable[float]) -> float:
    """The largest value, NaN if one is NaN, 0 without values."""
    # NaN sorts first: max() alone would drop it or keep it depending on the order.
    return max(values, key=lambda value: (math.isnan(value), value), default=0.0)


def _cost_fraction(trainer: CandidateTrainer, candidate: Candidate, probes: int) -> float:
    """Cost of a stage and the tick's probes as a fraction of ``limits.tokens`` or ``limits.hours``, the larger one.

    Without limits the budget is the cost of training the champion's model on as many tokens.
    """
    limits, stage = trainer.retraining.settings.limits, stage_facts(trainer, candidate)
    hours = stage.hours_spent(probes)
    shares = [stage.tokens_spent(probes) / limits.tokens] if limits.tokens else []
    shares += [hours / limits.hours] if limits.hours and hours else []
    if shares:
        return max(shares)
    return candidate.planned.flops / training_flops(trainer.architecture, candidate.planned.tokens, None, 0)


def stage_facts(trainer: CandidateTrainer, chosen: Candidate) -> StageFacts:
    """A candidate's stage and its cost, as a plan reports them."""
    planned = chosen.planned
    speeds = [s.metrics["tokens_per_second"] for s in trainer.store.chain(trainer.champion.key) if s.metrics]
    speed = speeds[-1] if speeds else None  # a chain of derived stages has no speed: they train nothing
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
