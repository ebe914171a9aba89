"""Held-out loss of a model on one distribution: each token is scored once, from the tokens before it alone.

Legend: W windows, S window length, T scored tokens, L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lifelong_moe.data.tokens.windows import EvaluationSet
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel, ModelOutput

EVALUATION_SCHEMA = 2
"""Version of the measurement; a change invalidates every stored evaluation."""


@dataclass(frozen=True)
class Evaluation:
    """The measurement of one distribution."""

    nats_per_token: float
    """Mean cross-entropy of the scored tokens; where stages add tokens, by those of the first vocabulary."""
    bits_per_byte: float
    """Total cross-entropy in bits over the UTF-8 bytes of the source text."""
    tokens: int
    """Tokens scored."""
    bytes: int
    """UTF-8 bytes of their text."""
    documents: int
    """Documents that they come from."""
    expert_counts: list[list[int]]
    """Assignments of scored tokens per layer and expert."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)


@torch.no_grad()
def forward_windows(
    model: LanguageModel, windows: EvaluationSet, *, distribution: str | None, batch_tokens: int
) -> Iterator[tuple[dict[str, Tensor], ModelOutput]]:
    """Run held-out windows through a model, batch by batch, in evaluation mode; arguments as for :func:`evaluate`.

    Yields:
        The batch, ``token_ids``, ``target_ids``, ``scored``, ``valid`` and ``domain_ids`` ``(B, S)`` of consecutive
        windows, and what the model made of it.
    """
    # The mode is restored below: training may continue with the model.
    training, device = model.training, model.embedding.weight.device
    windows = replace(windows, domain_ids=model.domain_ids(windows.shard, distribution))
    # A batch has at least one window, even if a window is longer than the batch should be.
    rows = max(1, batch_tokens // int(windows.length[0]))
    model.eval()
    try:
        for first in range(0, len(windows), rows):
            batch = windows.batch(slice(first, first + rows))
            arrays = {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
            # A window holds one document.
            token_ids, one_document = arrays["token_ids"], torch.zeros_like(arrays["token_ids"])
            yield arrays, model(TokenBatch(token_ids, one_document, arrays["domain_ids"], arrays["valid"]))
    finally:
        model.train(training)


@torch.no_grad()
def evaluate(
    model: LanguageModel, windows: EvaluationSet, *, distribution: str | None, batch_tokens: int
) -> Evaluation:
    """Score held-out windows.

    Args:
        model: On any device; left in the mode it was in.
        windows: Overlapping windows, each beginning with BOS.
        distribution: The text's distribution if it is known; only routing by label looks at it.
        batch_tokens: Tokens a forward pass.
    """
    total, counts = 0.0, None
    for arrays, output in forward_windows(model, windows, distribution=distribution, batch_tokens=batch_tokens):
        scored = arrays["scored"]
        targets_T, domains_T = arrays["target_ids"][scored], arrays["domain_ids"][scored]
        nats_T = model.head.token_nats(output.hidden_BSD[scored], targets_T, domains_T)
        # float64: a sum over millions of tokens must not depend on the size of a batch.
        total += float(nats_T.double().sum())
        batch_counts = [routing.counts_of(scored.flatten()) for routing in output.routings]
        counts = batch_counts if counts is None else [a + b for a, b in zip(counts, batch_counts, strict=True)]
    return Evaluation(
        nats_per_token=total / windows.num_tokens,
        bits_per_byte=total / math.log(2) / windows.num_bytes,
        tokens=windows.num_tokens,
        bytes=windows.num_bytes,
        documents=windows.num_documents,
        expert_counts=[layer.tolist() for layer in counts or []],
    )


def per_token_of(found: Evaluation, tokens: int) -> Evaluation:
    """The same loss by the tokens of another vocabulary, so that losses of models with different ones compare.

    Args:
        found: Of the same text.
        tokens: Scored tokens of the other vocabulary.
    """
    return replace(found, nats_per_token=found.nats_per_token * found.tokens / tokens, tokens=tokens)
