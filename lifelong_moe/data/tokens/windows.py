"""Evaluation windows: every token of a held-out document scored once, with nearly as much context as there is.

W windows, S positions (``context``), B of the windows, T tokens. In a document ``d`` with BOS at position 0, window
``k`` starts at position ``p = 1 + k * (S // 2)``: its inputs are BOS and ``d[p : p + S - 1]``, its targets
``d[p : p + S]``. After a pair's last token comes BOS, as in training: the end of the answer is scored as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.data.tokens.pairs import precedes_answer
from lifelong_moe.data.tokens.shards import TokenShard


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Windows over held-out documents, longest first, so that batches pad little. They are filled when asked for."""

    shard: TokenShard
    """The included documents, and nothing else."""
    document: NDArray[np.int64]
    """The window's document in the shard ``(W,)``."""
    start: NDArray[np.int64]
    """Position in the document of the token after the window's BOS ``(W,)``; 1 for a first window."""
    fresh: NDArray[np.int64]
    """Position of the first target that no earlier window scores ``(W,)``."""
    length: NDArray[np.int64]
    """Targets, and inputs, ``(W,)``; at most S."""
    domain_ids: NDArray[np.integer] | None = None
    """Domain of each token of the shard ``(T,)``; None is domain 0."""
    repeats_bos: bool = True
    """Whether a window begins with its document's BOS in place of the token there."""
    evidence: NDArray[np.int64] | None = None
    """Position of the first target that tells a mixture which generations explain the window's text ``(W,)``; then each
    window is a text of its own. None: ``fresh``, and a document's windows are one text."""

    def __post_init__(self) -> None:
        if self.domain_ids is not None and self.domain_ids.shape != (self.shard.num_tokens,):
            raise ValueError(f"{self.domain_ids.shape} domain ids for {self.shard.num_tokens} tokens")

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.document)

    @cached_property
    def counted(self) -> NDArray[np.bool_]:
        """Which tokens' successors are scored, bool ``(T,)``."""
        return counted_tokens(self.shard)

    @property
    def num_tokens(self) -> int:
        """Scored tokens."""
        return int(self.counted.sum())

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the included documents' source texts: exactly the text that the scored tokens stand for."""
        return int(self.shard.text_bytes[np.unique(self.document)].sum())

    @property
    def num_documents(self) -> int:
        """Included documents that have a token to score."""
        return len(np.unique(self.document))

    def texts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The text that each window belongs to, and its number among that text's windows, int64 ``(W,)`` each."""
        if self.evidence is not None:
            return np.arange(len(self)), np.zeros(len(self), dtype=np.int64)
        text_W = np.unique(self.document, return_inverse=True)[1]
        order = np.lexsort((self.start, text_W))
        first_W = np.searchsorted(text_W[order], text_W[order])
        number_W = np.empty_like(text_W)
        number_W[order] = np.arange(len(self)) - first_W
        return text_W, number_W

    def batch(self, rows: slice | NDArray[np.int64]) -> dict[str, NDArray[np.int64] | NDArray[np.bool_]]:
        """Fill some windows, as long as the longest of them, ``(B, S)`` each.

        Returns:
            ``token_ids`` and ``target_ids``, int64; ``valid``, False on padding, which holds 0 and lies at the end of
            a row; ``scored``, where a target counts, which each token does in one window; ``evidence``, where a target
            tells whose text it is, which all that are scored do; ``domain_ids``, int64, of which a repeated BOS carries
            what the document's own BOS carries.
        """
        document_B, start_B1, length_B1 = self.document[rows], self.start[rows, None], self.length[rows, None]
        tokens, first_B1 = self.shard.tokens, self.shard.offsets[document_B, None]
        columns_S = np.arange(length_B1.max())
        valid_BS = columns_S < length_B1
        # The token before each target; padding reads the document's BOS, so that no index leaves the shard.
        before_BS = np.where(valid_BS, first_B1 + start_B1 - 1 + columns_S, first_B1)
        # Every window begins with the document's BOS, as every text in training does.
        inputs_BS = np.where(columns_S > 0, before_BS, first_B1) if self.repeats_bos else before_BS
        after_BS = before_BS + 1
        is_end_BS = after_BS == self.shard.offsets[document_B + 1, None]
        # At the end of a document its own BOS stands for the next one's: the id is the same.
        targets_BS = tokens[np.where(is_end_BS, first_B1, after_BS)]
        domains_BS = np.zeros_like(before_BS) if self.domain_ids is None else self.domain_ids[inputs_BS]
        fresh_BS = start_B1 + columns_S >= self.fresh[rows, None]
        told_BS = fresh_BS if self.evidence is None else start_B1 + columns_S >= self.evidence[rows, None]
        return {
            "token_ids": np.where(valid_BS, tokens[inputs_BS], 0).astype(np.int64),
            "target_ids": np.where(valid_BS, targets_BS, 0).astype(np.int64),
            "valid": valid_BS,
            "scored": valid_BS & fresh_BS & self.counted[before_BS],
            "evidence": valid_BS & told_BS,
            "domain_ids": np.where(valid_BS, domains_BS, 0).astype(np.int64),
        }


def counted_tokens(shard: TokenShard) -> NDArray[np.bool_]:
    """Which tokens' successors are scored: all but a document's last, or those that an answer, or its end, follows."""
    if shard.separator is not None:
        return precedes_answer(shard.tokens, shard.offsets, shard.separator)
    counted = np.ones(shard.num_tokens, dtype=np.bool_)
    # What follows a document's last token is another document, which it cannot predict.
    counted[shard.offsets[1:] - 1] = False
    return counted


def evaluation_windows(shard: TokenShard, context: int, max_tokens: int) -> EvaluationSet:
    """Cut held-out documents, in order, into overlapping windows until ``max_tokens`` tokens are scored.

    Args:
        shard: Held-out documents.
        context: Positions a window (S), at least 2. The stride is half of it.
        max_tokens: Whole documents are taken until at least this many tokens are scored, or all are.

    Raises:
        ValueError: ``context`` or ``max_tokens`` is too small, or no document has a token to score.
    """
    if context < 2 or max_tokens < 1:
        raise ValueError(f"context={context} must be at least 2 and max_tokens={max_tokens} at least 1")
    scored_to = np.concatenate([[0], np.cumsum(counted_tokens(shard))])[
        shard.offsets[1:]
    ]  # up to the end of each document
    shard = first_documents(shard, min(shard.num_documents, int(np.searchsorted(scored_to, max_tokens)) + 1))
    # A pair has one target more: the BOS after its answer.
    targets_D = np.diff(shard.offsets) - (shard.separator is None)
    stride = context // 2
    # -(-a // b) rounds up: after the first window each one adds `stride` new targets.
    windows_D = np.where(targets_D > 0, 1 + np.maximum(0, -(-(targets_D - context) // stride)), 0)
    if not windows_D.any():
        raise ValueError("the held-out documents hold no token to score")
    document = np.repeat(np.arange(shard.num_documents), windows_D)
    number = np.arange(len(document)) - np.repeat(np.cumsum(windows_D) - windows_D, windows_D)
    start = 1 + number * stride
    # Where the previous window ended: it began one stride earlier and is `context` long.
    fresh = np.where(number == 0, 1, start - stride + context)
    length = np.minimum(context, targets_D[document] + 1 - start)
    # Stable, so that equal lengths stay in order of the text on every machine.
    order = np.argsort(-length, kind="stable")
    return EvaluationSet(shard, document[order], start[order], fresh[order], length[order])


def first_documents(shard: TokenShard, num: int) -> TokenShard:
    """The first ``num`` documents of a shard."""
    offsets = shard.offsets[: num + 1]
    return replace(shard, tokens=shard.tokens[: offsets[-1]], offsets=offsets, text_bytes=shard.text_bytes[:num])
