"""Spherical k-means, and growing one by centroids that leave the old ones where they are.

Shapes: N rows, D feature width, K centroids. Everything here gives the same bits for any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.errors import DataError

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

ROWS_AT_ONCE = 4096
"""Rows that are normalized together."""

RESTARTS = 4
"""Seedings tried; the one with the largest total similarity wins. A single k-means++ seeding misses one of five clear
clusters in one case out of five."""

UNIT = 2**30
"""Similarities are compared in whole units of 2**-30, so that the last bits of a matrix product, which depend on how
many rows and threads took part, decide nothing and a tie is a tie."""


def spherical_kmeans(
    features_ND: NDArray[np.floating],
    k: int,
    *,
    seed: int,
    fixed_KD: NDArray[np.floating] | None = None,
    iterations: int = 20,
) -> Floats:
    """Find ``k`` directions around which the rows gather.

    With ``fixed_KD`` the clustering grows: points nearer to a fixed centroid belong to it and pull at no new one, and
    new centroids begin at points that the fixed ones serve badly. The first fit is FAISS's (k-means++ seeding); growing
    is done here, because FAISS's ``frozen_centroids`` returns zeros for a new centroid that no point prefers.

    Args:
        features_ND: Float ``(N, D)``, normalized inside. Rows of zeros have no direction and are left out.
        k: Centroids to find, at least 1.
        seed: Of the seedings; same seed, same bits.
        fixed_KD: Centroids that stay untouched, float ``(F, D)``, or None.
        iterations: Rounds of assignment and mean, per seeding.

    Returns:
        The ``k`` new centroids only, float32 ``(k, D)`` of unit length.

    Raises:
        DataError: If fewer than ``k`` rows have a direction.
        ValueError: If a value is not finite, ``k < 1``, or the widths differ.

    Source:
        Dhillon & Modha 2001 (spherical k-means); Arthur & Vassilvitskii 2007 (k-means++).
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    unit_ND = unit_rows(features_ND)
    if not (has_direction_N := unit_ND.any(axis=1)).all():
        unit_ND = unit_ND[has_direction_N]
    if len(unit_ND) < k:
        raise DataError(f"{k} clusters need at least {k} rows that are not all zero, but there are {len(unit_ND)}.")
    with one_thread():
        if fixed_KD is None or len(fixed_KD) == 0:
            return _fit(unit_ND, k, seed, iterations)
        return _grow(unit_ND.astype(np.float64), k, seed, unit_rows(fixed_KD), iterations)


def assign(features_ND: NDArray[np.floating], centroids_KD: NDArray[np.floating]) -> Labels:
    """Give each row the centroid with the largest inner product; ties go to the lowest index.

    Args:
        features_ND: Float ``(N, D)``; normalized inside. A row of zeros gets centroid 0.
        centroids_KD: Float ``(K, D)``; normalized inside.

    Returns:
        int64 ``(N,)``, which for a row depends on that row only, not on what it is batched with.

    Raises:
        ValueError: If a value is not finite, there is no centroid, or the widths differ.
    """
    if len(centroids_KD) == 0:
        raise ValueError("there must be at least one centroid to assign to")
    unit_ND, unit_KD = unit_rows(features_ND), unit_rows(centroids_KD)
    labels_N = np.empty(len(unit_ND), np.int64)
    # Blocks bound the float64 copy.
    for start in range(0, len(unit_ND), 65536):
        block = slice(start, start + 65536)
        labels_N[block] = similarity(unit_ND[block], unit_KD).argmax(axis=1)
    return labels_N


def churn(before_N: Labels, after_N: Labels) -> float:
    """Share of assignments that changed, from 0 to 1.

    Raises:
        ValueError: If the shapes differ or there is nothing to compare.
    """
    if before_N.shape != after_N.shape or before_N.size == 0:
        raise ValueError(f"churn needs two equal shapes with content, got {before_N.shape} and {after_N.shape}")
    return float(np.mean(before_N != after_N))


def unit_rows(rows_ND: NDArray[np.floating]) -> Floats:
    """Rows scaled to length 1, float32 ``(N, D)``; a row of zeros stays one.

    Raises:
        ValueError: If it is not a matrix, or a value is not finite.
    """
    rows_ND = np.asarray(rows_ND)
    if rows_ND.ndim != 2:
        raise ValueError(f"features must be a matrix of rows, got shape {rows_ND.shape}")
    unit_ND = np.empty(rows_ND.shape, np.float32)
    # Each row by itself; together, the steps in float64 would take eight times the memory of what they give.
    for start in range(0, len(rows_ND), ROWS_AT_ONCE):
        block = slice(start, start + ROWS_AT_ONCE)
        unit_ND[block] = _unit(np.asarray(rows_ND[block], np.float64))
    return unit_ND


def _unit(rows_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    if not np.isfinite(rows_ND).all():
        raise ValueError("features must be finite; found NaN or infinity")
    # Scaling by the largest entry first keeps the squares of tiny and of huge rows within range.
    largest_N1 = np.abs(rows_ND).max(axis=1, keepdims=True, initial=0.0)
    scaled_ND = rows_ND / np.where(largest_N1 > 0, largest_N1, 1.0)
    length_N1 = np.sqrt(np.sum(scaled_ND * scaled_ND, axis=1, keepdims=True))
    return scaled_ND / np.where(length_N1 > 0, length_N1, 1.0)


def similarity(unit_ND: NDArray[np.floating], unit_KD: NDArray[np.floating]) -> Labels:
    """Cosine similarities in whole units of ``1 / UNIT``, int64 ``(N, K)``.

    Raises:
        ValueError: If the widths differ.
    """
    if unit_ND.shape[1] != unit_KD.shape[1]:
        raise ValueError(f"features have width {unit_ND.shape[1]}, but centroids have width {unit_KD.shape[1]}")
    products_NK = np.asarray(unit_ND, np.float64) @ (np.asarray(unit_KD, np.float64).T * UNIT)
    return np.rint(products_NK, out=products_NK).astype(np.int64)


def mean_directions(unit_ND: NDArray[np.floating], labels_N: Labels, num_clusters: int) -> Floats:
    """Normalized sum of each cluster's rows, float32 ``(K, D)``; zeros where there are none or they cancel out."""
    from scipy.sparse import csr_array  # as for faiss below

    ones_N, rows_N = np.ones(len(labels_N)), np.arange(len(labels_N))
    members_KN = csr_array((ones_N, (labels_N, rows_N)), shape=(num_clusters, len(labels_N)))
    return unit_rows(members_KN @ np.asarray(unit_ND, np.float64))


@contextmanager
def one_thread() -> Iterator[None]:
    """Hold native code (FAISS, BLAS) to one thread: the same bits everywhere, and faster for small jobs."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):
        yield


def _fit(unit_ND: Floats, k: int, seed: int, iterations: int) -> Floats:
    # Imported where text is clustered: a model that was clustered long ago is opened without.
    import faiss

    # FAISS returns the rows themselves when there are exactly k; doubling all of them keeps to the one path.
    rows_ND = np.concatenate([unit_ND, unit_ND]) if len(unit_ND) == k else unit_ND
    kmeans = faiss.Kmeans(
        rows_ND.shape[1],
        k,
        niter=iterations,
        nredo=RESTARTS,
        # A negative seed would mean the clock.
        seed=seed % 2**31,
        spherical=True,
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
        min_points_per_centroid=1,
        # By default FAISS fits a sample.
        max_points_per_centroid=len(rows_ND),
    )
    kmeans.train(rows_ND)
    assert kmeans.centroids is not None
    return _replace_empty(unit_rows(kmeans.centroids), unit_ND)


def _grow(unit_ND: NDArray[np.float64], k: int, seed: int, fixed_FD: Floats, iterations: int) -> Floats:
    """Lloyd's rounds in which only the centroids after the first ``len(fixed_FD)`` move."""
    rng = np.random.default_rng(seed)
    best, best_total = fixed_FD, -np.inf
    for _ in range(RESTARTS):
        centroids_KD = _seed_beside(unit_ND, k, fixed_FD, rng)
        labels_N = np.full(len(unit_ND), -1)
        for _ in range(iterations):
            previous_N, labels_N = labels_N, similarity(unit_ND, centroids_KD).argmax(axis=1)
            if np.array_equal(previous_N, labels_N):
                break
            moved_KD = mean_directions(unit_ND, labels_N, len(centroids_KD))
            # Old centroids route old text: they must not move.
            moved_KD[: len(fixed_FD)] = fixed_FD
            centroids_KD = _replace_empty(moved_KD, unit_ND)
        total = similarity(unit_ND, centroids_KD).max(axis=1).sum()
        if total > best_total:
            best, best_total = centroids_KD, total
    return best[len(fixed_FD) :]


def _seed_beside(unit_ND: NDArray[np.float64], k: int, fixed_FD: Floats, rng: np.random.Generator) -> Floats:
    """k-means++: append rows drawn with probability proportional to their squared distance from what is there."""
    centroids_KD = fixed_FD
    nearest_N = similarity(unit_ND, fixed_FD).max(axis=1)
    for _ in range(k):
        distance_N = np.maximum(UNIT - nearest_N, 0)  # half the squared distance between unit rows
        cumulative_N = np.cumsum(distance_N)
        # Where every row coincides with a centroid, any row does: take the first.
        drawn = np.searchsorted(cumulative_N, rng.integers(max(int(cumulative_N[-1]), 1)), side="right")
        chosen_1D = unit_ND[min(int(drawn), len(unit_ND) - 1)][None].astype(np.float32)
        centroids_KD = np.concatenate([centroids_KD, chosen_1D])
        nearest_N = np.maximum(nearest_N, similarity(unit_ND, chosen_1D)[:, 0])
    return centroids_KD


def _replace_empty(centroids_KD: Floats, unit_ND: NDArray[np.floating]) -> Floats:
    """Move each centroid without direction to the row that all others serve worst; the lowest index if several."""
    centroids_KD = centroids_KD.copy()
    for empty in np.flatnonzero(~centroids_KD.any(axis=1)):
        others_KD = centroids_KD[centroids_KD.any(axis=1)]
        served_N = similarity(unit_ND, others_KD).max(axis=1) if len(others_KD) else np.zeros(len(unit_ND), np.int64)
        centroids_KD[empty] = unit_ND[served_N.argmin()]
    return centroids_KD
