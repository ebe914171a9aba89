"""Sampling text from a model, one token at a time, with a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lifelong_moe.model.attention import KeyValue
from lifelong_moe.model.groups import label_group
from lifelong_moe.model.transformer import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    distribution: str | None = None,
) -> Iterator[int]:
    """Yield new token ids until the model ends the document.

    Args:
        model: On any device; put into evaluation mode.
        prompt_ids: Prompt without BOS, which is put before it.
        max_new_tokens: At most so many.
        temperature: 0 takes the most probable token.
        top_p: Sample from the smallest set of tokens with at least this probability.
        seed: Of the sampling.
        distribution: Where routing goes by label: whose experts to use.

    When the text outgrows ``model.context``, the cache is made again from its last half context.
    """
    model.eval()
    context = model.architecture.model.context
    generator = torch.Generator().manual_seed(seed)
    ids = [model.architecture.bos_id, *prompt_ids]
    cache: list[KeyValue] | None = None
    for _ in range(max_new_tokens):
        groups = _group_ids(model, ids, distribution)
        if cache is None or cache[0][0].shape[2] >= context:
            hidden, cache = _prefill(model, ids, groups)
        else:
            output = model(_row(model, ids[-1:]), group_ids_BS=_row(model, groups[-1:]), past=cache)
            hidden, cache = output.hidden_BSD[0, -1], output.cache
        logits_V = model.logits(hidden.unsqueeze(0), _row(model, groups[-1:]))[0].float().cpu()
        token = sample_token(logits_V, temperature, top_p, generator)
        if token == model.architecture.bos_id:
            return
        ids.append(token)
        yield token


def sample_token(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw one token; ``temperature=0`` is argmax, ``top_p`` cuts the tail (arXiv:1904.09751)."""
    if temperature < 1e-4:  # so sharp that it is argmax, where dividing would overflow
        return int(logits_V.argmax())
    probs_V, order_V = (logits_V / temperature).softmax(dim=-1).sort(descending=True, stable=True)
    kept = probs_V.cumsum(dim=-1) - probs_V < top_p
    choice = torch.multinomial(probs_V * kept, 1, generator=generator)
    return int(order_V[choice])


def _prefill(model: LanguageModel, ids: list[int], groups: list[int]) -> tuple[Tensor, list[KeyValue]]:
    context = model.architecture.model.context
    if len(ids) > context:  # keep BOS and the newest half, so that most of a context of new tokens fits
        keep = context // 2
        ids, groups = [ids[0], *ids[-keep:]], [groups[0], *groups[-keep:]]
    output = model(_row(model, ids), group_ids_BS=_row(model, groups))
    return output.hidden_BSD[0, -1], output.cache


def _group_ids(model: LanguageModel, ids: list[int], distribution: str | None) -> list[int]:
    if model.document_clusters is not None:
        return model.document_clusters.group_ids(np.asarray(ids)).tolist()
    return [label_group(model.architecture, distribution)] * len(ids)


def _row(model: LanguageModel, values: list[int]) -> Tensor:
    return torch.tensor([values], dtype=torch.int64, device=model.embedding.weight.device)
