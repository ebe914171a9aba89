"""Measure each held-out document: its loss, and its mean hidden state as features.

Legend: W windows, S window length, N documents, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lifelong_moe.data.tokens.windows import EvaluationSet
from lifelong_moe.evaluation.loss import forward_windows
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture


@dataclass(frozen=True)
class DocumentMeasures:
    """One row per document, in the order of the held-out set, up to the requested number of tokens."""

    document: NDArray[np.int64]
    """Index in the shard ``(N,)``, ascending."""
    nats: NDArray[np.float64]
    """Summed cross-entropy of its scored tokens ``(N,)``."""
    tokens: NDArray[np.int64]
    """Scored tokens ``(N,)``."""
    features: NDArray[np.float64]
    """Mean final hidden state ``(N, D)``."""
    expert_counts: list[list[int]]
    """Assignments of scored tokens per layer and expert, over all documents."""


@torch.no_grad()
def measure_documents(
    model: LanguageModel, windows: EvaluationSet, *, distribution: str | None, batch_tokens: int
) -> DocumentMeasures:
    """Score held-out windows document by document; arguments as for :func:`lifelong_moe.evaluation.loss.evaluate`."""
    documents, place_W = np.unique(windows.document, return_inverse=True)
    nats, tokens = np.zeros(len(documents)), np.zeros(len(documents), dtype=np.int64)
    sums: NDArray[np.float64] = np.zeros((len(documents), model.architecture.model.width))
    counts: list[NDArray[np.int64]] | None = None
    row = 0
    for arrays, output in forward_windows(model, windows, distribution=distribution, batch_tokens=batch_tokens):
        scored = arrays["scored"]
        targets_T, domains_T = arrays["target_ids"][scored], arrays["domain_ids"][scored]
        nats_T = model.head.token_nats(output.hidden_BSD[scored], targets_T, domains_T)
        # Windows are consecutive, so the rows of this batch follow those of the last.
        of_window = place_W[row : row + len(scored)]
        of_token = of_window[scored.nonzero()[:, 0].cpu().numpy()]
        # add.at accumulates repeated indices, which += would drop; float64, since a document sums many tokens.
        np.add.at(nats, of_token, nats_T.double().cpu().numpy())
        np.add.at(tokens, of_token, 1)
        # Scored tokens alone: padding and tokens scored in another window have no weight. shape: (B, D)
        hidden_BD = (output.hidden_BSD.double() * scored.unsqueeze(-1)).sum(dim=1)
        np.add.at(sums, of_window, hidden_BD.cpu().numpy())
        found = [r.counts_of(scored.flatten()).cpu().numpy() for r in output.routings]
        counts = found if counts is None else [a + b for a, b in zip(counts, found, strict=True)]
        row += len(scored)
    return DocumentMeasures(
        document=documents,
        nats=nats,
        tokens=tokens,
        features=sums / np.maximum(tokens, 1)[:, None],  # a document without a scored token keeps zeros
        expert_counts=[layer.tolist() for layer in counts or []],
    )


def generation_shares(expert_counts: list[list[int]], architecture: Architecture) -> dict[str, float]:
    """Share of assignments that go to each generation's experts, over all layers, by birth stage.

    Args:
        expert_counts: Assignments per layer and expert.
        architecture: Of the model that made them.
    """
    totals = {generation.stage: 0 for generation in architecture.generations}
    for layer, counts in enumerate(expert_counts):
        for birth, count in zip(architecture.expert_births(layer), counts, strict=True):
            totals[birth] += count
    total = max(1, sum(totals.values()))
    return {stage: count / total for stage, count in totals.items()}
