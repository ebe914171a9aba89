"""Evaluation windows: every token of a held-out document scored once, with nearly as much context as there is.

W windows, S positions (``context``). In a document ``d`` with BOS at position 0, window ``k`` starts at position
``p = 1 + k * (S // 2)``: its inputs are BOS and ``d[p : p + S - 1]``, its targets ``d[p : p + S]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from lifelong_moe.data.shards import TokenShard


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Windows over held-out documents, longest first, so that batches pad little."""

    shard: TokenShard
    token_ids: np.ndarray
    """Inputs, int64 ``(W, S)``; every row begins with BOS."""
    target_ids: np.ndarray
    """int64 ``(W, S)``; never BOS where scored."""
    scored: np.ndarray
    """bool ``(W, S)``: this target counts. Each non-BOS token of an included document counts exactly once."""
    valid: np.ndarray
    """bool ``(W, S)``: False on padding, which holds 0 and lies at the end of a row."""
    group_ids: np.ndarray
    """int64 ``(W, S)``, aligned with the inputs; 0 until ``with_groups``."""
    document: np.ndarray
    """The window's document in the shard, int64 ``(W,)``."""
    start: np.ndarray
    """Position in the document of the token after the window's BOS, int64 ``(W,)``; 1 for a first window."""

    @property
    def num_tokens(self) -> int:
        """Scored tokens."""
        return int(self.scored.sum())

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the included documents' source texts: exactly the text that the scored tokens stand for."""
        return int(self.shard.text_bytes[np.unique(self.document)].sum())

    @property
    def num_documents(self) -> int:
        """Included documents."""
        return len(np.unique(self.document))

    def with_groups(self, per_document_ids: Callable[[np.ndarray], np.ndarray]) -> EvaluationSet:
        """Return the same windows with each token's cluster or label.

        Ids are made from the whole document and then sliced, so that a window sees what the text before it decided.

        Args:
            per_document_ids: Called once per document with its token ids ``(n,)``, BOS first; returns ``(n,)`` ids.

        Raises:
            ValueError: It returned another shape.
        """
        group_ids = np.zeros_like(self.group_ids)
        for index in np.unique(self.document):
            tokens = self.shard.document(int(index))
            ids = np.asarray(per_document_ids(tokens))
            if ids.shape != tokens.shape:
                raise ValueError(f"{ids.shape} group ids for {tokens.shape} tokens of document {index}")
            for row in np.flatnonzero(self.document == index):
                start, length = int(self.start[row]), int(self.valid[row].sum())
                # A repeated BOS carries what the document's own BOS carries.
                group_ids[row, 0] = ids[0]
                group_ids[row, 1:length] = ids[start : start + length - 1]
        return replace(self, group_ids=group_ids)


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
    spans: list[tuple[int, int, int]] = []  # document, start, first position that is scored
    total = 0
    for index in range(shard.num_documents):
        if total >= max_tokens:
            break
        length = int(shard.offsets[index + 1] - shard.offsets[index])
        spans += [(index, start, fresh) for start, fresh in _starts(length, context)]
        total += length - 1
    if not spans:
        raise ValueError("the held-out documents hold no token to score")
    return _fill(shard, context, spans)


def _starts(length: int, context: int) -> list[tuple[int, int]]:
    """Return (start, first newly covered position) of each window over a document of ``length`` tokens."""
    starts: list[tuple[int, int]] = []
    covered = 1
    while covered < length:
        start = 1 + len(starts) * (context // 2)
        starts.append((start, covered))
        covered = start + context
    return starts


def _fill(shard: TokenShard, context: int, spans: list[tuple[int, int, int]]) -> EvaluationSet:
    document, start, fresh = np.array(spans, dtype=np.int64).T
    lengths = np.minimum(context, (shard.offsets[document + 1] - shard.offsets[document]) - start)
    order = np.argsort(-lengths, kind="stable")
    document, start, fresh, lengths = document[order], start[order], fresh[order], lengths[order]
    positions = np.arange(context)
    valid = positions < lengths[:, None]
    token_ids = np.zeros(valid.shape, dtype=np.int64)
    target_ids = np.zeros(valid.shape, dtype=np.int64)
    for row, (index, first, length) in enumerate(zip(document, start, lengths, strict=True)):
        tokens = shard.document(int(index))
        token_ids[row, 0] = tokens[0]
        token_ids[row, 1:length] = tokens[first : first + length - 1]
        target_ids[row, :length] = tokens[first : first + length]
    scored = valid & (start[:, None] + positions >= fresh[:, None])
    if shard.separator is not None:  # a pair is one window, so what comes after its separator is its answer
        scored &= np.cumsum(token_ids == shard.separator, axis=1) > 0
    return EvaluationSet(
        shard=shard,
        token_ids=token_ids,
        target_ids=target_ids,
        scored=scored,
        valid=valid,
        group_ids=np.zeros(valid.shape, dtype=np.int64),
        document=document,
        start=start,
    )
