"""Sampling texts from a model, a token of each at a time, with a key-value cache.

Legend: B texts, N tokens of each so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lifelong_moe.errors import ConfigError
from lifelong_moe.model.next_token import Prompts, texts_of
from lifelong_moe.model.transformer import LanguageModel

SHARPEST = 1e-4
"""At a lower temperature sampling is argmax, where dividing by it would overflow."""


def sample(
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
    prompts = Prompts([[model.architecture.bos_id, *prompt_ids]], distribution)
    for (token,) in sample_steps(model, prompts, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed):
        if token == model.architecture.bos_id:
            return
        yield token


def sample_batch(
    model: LanguageModel,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    distribution: str | None = None,
) -> list[list[int]]:
    """New token ids of several texts, whose prompts have equal length; each ends by itself.

    Text ``i`` is what :func:`sample` makes of its prompt with seed ``seed + i``, but for floating point in products
    of another size; the other arguments are its as well.

    Raises:
        ConfigError: If the prompts differ in length.
    """
    if len({len(prompt) for prompt in prompts}) > 1:
        raise ConfigError("prompts that are continued together must have the same number of tokens.")
    bos_id = model.architecture.bos_id
    texts: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    whole = Prompts([[bos_id, *prompt] for prompt in prompts], distribution)
    steps = sample_steps(model, whole, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    while going and (tokens := next(steps, None)) is not None:
        going -= {i for i in going if tokens[i] == bos_id}
        for i in going:
            texts[i].append(tokens[i])
    return texts


def sample_token(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw one token; ``temperature=0`` is argmax, ``top_p`` cuts the tail (arXiv:1904.09751)."""
    if temperature < SHARPEST:
        return int(logits_V.argmax())
    probs_V, order_V = (logits_V / temperature).softmax(dim=-1).sort(descending=True, stable=True)
    kept = probs_V.cumsum(dim=-1) - probs_V < top_p
    choice = torch.multinomial(probs_V * kept, 1, generator=generator)
    return int(order_V[choice])


@torch.no_grad()
def sample_steps(
    model: LanguageModel, prompts: Prompts, max_new_tokens: int, *, temperature: float, top_p: float, seed: int
) -> Iterator[list[int]]:
    """Yield one more token of each text at a time, after its end too; whoever asks decides where that is.

    Args:
        model: On any device; put into evaluation mode.
        prompts: What is continued.
        max_new_tokens: At most so many.
        temperature: 0 takes the most probable token.
        top_p: Sample from the smallest set of tokens with at least this probability.
        seed: Of the first text's sampling; each further one's is one more.
    """
    model.eval()
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts.ids))]
    length = len(prompts.ids[0])
    ids_BN = np.zeros((len(prompts.ids), length + max_new_tokens), dtype=np.int64)
    ids_BN[:, :length] = prompts.ids
    texts = texts_of(model, prompts, ids_BN.shape[1])
    for end in range(length, length + max_new_tokens):
        logits_BV = texts.next_logits(ids_BN[:, :end])
        if temperature < SHARPEST:
            tokens = logits_BV.argmax(dim=-1).tolist()
        else:
            rows = zip(logits_BV.float().cpu(), generators, strict=True)
            tokens = [sample_token(logits_V, temperature, top_p, generator) for logits_V, generator in rows]
        ids_BN[:, end] = tokens
        yield tokens
