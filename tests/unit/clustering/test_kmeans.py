import os
import subprocess
import sys
from typing import Literal

import faiss
import numpy as np
import pytest

from lifelong_moe.clustering.kmeans import (
    _seed_beside,
    assign,
    churn,
    mean_directions,
    similarity,
    spherical_kmeans,
    unit_rows,
)
from lifelong_moe.errors import DataError

AXES = np.eye(6, dtype=np.float32)


def blobs(num_blobs: int, rows_each: int = 30, spread: float = 0.05) -> np.ndarray:
    """Rows around the first axes, blob after blob."""
    noise = np.random.default_rng(7).normal(scale=spread, size=(num_blobs * rows_each, 6))
    return np.repeat(AXES[:num_blobs], rows_each, axis=0) + noise


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("rows", "width"), [(0, 3), (1, 40), (4095, 3), (4097, 40), (9000, 1), (8192, 512)])
def test_rows_are_normalized_each_by_itself(rows: int, width: int, order: Literal["C", "F"]) -> None:
    """To the last bit what one pass over all of them gives, as it was computed before."""
    features = np.asarray(np.random.default_rng(0).normal(size=(rows, width)), np.float32, order=order)
    whole = np.asarray(features, np.float64)
    scaled = whole / np.abs(whole).max(axis=1, keepdims=True, initial=0.0)
    expected = np.asarray(scaled / np.sqrt(np.sum(scaled * scaled, axis=1, keepdims=True)), np.float32)
    assert np.array_equal(unit_rows(features), expected)


def test_unit_rows_keep_zeros_and_survive_extreme_lengths() -> None:
    rows = unit_rows(np.array([[3.0, 4.0], [0.0, 0.0], [3e-200, 4e-200], [3e200, 4e200]]))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0], [0.6, 0.8], [0.6, 0.8]], rtol=1e-7)
    assert rows.dtype == np.float32


def test_assign_takes_the_largest_inner_product_and_the_lowest_index_on_a_tie() -> None:
    centroids = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [1.0, 1.0]])
    features = np.array([[5.0, 0.1], [0.1, 5.0], [0.0, 0.0], [1.0, 1.0], [-1.0, 1.0]])
    labels = assign(features, centroids)
    np.testing.assert_array_equal(labels, [0, 1, 0, 3, 1])
    assert labels.dtype == np.int64


@pytest.mark.parametrize("seed", range(5))
def test_equal_products_summed_in_another_order_are_a_tie(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=33) * 10.0 ** rng.uniform(-6, 0, size=33)  # too wide a range for float64 to add up exactly
    centroids = np.stack([rng.permutation(values) for _ in range(9)])
    assert not assign(np.ones((50, 33)), centroids).any()
    assert not assign(np.ones((50, 33)), centroids[::-1]).any()
    assert not assign(np.ones((1, 33)), centroids[::-1]).any()


def test_assignment_of_a_row_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(0)
    features, centroids = rng.normal(size=(500, 17)), rng.normal(size=(9, 17))
    together = assign(features, centroids)
    alone = np.concatenate([assign(features[i : i + 1], centroids) for i in range(500)])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("seed", range(5))
def test_finds_well_separated_blobs(seed: int) -> None:
    features = blobs(5)
    centroids = spherical_kmeans(features, 5, seed=seed)
    assert centroids.shape == (5, 6) and centroids.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    labels = assign(features, centroids).reshape(5, 30)
    assert (labels == labels[:, :1]).all()
    assert len(set(labels[:, 0])) == 5


def test_a_single_cluster_is_the_normalized_mean_direction() -> None:
    features = np.array([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]])  # lengths do not count, nor does the row of zeros
    np.testing.assert_allclose(spherical_kmeans(features, 1, seed=0), [[0.5**0.5, 0.5**0.5]], atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_new_centroids_go_where_the_fixed_ones_are_not(seed: int) -> None:
    features, fixed = blobs(5), AXES[[1, 3]].copy()
    new = spherical_kmeans(features, 3, seed=seed, fixed_KD=fixed)
    assert new.shape == (3, 6)
    np.testing.assert_array_equal(fixed, AXES[[1, 3]])
    nearest_axis = sorted(assign(new, AXES))
    assert nearest_axis == [0, 2, 4]
    np.testing.assert_allclose(np.linalg.norm(new, axis=1), 1, atol=1e-6)


def test_rows_of_a_fixed_centroid_do_not_pull_at_a_new_one() -> None:
    features = np.concatenate([np.tile(AXES[0], (50, 1)), np.tile(AXES[1], (3, 1))])
    new = spherical_kmeans(features, 1, seed=0, fixed_KD=AXES[:1])
    np.testing.assert_allclose(new, AXES[1:2], atol=1e-6)


def test_fixed_centroids_do_not_drift_towards_their_rows() -> None:
    def at(degrees: float) -> np.ndarray:
        return np.array([[np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]])

    # Fixed at 0°, rows at 30°, 45° and 80°. The border with the new one is near 40°, so 45° belongs to the new one;
    # were the fixed one drawn to its rows at 30°, it would take that row along.
    features = np.concatenate([at(30).repeat(10, axis=0), at(45), at(80).repeat(10, axis=0)])
    new = spherical_kmeans(features, 1, seed=0, fixed_KD=at(0))
    np.testing.assert_allclose(new, unit_rows(10 * at(80) + at(45)), atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_seeding_draws_nothing_that_is_there_already(seed: int) -> None:
    rows = np.repeat(AXES, 10, axis=0).astype(np.float64)
    seeded = _seed_beside(rows, 4, AXES[:2], np.random.default_rng(seed))
    assert sorted(assign(seeded, AXES)) == [0, 1, 2, 3, 4, 5]


def test_a_new_centroid_that_nothing_prefers_still_has_a_direction() -> None:
    new = spherical_kmeans(np.tile(AXES[0], (20, 1)), 2, seed=0, fixed_KD=AXES[:1])
    np.testing.assert_allclose(new, AXES[[0, 0]], atol=1e-6)
    # The old centroid keeps its rows: equal similarity goes to the lowest index.
    assert not assign(AXES[:1], np.concatenate([AXES[:1], new])).any()


@pytest.mark.parametrize("rows", [3, 4])
def test_as_many_rows_as_clusters(rows: int) -> None:
    features = AXES[:rows] * 2
    np.testing.assert_allclose(
        sorted(spherical_kmeans(features, rows, seed=0).tolist()), sorted(AXES[:rows].tolist()), atol=1e-6
    )
    assert spherical_kmeans(features, rows, seed=0, fixed_KD=AXES[4:]).shape == (rows, 6)


def test_fewer_distinct_rows_than_clusters() -> None:
    centroids = spherical_kmeans(np.repeat(AXES[:2], 20, axis=0), 4, seed=0)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("fixed", [None, AXES[:2]])
def test_same_seed_same_bits_and_the_thread_count_is_restored(fixed: np.ndarray | None) -> None:
    features = np.random.default_rng(1).normal(size=(3000, 6))
    before = faiss.omp_get_max_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            faiss.omp_set_num_threads(threads)
            results.append(spherical_kmeans(features, 8, seed=3, fixed_KD=fixed).tobytes())
            assert faiss.omp_get_max_threads() == threads
    finally:
        faiss.omp_set_num_threads(before)
    assert len(set(results)) == 1


PRINT_HASHES = """
import hashlib
import numpy as np
from lifelong_moe.clustering import balanced, documents, kmeans, tokens
rng = np.random.default_rng(0)
ids = np.minimum(rng.zipf(1.3, size=20_000) - 1, 499)
texts = [ids[i : i + 100] for i in range(0, len(ids), 100)]
projection = documents.fit_tfidf(texts, 500, 16, seed=0)
features = documents.document_features(texts, projection)
centroids, labels = balanced.balanced_kmeans(features, 4, seed=0)
grown = kmeans.spherical_kmeans(features, 3, seed=0, fixed_KD=centroids)
embedding = tokens.token_embedding([ids], 500, 16, seed=0)
prefixes = documents.prefix_features([ids], projection, 64)
assigned = kmeans.assign(prefixes, np.concatenate([centroids, grown]))
for array in (projection, centroids, labels, grown, embedding, prefixes, assigned):
    print(hashlib.sha256(array.tobytes()).hexdigest())
"""


def test_every_process_and_thread_count_gives_the_same_bits() -> None:
    def hashes(threads: int) -> str:
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        env = {**os.environ, **dict.fromkeys(names, str(threads))}
        command = [sys.executable, "-W", "error", "-c", PRINT_HASHES]
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout

    one = hashes(1)
    assert one.count("\n") == 7
    assert hashes(2) == one


def test_clusters_explain_more_than_random_ones() -> None:
    features = unit_rows(blobs(6, spread=0.3))
    labels = assign(features, spherical_kmeans(features, 6, seed=0))
    shuffled = np.random.default_rng(0).permutation(labels)

    def explained(chosen: np.ndarray) -> float:
        products = similarity(features, mean_directions(features, chosen, 6))
        return float(products[np.arange(len(features)), chosen].mean())

    assert explained(labels) > 2 * explained(shuffled)


def test_mistakes_are_named() -> None:
    with pytest.raises(DataError, match="4 clusters need at least 4 rows that are not all zero, but there are 3"):
        spherical_kmeans(np.concatenate([AXES[:3], np.zeros((5, 6))]), 4, seed=0)
    with pytest.raises(ValueError, match="NaN"):
        spherical_kmeans(np.full((4, 2), np.nan), 2, seed=0)
    with pytest.raises(ValueError, match="NaN"):
        assign(np.array([[np.inf, 0.0]]), AXES[:, :2])
    with pytest.raises(ValueError, match="k must be at least 1"):
        spherical_kmeans(AXES, 0, seed=0)
    with pytest.raises(ValueError, match="width 6, but centroids have width 2"):
        assign(AXES, AXES[:, :2])
    with pytest.raises(ValueError, match="at least one centroid"):
        assign(AXES, AXES[:0])
    with pytest.raises(ValueError, match="matrix"):
        assign(AXES[0], AXES)


def test_churn_is_the_share_that_changed() -> None:
    assert churn(np.array([0, 1, 2, 3]), np.array([0, 1, 3, 2])) == 0.5
    with pytest.raises(ValueError, match="equal shapes"):
        churn(np.array([0]), np.array([0, 1]))
    with pytest.raises(ValueError, match="content"):
        churn(np.array([], int), np.array([], int))
