"""Text sampled from the previous stage's model, to distil on or replay where no old text is kept.

Legend: B blocks written at a time, S tokens fed to a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lifelong_moe.config.retention import WRITTEN_AT_ONCE
from lifelong_moe.model.cache import KeyValueCache
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture

DomainIdsOf = Callable[[NDArray[np.int64]], NDArray[np.int64]]
"""Tokens of one document so far, BOS first, int64 ``(N,)`` to their domains, int64 ``(N,)``."""


@torch.no_grad()
def generate_blocks(
    model: LanguageModel,
    num_blocks: int,
    *,
    context: int,
    seed: int,
    batch_size: int = WRITTEN_AT_ONCE,
    ends: Collection[int] = (),
    domain_ids_of: DomainIdsOf | None = None,
) -> NDArray[np.int64]:
    """Sample packed blocks: BOS, then the model's text; a sampled BOS starts a new document.

    Documents end as the model's training text did, since the next document's BOS is the target of a document's last
    token. With ``model.document_mask`` they do not see each other, as in training; positions count through the block
    either way. The end of a block cuts its last document. Training text runs on in the next block; here each block
    begins with BOS, and blocks that run on kept as much of the old text (docs/results.md).

    A pure function of weights and arguments on one device. Each block has its own random numbers, so that neither
    ``num_blocks`` nor ``batch_size`` changes it, except for rounding in products of another size.

    Args:
        model: On any device; used in evaluation mode and left in its own.
        num_blocks: How many.
        context: Tokens of a training block (S). It costs ``num_blocks * context`` tokens' forward passes.
        seed: Of the sampling, not negative.
        batch_size: Blocks written at a time; bounds memory.
        ends: Tokens besides BOS with which a model that others trained ends its documents. BOS is written in their
            place: here the next document's BOS ends one, and what such a model writes after its own end is no text.
        domain_ids_of: Returns domains where routing has them (``DocumentClusters.domain_ids``, or a label's constant);
            asked every ``routing.chunk_tokens`` tokens of a document only. None means domain 0.

    Returns:
        int64 ``(num_blocks, context + 1)``: inputs are all columns but the last, targets all but the first.

    Raises:
        ValueError: If ``context`` or ``batch_size`` is not positive.

    Source:
        Sun et al. 2020 (LAMOL, arXiv:1909.03329): a language model replays text of its own. There it learns to
        write whole examples from a task's own start token; here it begins at BOS like any document.
    """
    if context < 1 or batch_size < 1:
        raise ValueError(f"context={context} and batch_size={batch_size} must be positive")
    blocks = np.full((num_blocks, context + 1), model.architecture.bos_id, dtype=np.int64)
    training = model.training
    model.eval()
    try:
        for start in range(0, num_blocks, batch_size):
            part = blocks[start : start + batch_size]
            numbers = range(start, start + len(part))
            uniform_BS = np.stack([_uniform(seed, number, context) for number in numbers])
            _fill(model, part, uniform_BS, list(ends), domain_ids_of)
    finally:
        model.train(training)
    return blocks


def _uniform(seed: int, block: int, context: int) -> NDArray[np.float32]:
    """A block's random numbers in [0, 1)."""
    return np.random.default_rng(np.random.SeedSequence([seed, block])).random(context, dtype=np.float32)


def _fill(
    model: LanguageModel,
    tokens: NDArray[np.int64],
    uniform_BS: NDArray[np.float32],
    ends: list[int],
    domain_ids_of: DomainIdsOf | None,
) -> None:
    """Fill all columns of ``(B, S + 1)`` but the first, which is BOS, from left to right."""
    uniform = torch.from_numpy(uniform_BS).to(model.embedding.weight.device)
    documents = _Documents(len(tokens), model.architecture, domain_ids_of)
    cache = KeyValueCache(len(model.blocks), uniform_BS.shape[1])
    for t in range(uniform_BS.shape[1]):
        documents.read(tokens, t)
        logits_BV = _next_logits(model, tokens[:, t], documents, cache)
        sampled_B = sample_tokens(logits_BV, uniform[:, t]).cpu().numpy()
        tokens[:, t + 1] = np.where(np.isin(sampled_B, ends), model.architecture.bos_id, sampled_B)


def _next_logits(
    model: LanguageModel, token_ids_B: NDArray[np.int64], documents: _Documents, cache: KeyValueCache
) -> Tensor:
    """Read one more token of each row: float32 logits ``(B, V)`` of the next one."""
    device = model.embedding.weight.device
    columns = (token_ids_B, documents.begins, documents.domains)
    token_ids, document_ids, domain_ids = (torch.tensor(ids_B, device=device).unsqueeze(1) for ids_B in columns)
    output = model(TokenBatch(token_ids, document_ids, domain_ids), cache=cache)
    return model.head.logits(output.hidden_BSD[:, -1], domain_ids.squeeze(1)).float()


def sample_tokens(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Sample one token per row by inverting its cumulative distribution.

    Args:
        logits_BV: Float ``(B, V)``; ``-inf`` is never drawn.
        uniform_B: Numbers in [0, 1), float32 ``(B,)``.

    Returns:
        int64 ``(B,)``: the first token at which the cumulative probability exceeds the number.
    """
    # float64, or the sum over a large vocabulary would swallow rare tokens. It may miss 1 by a rounding error, so
    # it is its own measure; a float32 below 1 times it stays below it.
    cumulative_BV = logits_BV.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    threshold_B = uniform_B.double() * cumulative_BV[:, -1]
    return torch.searchsorted(cumulative_BV, threshold_B.unsqueeze(1), right=True).squeeze(1)


class _Documents:
    """The current document of each row, and its domain, decided anew at each chunk border of the document."""

    def __init__(self, num_rows: int, architecture: Architecture, domain_ids_of: DomainIdsOf | None) -> None:
        self.chunk, self.bos_id, self.domain_ids_of = (
            architecture.routing.chunk_tokens,
            architecture.bos_id,
            domain_ids_of,
        )
        self.begins = np.zeros(num_rows, dtype=np.int64)
        """Column of its BOS, which tells it from others, int64 ``(B,)``."""
        self.domains = np.zeros(num_rows, dtype=np.int64)
        """int64 ``(B,)``."""

    def read(self, tokens: NDArray[np.int64], t: int) -> None:
        """Advance to column ``t``; its domain depends on columns up to ``t`` only."""
        self.begins[tokens[:, t] == self.bos_id] = t
        if self.domain_ids_of is not None:
            for row in np.flatnonzero((t - self.begins) % self.chunk == 0):
                self.domains[row] = self.domain_ids_of(tokens[row, self.begins[row] : t + 1])[-1]
