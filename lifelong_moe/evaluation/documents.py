"""Measure each held-out document: its loss, and its mean hidden state as features.

Legend: W windows, S window length, N documents, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lifelong_moe.data.tokens.windows import EvaluationSet
from lifelong_moe.evaluation.reading import read_windows
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
    """Mean final hidden state ``(N, D)``; a mixture's generations count by their weights."""
    expert_counts: list[list[float]]
    """Assignments of scored tokens per layer and expert, over all documents, in a mixture by weight."""


@torch.no_grad()
def measure_documents(
    model: LanguageModel, windows: EvaluationSet, *, distribution: str | None, batch_tokens: int
) -> DocumentMeasures:
    """Score held-out windows document by document; arguments as for :func:`lifelong_moe.evaluation.loss.evaluate`."""
    documents, place_W = np.unique(windows.document, return_inverse=True)
    nats, tokens = np.zeros(len(documents)), np.zeros(len(documents), dtype=np.int64)
    sums: NDArray[np.float64] = np.zeros((len(documents), model.architecture.model.width))
    counts: list[NDArray[np.float64]] | None = None
    for batch in read_windows(model, windows, distribution=distribution, batch_tokens=batch_tokens):
        of_window = place_W[batch.places_B]
        of_token = of_window[batch.arrays["scored"].nonzero()[:, 0].cpu().numpy()]
        # add.at accumulates repeated indices, which += would drop; float64, since a document sums many tokens.
        np.add.at(nats, of_token, batch.nats_T.cpu().numpy())
        np.add.at(tokens, of_token, 1)
        for member, has_part_RP, _ in batch.shares:
            # Scored tokens alone: padding and tokens scored in another window have no weight. shape: (R, D)
            weights_RP1 = (member.weights_RP * has_part_RP).unsqueeze(-1)
            hidden_RD = (member.output.hidden_BSD.double() * weights_RP1).sum(dim=1)
            np.add.at(sums, of_window[member.windows_R.cpu().numpy()], hidden_RD.cpu().numpy())
        found = [layer.cpu().numpy() for layer in batch.loads()]
        counts = found if counts is None else [a + b for a, b in zip(counts, found, strict=True)]
    return DocumentMeasures(
        document=documents,
        nats=nats,
        tokens=tokens,
        features=sums / np.maximum(tokens, 1)[:, None],  # a document without a scored token keeps zeros
        expert_counts=[layer.tolist() for layer in counts or []],
    )


def generation_shares(expert_counts: list[list[float]], architecture: Architecture) -> dict[str, float]:
    """Share of assignments that go to each generation's experts, over all layers, by birth stage.

    Args:
        expert_counts: Assignments per layer and expert.
        architecture: Of the model that made them.
    """
    totals = {generation.stage: 0.0 for generation in architecture.generations}
    for layer, counts in enumerate(expert_counts):
        for birth, count in zip(architecture.expert_births(layer), counts, strict=True):
            totals[birth] += count
    total = sum(totals.values()) or 1.0
    return {stage: count / total for stage, count in totals.items()}
