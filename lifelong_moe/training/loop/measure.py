"""Measurements of a stage's training, kept with the stage, in the report and in MLflow.

Those of its cost:

======================  ===================================================================================
``active_flops``        FLOPs of the stage and of the parent's model in it, as plans and comparisons count them
``flops_per_second``    FLOPs of the training loop, the teacher's included, over ``seconds``; without the text that
                        the parent's model writes before it and the Fisher information
``energy_joules``       drawn by the training device in those seconds; absent unless all of it was measured
``joules_per_token``    the same over ``tokens``
======================  ===================================================================================

FLOPs follow from the model's shape, as in PaLM (arXiv:2204.02311, appendix B), without padding and recomputation.
Seconds include waiting for data. Steps that an interruption threw away are in none of these.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from lifelong_moe.data.tokens.shards import TokenizedCorpus
from lifelong_moe.errors import CorruptError
from lifelong_moe.growth.observe import observe
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.flops import loop_flops, stage_flops
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.plan.stages import epochs_by_distribution
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.plain import from_plain
from lifelong_moe.storage.stored import read_stored
from lifelong_moe.tracking.provenance import machine
from lifelong_moe.training.callbacks.stopping import StoppingReport
from lifelong_moe.training.loop.context import StageRun
from lifelong_moe.training.loop.data import new_text_sample
from lifelong_moe.training.loop.device import configured_device
from lifelong_moe.training.loop.rollback import MAX_NONFINITE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PhaseMeasures:
    """Cost and results of a phase's steps."""

    seconds: float
    data_seconds: float
    """Of those, waiting for data."""
    nonfinite_steps: int
    skipped_spikes: int
    final: dict[str, float]
    """Last point of each training curve."""
    joules: float | None = None
    """Absent on a device without a counter, and in a phase that an earlier version trained."""
    stopping: StoppingReport | None = None
    assignment_churn: float | None = None

    def save(self, work: Path, number: int) -> None:
        """Write them to the stage's work directory."""
        # A stage that is interrupted in a later phase does not train this one again, but reports it.
        known = {name: value for name, value in asdict(self).items() if value is not None}
        # JSON has no NaN; of such a point, the report is silent too.
        known["final"] = {name: value for name, value in self.final.items() if math.isfinite(value)}
        write_atomic(work / f"phase-{number}.json", json.dumps(known))

    @classmethod
    def load(cls, work: Path, number: int) -> PhaseMeasures:
        """Read the measurements of a phase.

        Raises:
            CorruptError: If they are missing or damaged.
        """
        path = work / f"phase-{number}.json"
        try:
            return read_stored(path, partial(from_plain, cls))
        except FileNotFoundError:
            raise CorruptError(f"{path}: missing; remove {work} to begin the stage again.") from None


@dataclass(frozen=True, kw_only=True)
class StageMetrics:
    """A stage's report on its training; what was not measured is None, and absent from the file."""

    tokens: int
    """Trained on, in whole steps."""
    steps: int
    seconds: float
    tokens_per_second: float
    active_flops: int
    flops_per_second: float
    energy_joules: float | None
    joules_per_token: float | None
    data_fraction: float
    """Share of the seconds spent waiting for data."""
    nonfinite_steps: int
    """Skipped steps without a finite loss and gradient, also those that led to a rollback."""
    skipped_spikes: int
    rollbacks: int
    final: dict[str, float]
    """Last point of each training curve, if it is finite."""
    trainable_parameters: int
    epochs: float
    """Over the new text; of a mixture, over the distribution that was gone through most often."""
    epochs_by_distribution: dict[str, float] | None
    """Over the text of each distribution of a mixture."""
    assignment_churn: float | None
    """Share of a sample's assignments to fixed centroids that the last phase changed."""
    stopping: StoppingReport | None
    new_expert_share: float | None
    """Smallest share of the new text's assignments that any new expert gets."""
    machine: str
    """Where the stage ended, as MLflow's tags say it, and on which kind of ``device``: a speed is that of a machine."""
    device: str

    def to_json(self) -> dict[str, object]:
        """As plain JSON data."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def stage_metrics(model: LanguageModel, run: StageRun, measured: list[PhaseMeasures], rollbacks: int) -> StageMetrics:
    """Sum up a stage's training.

    Args:
        model: Trained.
        run: The stage.
        measured: Of each phase.
        rollbacks: Of the whole stage.
    """
    spec, corpora = run.spec, run.corpora
    taken, last = _as_taken(spec, measured), measured[-1]
    seconds, tokens = sum(m.seconds for m in measured), taken.tokens
    joules, passes = _total_joules([m.joules for m in measured]), epochs_by_distribution(taken, corpora)
    return StageMetrics(
        tokens=tokens,
        steps=taken.steps,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        active_flops=stage_flops(taken, model.architecture, run.before),
        flops_per_second=loop_flops(taken, model.architecture, run.before) / seconds,
        energy_joules=joules,
        joules_per_token=None if joules is None else joules / tokens,
        data_fraction=sum(m.data_seconds for m in measured) / seconds,
        # A rollback returns to a checkpoint from before these steps, whose guard has not counted them.
        nonfinite_steps=sum(m.nonfinite_steps for m in measured) + rollbacks * MAX_NONFINITE,
        skipped_spikes=sum(m.skipped_spikes for m in measured),
        rollbacks=rollbacks,
        # JSON has no NaN; nonfinite_steps says why a loss is absent.
        final={name: value for name, value in last.final.items() if math.isfinite(value)},
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        epochs=max(passes.values()),
        epochs_by_distribution=passes if spec.mixed else None,
        assignment_churn=last.assignment_churn,
        stopping=last.stopping,
        new_expert_share=_new_expert_share(model, spec, corpora) if spec.grow else None,
        machine=machine(),
        device=configured_device(run.environment.trainer).type,
    )


def _as_taken(spec: StageSpec, measured: list[PhaseMeasures]) -> StageSpec:
    """The stage with the tokens of the steps that it took."""
    # Early stopping ends with a measurement, whose step is therefore the last one taken.
    steps = sum(
        phase.steps if done.stopping is None else done.stopping["held_out_nats_per_token"][-1][0]
        for done, phase in zip(measured, spec.phases(), strict=True)
    )
    return replace(spec, tokens=steps * spec.optim.batch_tokens)


def _total_joules(joules: list[float | None]) -> float | None:
    """The sum over all phases; None if any of them is unknown."""
    known = [spent for spent in joules if spent is not None]
    # A counter that never moved has measured nothing: no device trains for 0 J.
    return (sum(known) or None) if len(known) == len(joules) else None


def _new_expert_share(model: LanguageModel, spec: StageSpec, corpora: Mapping[str, TokenizedCorpus]) -> float:
    """Smallest share of the new text's assignments that any new expert gets; warn if it is below ``min_share``."""
    assert spec.grow is not None
    sample = new_text_sample(model, spec, corpora, spec.grow.sample_tokens)
    # Growth may be restricted to some layers.
    grown = [layer for layer in range(spec.model.layers) if model.architecture.generations[-1].experts_in(layer)]
    counts = [seen.counts_E for seen in observe(model, sample)]
    smallest = min(float((counts[i] / counts[i].sum())[-spec.grow.experts :].min()) for i in grown)
    if smallest < spec.grow.min_share:
        log.warning(
            "stage %s: a new expert gets %.2f %% of the new data's assignments, less than %.0f %%",
            spec.name, 100 * smallest, 100 * spec.grow.min_share,
        )  # fmt: skip
    return smallest
