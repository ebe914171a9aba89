"""What a document is about, as a vector that can be computed from its beginning alone.

Shapes: N tokens or documents, V vocabulary size, D feature width, C chunks. tf-idf followed by a truncated SVD is
linear before the last normalization, so a text's feature is the normalized sum of one fixed row per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.clustering.batches import TokenIds, batches, checked_ids, count_matrix, token_matrix
from lifelong_moe.clustering.kmeans import Floats, one_thread, unit_rows
from lifelong_moe.errors import DataError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

NOISE = 1e-6
"""Directions whose singular value is below this share of the largest are rounding errors, and are left out."""


def evenly_spread(documents: Sequence[TokenIds], most: int) -> list[TokenIds]:
    """At most ``most`` documents, every n-th from the first on; the others are not read."""
    return [documents[i] for i in range(0, len(documents), max(1, -(-len(documents) // most)))]


def fit_tfidf(documents: Iterable[TokenIds], vocab_size: int, width: int, *, seed: int) -> Floats:
    """Fit one row per token, such that a text's feature is the normalized sum of its tokens' rows.

    Term frequency is the plain count; ``idf = ln((1 + N) / (1 + document frequency)) + 1``; documents are normalized,
    then reduced by a truncated SVD. Row ``v`` is ``idf_v`` times token ``v``'s entries of the right singular vectors.
    The documents' counts are held in memory as a sparse matrix: of a large corpus give a sample.

    Args:
        documents: Token ids of each whole document, integer ``(length,)``. Empty ones count in nothing.
        vocab_size: V.
        width: D asked for; less comes back if the vocabulary, the documents or what they span have fewer dimensions.
        seed: Of the randomized SVD. Same seed, same bits, signs included.

    Returns:
        Projection, float32 ``(V, D)``.

    Raises:
        DataError: If there is no document with a token.
        ValueError: If a token id is outside the vocabulary or ``width < 1``.

    Source:
        c-BTM (arXiv:2303.14177), section 3.1; scikit-learn's smooth idf; Halko et al. 2011.
    """
    # Imported where something is fitted: features of a text are only sums of rows.
    from sklearn.utils.extmath import randomized_svd

    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    weighted_NV = _counts(documents, vocab_size)
    containing_V = np.bincount(weighted_NV.indices, minlength=vocab_size)  # documents in which each token occurs
    idf_V = np.log((1 + weighted_NV.shape[0]) / (1 + containing_V)) + 1
    _weigh(weighted_NV, idf_V)
    with one_thread():
        _, singular_D, components_DV = randomized_svd(
            weighted_NV, min(width, *weighted_NV.shape), random_state=seed % 2**32
        )
    components_DV = components_DV[singular_D > NOISE * singular_D[0]]
    return np.ascontiguousarray((components_DV * idf_V).T, np.float32)


def document_features(documents: Iterable[TokenIds], projection_VD: Floats) -> Floats:
    """Features of whole documents, to fit centroids on; an unread text must use `prefix_features`.

    Args:
        documents: Token ids of each, integer ``(length,)``.
        projection_VD: From `fit_tfidf`.

    Returns:
        float32 ``(N, D)``, rows of unit length, or of zeros for an empty document.

    Raises:
        ValueError: If a token id is outside the vocabulary.
    """
    rows_VD = projection_VD.astype(np.float64)
    # Each row sums its tokens in reading order, so its bits do not depend on what it is batched with.
    rows = [unit_rows(token_matrix(batch, len(rows_VD)) @ rows_VD) for batch in batches(documents)]
    return np.concatenate(rows) if rows else np.zeros((0, projection_VD.shape[1]), np.float32)


def prefix_features(documents: Sequence[TokenIds], projection_VD: Floats, chunk: int) -> Floats:
    """Feature of what precedes each chunk of its document: row ``c`` sums the tokens before ``c * chunk``, none after.

    Args:
        documents: Token ids of each in order, integer ``(length,)``; at least one.
        projection_VD: From `fit_tfidf`, float32 ``(V, D)``.
        chunk: Tokens per chunk, at least 1.

    Returns:
        float32 ``(C, D)``, document after document, rows of unit length; zeros for a chunk 0, since nothing precedes
        it. A row's bits do not change with any later token, nor with how many there are, nor with other documents.

    Raises:
        ValueError: If ``chunk < 1`` or a token id is outside the vocabulary.
    """
    return unit_rows(prefix_sums(documents, projection_VD, chunk))


def prefix_sums(documents: Sequence[TokenIds], table_VD: NDArray[np.floating], chunk: int) -> NDArray[np.float64]:
    """Sum of one row per token over what precedes each chunk of its document; see `prefix_features`.

    Args:
        documents: Token ids of each, integer ``(length,)``; at least one.
        table_VD: Row of each token, float ``(V, D)``.
        chunk: Tokens per chunk, at least 1.

    Returns:
        float64 ``(C, D)``, document after document: the sum of a long text must not swallow new terms. A row's bits do
        not depend on the other documents.

    Raises:
        ValueError: If ``chunk < 1`` or a token id is outside the vocabulary.
    """
    chunks_N = num_chunks(documents, chunk)
    ids = checked_ids(np.concatenate(documents), len(table_VD))
    borders = np.cumsum([len(document) for document in documents]).tolist()
    # What a document's last chunk holds precedes none, so that only whole chunks count.
    wholes = np.maximum(chunks_N - 1, 0).tolist()
    begins = zip([0, *borders], wholes, strict=False)
    whole_chunks = np.concatenate([ids[begin : begin + whole * chunk] for begin, whole in begins]).reshape(-1, chunk)
    chunk_sums_CD = np.zeros((len(whole_chunks), table_VD.shape[1]))
    # Position by position, all chunks at once: each sum is made in reading order, whatever the shape.
    for position in range(chunk if len(whole_chunks) else 0):
        chunk_sums_CD += table_VD[whole_chunks[:, position]]
    sums_CD = np.zeros((int(chunks_N.sum()), table_VD.shape[1]))
    source = to = 0
    for whole, chunks in zip(wholes, chunks_N.tolist(), strict=True):
        if whole:
            np.cumsum(chunk_sums_CD[source : source + whole], axis=0, out=sums_CD[to + 1 : to + chunks])
        source, to = source + whole, to + chunks
    return sums_CD


def num_chunks(documents: Sequence[TokenIds], chunk: int) -> NDArray[np.int64]:
    """Chunks of each document, the last of which may be short, int64 ``(N,)``.

    Raises:
        ValueError: If ``chunk < 1``.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    return np.array([-(-len(document) // chunk) for document in documents], np.int64)


def _counts(documents: Iterable[TokenIds], vocab_size: int) -> csr_array:
    """Token counts, float64 sparse ``(N, V)`` with sorted, distinct columns."""
    from scipy.sparse import csr_array, vstack

    matrices = [count_matrix(batch, vocab_size) for batch in batches(d for d in documents if len(d))]
    if not matrices:
        raise DataError("no document holds a token, so there is nothing to fit document features on.")
    return csr_array(vstack(matrices, format="csr"))


def _weigh(counts_NV: csr_array, idf_V: NDArray[np.float64]) -> None:
    """Turn counts into tf-idf rows of unit length, in place."""
    counts_NV.data *= idf_V[counts_NV.indices]
    length_N = np.sqrt(np.add.reduceat(counts_NV.data**2, counts_NV.indptr[:-1]))
    counts_NV.data /= np.repeat(length_N, np.diff(counts_NV.indptr))
