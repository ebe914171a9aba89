"""What a trained stage reports of itself."""

from __future__ import annotations

import logging
import math
from typing import Any

from lifelong_moe.data.shards import TokenizedCorpus
from lifelong_moe.growth.observe import observe
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.training.data import text_sample
from lifelong_moe.training.rollback import MAX_NONFINITE
from lifelong_moe.training.spec import StageSpec

log = logging.getLogger(__name__)


def stage_metrics(
    model: LanguageModel,
    spec: StageSpec,
    measured: list[dict[str, Any]],
    corpus: TokenizedCorpus,
    rollbacks: int,
) -> dict[str, Any]:
    """What a stage reports of its training.

    Args:
        model: Trained.
        spec: The stage.
        measured: Of each phase, by :func:`lifelong_moe.training.phase.train_phase`.
        corpus: Its new text.
        rollbacks: How often it rolled back; ``nonfinite_steps`` counts the steps that made it do so, too.
    """
    seconds = sum(m["seconds"] for m in measured)
    tokens = spec.steps * spec.optim.batch_tokens
    metrics: dict[str, Any] = {
        "tokens": tokens,
        "steps": spec.steps,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "data_fraction": sum(m["data_seconds"] for m in measured) / seconds,
        "nonfinite_steps": sum(m["nonfinite_steps"] for m in measured) + rollbacks * MAX_NONFINITE,
        "skipped_spikes": sum(m["skipped_spikes"] for m in measured),
        "rollbacks": rollbacks,
        # A loss that was not finite is absent here; nonfinite_steps says why.
        "final": {name: value for name, value in measured[-1]["final"].items() if math.isfinite(value)},
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "epochs": (tokens - spec.replayed_tokens) / corpus.train.num_tokens,
    }
    if "assignment_churn" in measured[-1]:
        metrics["assignment_churn"] = measured[-1]["assignment_churn"]
    if "stopping" in measured[-1]:
        metrics["stopping"] = measured[-1]["stopping"]
    if spec.grow:
        metrics["new_expert_share"] = _new_expert_share(model, spec, corpus)
    return metrics


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
