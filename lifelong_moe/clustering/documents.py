"""What a document is about, as a vector that can be computed from its beginning alone.

Shapes: N tokens or documents, V vocabulary size, D feature width, C chunks. tf-idf followed by a truncated SVD is
linear before the last normalization, so a text's feature is the normalized sum of one fixed row per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.utils.extmath import randomized_svd

from lifelong_moe.clustering.kmeans import Floats, one_thread, unit_rows
from lifelong_moe.errors import DataError

TokenIds = NDArray[np.integer]

NOISE = 1e-6
"""Directions whose singular value is below this share of the largest are rounding errors, and are left out."""


def fit_tfidf(documents: Sequence[TokenIds], vocab_size: int, width: int, *, seed: int) -> Floats:
    """Fit one row per token, such that a text's feature is the normalized sum of its tokens' rows.

    Term frequency is the plain count; ``idf = ln((1 + N) / (1 + document frequency)) + 1``; documents are normalized,
    then reduced by a truncated SVD. Row ``v`` is ``idf_v`` times token ``v``'s entries of the right singular vectors.

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
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    counts_NV = _counts([document for document in documents if len(document)], vocab_size)
    num_documents = counts_NV.shape[0]
    document_frequency_V = np.bincount(counts_NV.indices, minlength=vocab_size)
    idf_V = np.log((1 + num_documents) / (1 + document_frequency_V)) + 1
    weighted_NV = counts_NV.copy()
    weighted_NV.data *= idf_V[counts_NV.indices]
    length_N = np.sqrt(np.add.reduceat(weighted_NV.data**2, weighted_NV.indptr[:-1]))
    weighted_NV.data /= np.repeat(length_N, np.diff(weighted_NV.indptr))
    with one_thread():
        _, singular_D, components_DV = randomized_svd(
            weighted_NV, min(width, *weighted_NV.shape), random_state=seed % 2**32
        )
    components_DV = components_DV[singular_D > NOISE * singular_D[0]]
    return np.ascontiguousarray((components_DV * idf_V).T, np.float32)


def document_features(documents: Sequence[TokenIds], projection_VD: Floats) -> Floats:
    """Features of whole documents, to fit centroids on; an unread text must use `prefix_features`.

    Args:
        documents: Token ids of each, integer ``(length,)``.
        projection_VD: From `fit_tfidf`.

    Returns:
        float32 ``(N, D)``, rows of unit length, or of zeros for an empty document.

    Raises:
        ValueError: If a token id is outside the vocabulary.
    """
    sums_ND = np.zeros((len(documents), projection_VD.shape[1]))
    for row, document in enumerate(documents):
        ids_U, counts_U = np.unique(_checked(document, len(projection_VD)), return_counts=True)
        sums_ND[row] = (projection_VD[ids_U].astype(np.float64) * counts_U[:, None]).sum(axis=0)
    return unit_rows(sums_ND)


def prefix_features(token_ids_N: TokenIds, projection_VD: Floats, chunk: int) -> Floats:
    """Feature of what precedes each chunk of a document: row ``c`` sums the tokens before ``c * chunk``, none after.

    Args:
        token_ids_N: One document's token ids in order, integer ``(N,)``.
        projection_VD: From `fit_tfidf`, float32 ``(V, D)``.
        chunk: Tokens per chunk, at least 1.

    Returns:
        float32 ``(ceil(N / chunk), D)``, rows of unit length; row 0 is zeros, since nothing precedes it. A row's bits
        do not change with any later token, nor with how many there are.

    Raises:
        ValueError: If ``chunk < 1`` or a token id is outside the vocabulary.
    """
    return unit_rows(prefix_sums(token_ids_N, projection_VD, chunk))


def prefix_sums(token_ids_N: TokenIds, table_VD: NDArray[np.floating], chunk: int) -> NDArray[np.float64]:
    """Sum of one row per token over what precedes each chunk; see `prefix_features`.

    Returns:
        float64 ``(ceil(N / chunk), D)``: the sum of a long text must not swallow new terms.

    Raises:
        ValueError: If ``chunk < 1`` or a token id is outside the vocabulary.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    token_ids_N = _checked(token_ids_N, len(table_VD))
    num_chunks = -(-len(token_ids_N) // chunk)
    sums_CD = np.zeros((num_chunks, table_VD.shape[1]))
    if num_chunks > 1:
        whole_chunks = token_ids_N[: (num_chunks - 1) * chunk].reshape(num_chunks - 1, chunk)
        # Position by position, all chunks at once: each sum is made in reading order, whatever the shape.
        for position in range(chunk):
            sums_CD[1:] += table_VD[whole_chunks[:, position]]
    return np.cumsum(sums_CD, axis=0)


def _counts(documents: Sequence[TokenIds], vocab_size: int) -> csr_array:
    """Token counts, float64 sparse ``(N, V)`` with sorted, distinct columns."""
    if not documents:
        raise DataError("no document holds a token, so there is nothing to fit document features on.")
    ids = _checked(np.concatenate(documents), vocab_size)
    borders = np.concatenate([[0], np.cumsum([len(document) for document in documents])])
    counts_NV = csr_array((np.ones(len(ids)), ids, borders), shape=(len(documents), vocab_size))
    counts_NV.sum_duplicates()
    return counts_NV


def _checked(token_ids: TokenIds, vocab_size: int) -> TokenIds:
    if len(token_ids) and (token_ids.min() < 0 or token_ids.max() >= vocab_size):
        raise ValueError(f"token ids must be in [0, {vocab_size}), got {token_ids.min()} to {token_ids.max()}")
    return token_ids.astype(np.int64)
