"""What a token is like, from the company it keeps: an embedding that exists before any model is trained.

Shapes: N tokens of the stream, V vocabulary size, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.clustering.batches import TokenIds
from lifelong_moe.clustering.kmeans import Floats, one_thread, unit_rows
from lifelong_moe.errors import DataError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

SMOOTHING = 0.75
"""Exponent on context counts; without it rare contexts get the largest mutual information."""
PIECE_TOKENS = 1 << 20
"""Tokens whose pairs are counted at a time; bounds memory."""


def token_embedding(parts: Sequence[TokenIds], vocab_size: int, width: int, *, seed: int, window: int = 4) -> Floats:
    """Embed each token of the vocabulary by what stands near it.

    Positive pointwise mutual information ``max(0, ln(P(w, c) / (P(w) · P_0.75(c))))`` over a symmetric window, then a
    truncated SVD, rows ``U · sqrt(S)`` normalized.

    Args:
        parts: Token ids in order, one stream in consecutive parts, integer ``(n,)`` each. They may be mapped files:
            a piece is in memory at a time. Borders between documents are not known here; a pair across one is noise
            of ``window / document length``.
        vocab_size: V.
        width: D. Columns beyond the vocabulary's size are zeros.
        seed: Of the randomized SVD and of the rows of tokens that were not seen.
        window: Neighbours on each side.

    Returns:
        float32 ``(V, D)``, rows of unit length. A token without any informative neighbour gets a pseudo-random row that
        depends on seed, V, D and token only.

    Raises:
        DataError: If the stream holds fewer than two tokens.
        ValueError: If a token id is outside the vocabulary, or ``width`` or ``window`` is below 1.

    Source:
        Levy & Goldberg 2014 (factorization of PPMI) and Levy, Goldberg & Dagan 2015 (smoothing 0.75, ``sqrt(S)``).
    """
    from sklearn.utils.extmath import randomized_svd  # as in ``documents.py``

    if width < 1 or window < 1:
        raise ValueError(f"width and window must be at least 1, got {width} and {window}")
    if (total := sum(map(len, parts))) < 2:
        raise DataError(f"token embeddings need at least two tokens, but the stream holds {total}.")
    information_VV = _ppmi(_pair_counts(parts, vocab_size, window))
    embedding_VD = np.zeros((vocab_size, width))
    if information_VV.nnz:
        with one_thread():
            left_VR, singular_R, _ = randomized_svd(information_VV, min(width, vocab_size), random_state=seed % 2**32)
        # Half of the spectrum on each side (Levy et al. 2015).
        embedding_VD[:, : len(singular_R)] = left_VR * np.sqrt(singular_R)
        # Where a token has no neighbours U holds rounding errors.
        embedding_VD[np.diff(information_VV.indptr) == 0] = 0.0
    # Zeros would all fall into one cluster.
    random_VD = np.random.default_rng(seed).standard_normal((vocab_size, width))
    return unit_rows(np.where(embedding_VD.any(axis=1, keepdims=True), embedding_VD, random_VD))


def _pair_counts(parts: Iterable[TokenIds], vocab_size: int, window: int) -> csr_array:
    """How often two tokens stand at most ``window`` apart, float64 sparse ``(V, V)``, symmetric."""
    from scipy.sparse import coo_array, csr_array

    total_VV = csr_array((vocab_size, vocab_size), dtype=np.float64)
    before = np.zeros(0, np.int64)  # what precedes a piece, as far as the window reaches
    for piece in pieces(parts, vocab_size):
        ids = np.concatenate([before, piece])
        for distance in range(1, min(window, len(ids) - 1) + 1):
            # Each pair is counted once, in the piece of its right token; sums of ones are exact in any order.
            first = max(len(before), distance)
            pairs = (ids[first - distance : len(ids) - distance], ids[first:])
            total_VV = total_VV + coo_array((np.ones(len(pairs[0])), pairs), shape=(vocab_size, vocab_size)).tocsr()
        before = ids[-window:]
    # Counted to the right; the window is symmetric.
    return csr_array(total_VV + total_VV.T)


def pieces(parts: Iterable[TokenIds], vocab_size: int) -> Iterator[NDArray[np.int64]]:
    """Token ids a piece at a time, so that mapped files are never in memory as a whole.

    Raises:
        ValueError: If a token id is outside the vocabulary.
    """
    for part in parts:
        for begin in range(0, len(part), PIECE_TOKENS):
            piece = part[begin : begin + PIECE_TOKENS].astype(np.int64)
            if piece.min() < 0 or piece.max() >= vocab_size:
                raise ValueError(f"token ids must be in [0, {vocab_size}), got {piece.min()} to {piece.max()}")
            yield piece


def _ppmi(pairs_VV: csr_array) -> csr_array:
    from scipy.sparse import csr_array

    count_V = np.asarray(pairs_VV.sum(axis=1)).ravel()
    context_V = count_V**SMOOTHING
    context_V /= context_V.sum()
    entries = pairs_VV.tocoo()
    rows, columns = entries.coords
    information = np.log(entries.data / (count_V[rows] * context_V[columns]))
    # Pairs that are rarer than chance count as unrelated: estimates of small counts are noise.
    informative = information > 0
    return csr_array((information[informative], (rows[informative], columns[informative])), shape=pairs_VV.shape)
