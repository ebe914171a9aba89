from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from lifelong_moe.clustering.balanced import _move_along_paths, balance, balanced_kmeans
from lifelong_moe.clustering.kmeans import assign, similarity, unit_rows
from lifelong_moe.errors import DataError

AXES = np.eye(4, dtype=np.float32)


def balanced_assign(features: NDArray[np.floating], centroids: NDArray[np.floating]) -> NDArray[np.int64]:
    """The exact balanced assignment to centroids that are given."""
    return balance(similarity(unit_rows(features), unit_rows(centroids)), np.zeros(len(centroids), np.int64))[0]


def test_the_row_that_loses_least_is_the_one_to_move() -> None:
    # All three prefer axis 0, which has room for two; the last leans most towards axis 1.
    features = np.array([[1.0, 0.1], [1.0, 0.2], [1.0, 0.9], [0.0, 1.0]])
    np.testing.assert_array_equal(balanced_assign(features, np.eye(2)), [0, 0, 1, 1])


def test_a_row_moves_through_a_third_cluster_where_that_is_cheaper() -> None:
    # Axis 0 has three rows too many for two places each; going to axis 1 pushes the row there that likes axis 2.
    features = np.array([[1, 0, 0], [1, 0, 0], [1, 0.8, 0], [0, 1, 0], [0, 1, 0.9], [0, 0, 1]])
    np.testing.assert_array_equal(balanced_assign(features, np.eye(3)), [0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize(("rows", "clusters"), [(60, 4), (61, 7), (200, 3), (5, 8), (40, 1)])
def test_total_similarity_is_that_of_the_optimal_assignment(rows: int, clusters: int) -> None:
    rng = np.random.default_rng(rows)
    features, centroids = unit_rows(rng.normal(size=(rows, 5)) + 0.7), unit_rows(rng.normal(size=(clusters, 5)))
    labels = balanced_assign(features, centroids)
    capacity = -(-rows // clusters)
    assert np.bincount(labels, minlength=clusters).max() <= capacity
    products = similarity(features, centroids)
    row, column = linear_sum_assignment(np.repeat(products, capacity, axis=1), maximize=True)
    assert products[np.arange(rows), labels].sum() == products[row, column // capacity].sum()


@pytest.mark.parametrize("seed", range(5))
def test_paths_alone_reach_the_optimum(seed: int) -> None:
    products = np.random.default_rng(seed).integers(-1000, 1000, size=(60, 5)) + np.array([1500, 800, 400, 0, 0])
    labels = products.argmax(axis=1)
    _move_along_paths(products, labels, 12)
    np.testing.assert_array_equal(np.bincount(labels), [12] * 5)
    row, column = linear_sum_assignment(np.repeat(products, 12, axis=1), maximize=True)
    assert products[np.arange(60), labels].sum() == products[row, column // 12].sum()


def test_blobs_of_equal_size_are_found_as_they_are() -> None:
    features = np.repeat(AXES, 25, axis=0) + np.random.default_rng(0).normal(scale=0.05, size=(100, 4))
    centroids, labels = balanced_kmeans(features, 4, seed=0)
    blocks = labels.reshape(4, 25)
    assert (blocks == blocks[:, :1]).all() and len(set(blocks[:, 0])) == 4
    np.testing.assert_array_equal(labels, assign(features, centroids))


def test_one_large_blob_is_divided() -> None:
    rng = np.random.default_rng(0)
    features = np.concatenate([np.repeat(AXES[:1], 70, axis=0), np.repeat(AXES[1:], 10, axis=0)])
    features = features + rng.normal(scale=0.1, size=features.shape)
    centroids, labels = balanced_kmeans(features, 4, seed=0)
    np.testing.assert_array_equal(np.bincount(labels), [25, 25, 25, 25])
    np.testing.assert_array_equal(labels, balanced_assign(features, centroids))
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("kind", ["equal", "half zeros", "two directions"])
def test_rows_that_cannot_be_told_apart_are_spread_all_the_same(kind: str) -> None:
    features = {
        "equal": np.ones((2000, 4)),
        "half zeros": np.concatenate([np.zeros((1000, 4)), np.random.default_rng(0).normal(size=(1000, 4))]),
        "two directions": np.repeat(AXES[:2], 1000, axis=0),
    }[kind]
    centroids, labels = balanced_kmeans(features, 8, seed=0)
    assert np.bincount(labels, minlength=8).max() == 250
    assert np.isfinite(centroids).all()


def test_balance_and_bits_on_a_thousand_documents() -> None:
    features = np.random.default_rng(0).normal(size=(1001, 16)) + 0.5
    centroids, labels = balanced_kmeans(features, 16, seed=1)
    sizes = np.bincount(labels, minlength=16)
    assert sizes.max() / sizes.mean() <= 1.05
    again = balanced_kmeans(features, 16, seed=1)
    assert again[0].tobytes() == centroids.tobytes() and again[1].tobytes() == labels.tobytes()


def test_more_rounds_never_explain_less() -> None:
    features = unit_rows(np.random.default_rng(2).normal(size=(300, 8)) + 0.5)
    totals = []
    for iterations in (0, 1, 3, 10):
        centroids, labels = balanced_kmeans(features, 6, seed=0, iterations=iterations)
        totals.append(int(similarity(features, centroids)[np.arange(300), labels].sum()))
    # A mean is stored as float32, so a round may lose up to the last bit of each of the 300 similarities.
    assert all(later >= earlier - 300 * 2**7 for earlier, later in pairwise(totals))
    assert totals[-1] > totals[0]


def test_mistakes_are_named() -> None:
    with pytest.raises(DataError, match="5 clusters need at least 5"):
        balanced_kmeans(AXES, 5, seed=0)
