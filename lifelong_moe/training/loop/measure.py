"""What a trained stage reports of itself.

Of its cost, in the directory of the stage, in the report and in MLflow:

======================  ===================================================================================
``active_flops``        FLOPs of the stage, the parent's included, as plans and comparisons count them
``flops_per_second``    of those in the training loop (a teacher's too, but not what the parent's model writes
                        or is measured on before it), by ``seconds``
``energy_joules``       drawn by the training device in those seconds; absent unless all of it was measured
``joules_per_token``    the same by ``tokens``
======================  ===================================================================================

FLOPs are the model's, from its shape, as in PaLM (arXiv:2204.02311, appendix B): padding and recomputation do not
count. Gradients that frozen parameters skip do, so where a stage freezes, the device did fewer. Seconds include waiting
for data. What an interruption threw away is in none of these.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lifelong_moe.data.tokens.packing import epochs
from lifelong_moe.data.tokens.shards import TokenizedCorpus
from lifelong_moe.growth.observe import observe
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.flops import loop_flops, stage_flops
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.training.callbacks.stopping import StoppingReport
from lifelong_moe.training.loop.context import StageRun
from lifelong_moe.training.loop.data import text_sample
from lifelong_moe.training.loop.rollback import MAX_NONFINITE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PhaseMeasures:
    """What a phase's steps cost and came to."""

    seconds: float
    data_seconds: float
    """Of those, spent waiting for data."""
    nonfinite_steps: int
    skipped_spikes: int
    final: dict[str, float]
    """Last point of each training curve."""
    joules: float | None = None
    """Absent where the device does not say, and in a phase that an earlier version trained."""
    stopping: StoppingReport | None = None
    assignment_churn: float | None = None

    def save(self, work: Path, number: int) -> None:
        """Keep it with the stage's work: a stage that is interrupted later does not train the phase again."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        write_atomic(work / f"phase-{number}.json", json.dumps(known))

    @classmethod
    def load(cls, work: Path, number: int) -> PhaseMeasures:
        """What :meth:`save` kept of the stage's phase with this number."""
        return cls(**json.loads((work / f"phase-{number}.json").read_text(encoding="utf-8")))


def stage_metrics(model: LanguageModel, run: StageRun, measured: list[PhaseMeasures], rollbacks: int) -> dict[str, Any]:
    """What a stage reports of its training.

    Args:
        model: Trained.
        run: The stage.
        measured: Of each phase.
        rollbacks: How often it rolled back; ``nonfinite_steps`` counts the steps that made it do so, too.
    """
    spec, corpus = run.spec, run.corpora[run.spec.data]
    taken, last = _as_taken(spec, measured), measured[-1]
    seconds, tokens = sum(m.seconds for m in measured), taken.tokens
    metrics: dict[str, Any] = {
        "tokens": tokens,
        "steps": taken.steps,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "active_flops": stage_flops(taken, model.architecture, run.before),
        "flops_per_second": loop_flops(taken, model.architecture, run.before) / seconds,
        **_energy([m.joules for m in measured], tokens),
        "data_fraction": sum(m.data_seconds for m in measured) / seconds,
        "nonfinite_steps": sum(m.nonfinite_steps for m in measured) + rollbacks * MAX_NONFINITE,
        "skipped_spikes": sum(m.skipped_spikes for m in measured),
        "rollbacks": rollbacks,
        # A loss that was not finite is absent here; nonfinite_steps says why.
        "final": {name: value for name, value in last.final.items() if math.isfinite(value)},
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "epochs": epochs(tokens - taken.replayed_tokens, corpus.train, spec.model.context),
    }
    if last.assignment_churn is not None:
        metrics["assignment_churn"] = last.assignment_churn
    if last.stopping is not None:
        metrics["stopping"] = last.stopping
    if spec.grow:
        metrics["new_expert_share"] = _new_expert_share(model, spec, corpus)
    return metrics


def _as_taken(spec: StageSpec, measured: list[PhaseMeasures]) -> StageSpec:
    """The stage in whole steps, and no more of them than it took if it stopped early: where it measured last."""
    steps = sum(
        phase.steps if done.stopping is None else done.stopping["held_out_nats_per_token"][-1][0]
        for done, phase in zip(measured, spec.phases(), strict=True)
    )
    return replace(spec, tokens=steps * spec.optim.batch_tokens)


def _energy(joules: list[float | None], tokens: int) -> dict[str, float]:
    """Of all phases, or nothing; a counter that stood still all along has measured nothing."""
    known = [spent for spent in joules if spent is not None]
    total = sum(known)
    return {"energy_joules": total, "joules_per_token": total / tokens} if total and len(known) == len(joules) else {}


def _new_expert_share(model: LanguageModel, spec: StageSpec, corpus: TokenizedCorpus) -> float:
    """Smallest share of the new data's assignments that any new expert gets; warns if next to none."""
    assert spec.grow is not None
    sample = text_sample(model, spec, corpus, spec.grow.sample_tokens)
    grown = [layer for layer in range(spec.model.layers) if model.architecture.generations[-1].experts_in(layer)]
    counts = [seen.counts_E for seen in observe(model, sample)]
    smallest = min(float((counts[i] / counts[i].sum())[-spec.grow.experts :].min()) for i in grown)
    if smallest < spec.grow.min_share:
        log.warning(
            "stage %s: a new expert gets %.2f %% of the new data's assignments, less than %.0f %%",
            spec.name, 100 * smallest, 100 * spec.grow.min_share,
        )  # fmt: skip
    return smallest
