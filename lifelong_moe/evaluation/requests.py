"""Log likelihoods of ends of texts, as harnesses of tasks ask for them, by the pass that measures held-out losses.

Legend: R requests, T scored tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.data.tokens.windows import EvaluationSet
from lifelong_moe.errors import ConfigError
from lifelong_moe.evaluation.reading import WindowBatch, read_windows
from lifelong_moe.model.transformer import LanguageModel

LOGITS_AT_ONCE = 1024
"""Scored tokens whose logits are in memory together."""


@dataclass(frozen=True)
class Request:
    """A stretch of a text whose tokens are scored, from the tokens before them."""

    text: int
    """Place of the text."""
    end: int
    """Tokens of the text up to the end of the stretch."""
    scored: int
    """Tokens of the stretch, at least one and fewer than ``end``."""


@dataclass(frozen=True)
class Likelihoods:
    """One row per request, in the order of the requests."""

    nats: NDArray[np.float64]
    """Log likelihood of the stretch ``(R,)``, at most 0."""
    is_greedy: NDArray[np.bool_]
    """Whether each of its tokens is the most probable one ``(R,)``."""


@dataclass(frozen=True)
class Pass:
    """How requests are put to a model."""

    context: int
    """Tokens that it reads at most; of a longer text the last ones."""
    rows: int | None = None
    """Requests a forward pass; None for as many as ``tokens`` allow."""
    tokens: int = 8192
    """Tokens a forward pass."""
    distribution: str | None = None
    """Of the texts; only routing by label looks at it."""


@torch.no_grad()
def score(model: LanguageModel, texts: Sequence[Sequence[int]], requests: Sequence[Request], how: Pass) -> Likelihoods:
    """Score stretches of texts.

    The model reads the last ``context`` tokens before the last of a stretch, whether or not BOS is among them. Domains
    are decided from the whole text before a token, as in generation and in held-out losses.

    Args:
        model: On any device; left in the mode it was in.
        texts: Token ids of each, with BOS where the model is to read it.
        requests: Any number.
        how: See :class:`Pass`.

    Raises:
        ConfigError: If a stretch is longer than the context.
    """
    nats, greedy = np.zeros(len(requests)), np.ones(len(requests), dtype=np.bool_)
    if not requests:
        return Likelihoods(nats, greedy)
    windows, order = _windows(texts, requests, how.context, model)
    longest = int(windows.length[0])
    batch_tokens = how.tokens if how.rows is None else how.rows * longest
    for batch in read_windows(model, windows, distribution=how.distribution, batch_tokens=batch_tokens):
        of_T = order[batch.places_B][batch.arrays["scored"].nonzero()[:, 0].cpu().numpy()]
        # float64, and `at`, since a request has many tokens.
        np.subtract.at(nats, of_T, batch.nats_T.cpu().numpy())
        np.logical_and.at(greedy, of_T, _is_greedy(model, batch).cpu().numpy())
    return Likelihoods(nats, greedy)


def _is_greedy(model: LanguageModel, batch: WindowBatch) -> Tensor:
    """Which scored targets are the most probable tokens, bool ``(T,)``."""
    targets_T = batch.arrays["target_ids"][batch.arrays["scored"]]
    parts = torch.arange(len(targets_T), device=targets_T.device).split(LOGITS_AT_ONCE)
    return torch.cat([batch.log_probabilities(model, part).argmax(dim=-1) == targets_T[part] for part in parts])


def _windows(
    texts: Sequence[Sequence[int]], requests: Sequence[Request], context: int, model: LanguageModel
) -> tuple[EvaluationSet, NDArray[np.int64]]:
    """A window for each request, longest first, and the request of each window."""
    bos_id = model.architecture.bos_id
    # Documents of a shard begin with BOS. Where a text does not, it is put before and not read.
    added = np.array([not text or text[0] != bos_id for text in texts], dtype=np.int64)
    documents = [[bos_id] * int(more) + [*text] for text, more in zip(texts, added, strict=True)]
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in documents])]).astype(np.int64)
    tokens = np.concatenate(
        [np.array(one, dtype=np.min_scalar_type(model.architecture.num_tokens)) for one in documents]
    )
    document = np.array([one.text for one in requests], dtype=np.int64)
    scored = np.array([one.scored for one in requests], dtype=np.int64)
    if int(scored.max()) > context:
        raise ConfigError(f"{int(scored.max())} tokens are to be scored at once, but the context is {context}.")
    end = np.array([one.end for one in requests], dtype=np.int64) + added[document]
    # The last token is a target alone.
    first = np.maximum(added[document], end - context - 1)
    length = end - 1 - first
    order = np.argsort(-length, kind="stable")
    shard = TokenShard(tokens, offsets, np.zeros(len(documents), dtype=np.int64))
    document, start, fresh, length = (one[order] for one in (document, first + 1, end - scored, length))
    # A stretch's windows tell by all that they hold whose text it is, and not by what another request's hold.
    return EvaluationSet(shard, document, start, fresh, length, repeats_bos=False, evidence=start), order
