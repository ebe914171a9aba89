"""Held-out loss of a model on one distribution: each token is scored once, from the tokens before it alone.

Legend: T scored tokens, G generations.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lifelong_moe.data.tokens.windows import EvaluationSet
from lifelong_moe.evaluation.evaluation import Evaluation
from lifelong_moe.evaluation.reading import read_windows
from lifelong_moe.evaluation.readings import Readings
from lifelong_moe.model.transformer import LanguageModel


def evaluate(
    model: LanguageModel,
    windows: EvaluationSet,
    *,
    distribution: str | None,
    batch_tokens: int,
    readings: Readings | None = None,
    told: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score held-out windows.

    Args:
        model: On any device; left in the mode it was in.
        windows: Overlapping windows, each beginning with BOS.
        distribution: The text's distribution if it is known; only routing by label looks at it.
        batch_tokens: Tokens a forward pass.
        readings: See :func:`~lifelong_moe.evaluation.reading.read_windows`.
        told: Called after each forward pass with the number of tokens scored so far.
    """
    mixes, num_generations = model.architecture.mixture is not None, len(model.architecture.generations)
    total, loads, shares_G, readers = 0.0, None, torch.zeros(num_generations, dtype=torch.float64), 0
    scored = 0
    for batch in read_windows(model, windows, distribution=distribution, batch_tokens=batch_tokens, readings=readings):
        # float64: a sum over millions of tokens must not depend on the size of a batch.
        total += float(batch.nats_T.sum())
        batch_loads = batch.loads()
        loads = batch_loads if loads is None else [a + b for a, b in zip(loads, batch_loads, strict=True)]
        if batch.weights_TG is not None:
            shares_G += batch.weights_TG.sum(dim=0).cpu()
            readers += int((batch.weights_TG > 0).sum())
        scored += len(batch.nats_T)
        if told is not None:
            told(scored)
    return Evaluation(
        nats_per_token=total / windows.num_tokens,
        bits_per_byte=total / math.log(2) / windows.num_bytes,
        tokens=windows.num_tokens,
        bytes=windows.num_bytes,
        documents=windows.num_documents,
        expert_counts=[layer.tolist() for layer in loads or []],
        shares=(shares_G / windows.num_tokens).tolist() if mixes else [],
        readers=readers / windows.num_tokens if mixes else 1.0,
    )
