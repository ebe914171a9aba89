"""Documents a batch at a time, as sparse token counts: what streams over a corpus holds one batch in memory.

Shapes: N documents of a batch, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array

TokenIds = NDArray[np.integer]

BATCH_DOCUMENTS = 1024
BATCH_TOKENS = 2**19
"""A batch ends as soon as it holds this many tokens; a document that is longer still makes a batch with what precedes
it."""


def batches(
    documents: Iterable[TokenIds], most_documents: int = BATCH_DOCUMENTS, enough_tokens: int = BATCH_TOKENS
) -> Iterator[list[TokenIds]]:
    """Split a stream of documents in order, reading no further than the batch in hand.

    Args:
        documents: Token ids of each, integer ``(length,)``.
        most_documents: In one batch, at least 1.
        enough_tokens: Tokens after which a batch ends, at least 1.

    Yields:
        Documents, at least one; nothing for an empty stream.

    Raises:
        ValueError: If a bound is below 1.
    """
    if most_documents < 1 or enough_tokens < 1:
        raise ValueError(f"a batch must hold at least 1 document and token, got {most_documents} and {enough_tokens}")
    batch: list[TokenIds] = []
    tokens = 0
    for document in documents:
        batch.append(document)
        tokens += len(document)
        if len(batch) == most_documents or tokens >= enough_tokens:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


def token_matrix(documents: list[TokenIds], vocab_size: int) -> csr_array:
    """One entry 1 per token in reading order, float64 sparse ``(N, V)``; a token that comes twice has two entries.

    Args:
        documents: At least one.
        vocab_size: V.

    Raises:
        ValueError: If a token id is outside the vocabulary.
    """
    from scipy.sparse import csr_array  # here, since most commands need no sparse matrix

    ids = checked_ids(np.concatenate(documents), vocab_size)
    borders = np.concatenate([[0], np.cumsum([len(document) for document in documents])])
    # Duplicates stay: a row is summed in reading order, one token after the other.
    return csr_array((np.ones(len(ids)), ids, borders), shape=(len(documents), vocab_size))


def count_matrix(documents: list[TokenIds], vocab_size: int) -> csr_array:
    """Token counts, float64 sparse ``(N, V)`` with sorted, distinct columns; see `token_matrix`."""
    counts_NV = token_matrix(documents, vocab_size)
    counts_NV.sum_duplicates()
    return counts_NV


def checked_ids(token_ids: TokenIds, vocab_size: int) -> NDArray[np.int64]:
    """The ids as int64.

    Raises:
        ValueError: If one is outside the vocabulary.
    """
    if len(token_ids) and (token_ids.min() < 0 or token_ids.max() >= vocab_size):
        raise ValueError(f"token ids must be in [0, {vocab_size}), got {token_ids.min()} to {token_ids.max()}")
    return token_ids.astype(np.int64)
