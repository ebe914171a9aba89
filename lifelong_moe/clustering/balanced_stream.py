"""Balanced assignment of more rows than fit in memory: prices from a sample, then row after row at those prices.

Shapes: N rows of a batch, M rows of the sample, D feature width, K clusters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.clustering.balanced import balance
from lifelong_moe.clustering.kmeans import Floats, Labels, similarity, unit_rows

BLOCK = 4096
"""Rows whose similarities are held at a time, int64 ``(BLOCK, K)``."""

CLOSED = np.iinfo(np.int64).max // 4
"""Price of a cluster that is full: above all others, and far from overflow."""


def sample_prices(features_MD: NDArray[np.floating], centroids_KD: NDArray[np.floating]) -> Labels:
    """Prices at which a sample's rows, each choosing its largest ``similarity - price``, spread evenly or nearly so.

    Takes memory O(M · K), whatever the size of the corpus that the sample stands for. With m rows a cluster, the
    corpus's cluster sizes at these prices are off by a share of about ``m ** -0.5``.

    Args:
        features_MD: Float ``(M, D)``, at least one row; normalized inside.
        centroids_KD: Float ``(K, D)``; normalized inside.

    Returns:
        int64 ``(K,)`` in units of ``1 / kmeans.UNIT``.
    """
    similarity_MK = similarity(unit_rows(features_MD), unit_rows(centroids_KD))
    return balance(similarity_MK, np.zeros(len(centroids_KD), np.int64))[1]


def assign_in_order(
    feature_batches: Iterable[Floats], centroids_KD: NDArray[np.floating], prices_K: Labels, num_rows: int
) -> Iterator[Labels]:
    """Give each row in turn the cluster of largest ``similarity - price`` among those that still have room.

    A cluster closes for good once it holds ``ceil(num_rows / K)`` rows; ties go to the lowest index. A row's cluster
    depends on the rows before it, never on how they are batched. Unlike `balanced.balanced_assign` the total
    similarity is the largest only if the prices let no cluster fill up before the end.

    Args:
        feature_batches: float32 ``(N, D)`` each, in all at most ``num_rows`` rows; normalized inside.
        centroids_KD: Float ``(K, D)``; normalized inside.
        prices_K: From `sample_prices`.
        num_rows: Of the whole corpus.

    Yields:
        int64 ``(N,)`` for each batch.

    Raises:
        ValueError: If a value is not finite, there is no centroid, the widths differ, or there are more rows than
            ``num_rows``.
    """
    if len(centroids_KD) == 0:
        raise ValueError("there must be at least one centroid to assign to")
    unit_KD, prices_K = unit_rows(centroids_KD), prices_K.copy()
    room_K = np.full(len(unit_KD), -(-num_rows // len(unit_KD)))
    seen = 0
    for features_ND in feature_batches:
        seen += len(features_ND)
        if seen > num_rows:
            raise ValueError(f"there are more rows than the {num_rows} that room was made for")
        labels_N = np.empty(len(features_ND), np.int64)
        for start in range(0, len(features_ND), BLOCK):
            block = slice(start, start + BLOCK)
            labels_N[block] = _fill(similarity(unit_rows(features_ND[block]), unit_KD), prices_K, room_K)
        yield labels_N


def _fill(similarity_NK: Labels, prices_K: Labels, room_K: Labels) -> Labels:
    """Assign rows in order; takes the room that they need and closes full clusters, in place."""
    labels_N = np.empty(len(similarity_NK), np.int64)
    begin = 0
    while begin < len(labels_N):
        prices_K[room_K == 0] = CLOSED
        chosen_M = (similarity_NK[begin:] - prices_K).argmax(axis=1)
        # Choices hold up to the row that takes some cluster's last place; those after it choose again without it.
        end = min(_last_place(chosen_M, cluster, room) for cluster, room in enumerate(room_K.tolist()))
        labels_N[begin : begin + end] = chosen_M[:end]
        room_K -= np.bincount(chosen_M[:end], minlength=len(room_K))
        begin += end
    return labels_N


def _last_place(chosen_M: Labels, cluster: int, room: int) -> int:
    """Rows up to and with the one that takes the cluster's last place; all of them if it never comes to that."""
    takers = np.flatnonzero(chosen_M == cluster)
    return int(takers[room - 1]) + 1 if 0 < room <= len(takers) else len(chosen_M)
