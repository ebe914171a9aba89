from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from lifelong_moe.clustering.unigrams import UNIFORM, fit_unigrams, hashed_domains, prefix_generations
from lifelong_moe.errors import DataError

VOCAB = 30


def themed_documents() -> list[np.ndarray]:
    """Twenty documents: the even ones of tokens 0–9, the odd ones of 10–19."""
    rng = np.random.default_rng(0)
    return [rng.integers(10, size=40) + 10 * (i % 2) for i in range(20)]


def log(*rows: list[float]) -> np.ndarray:
    return np.log(np.array(rows)).astype(np.float32)


def test_one_centroid_is_the_token_distribution() -> None:
    documents = [np.array([0, 0, 0]), np.array([1])]
    (row,) = fit_unigrams(documents, 4, 1, width=2, seed=0)
    floor = UNIFORM / 4
    shares = [0.75 * (1 - UNIFORM) + floor, 0.25 * (1 - UNIFORM) + floor, floor, floor]
    np.testing.assert_allclose(row, np.log(shares), rtol=1e-6)


def test_each_theme_has_a_centroid() -> None:
    documents = themed_documents()
    centroids = fit_unigrams(documents, VOCAB, 2, width=4, seed=0)
    assert centroids.shape == (2, VOCAB) and centroids.dtype == np.float32
    np.testing.assert_allclose(np.exp(centroids).sum(axis=1), 1, atol=1e-5)
    halves = np.exp(centroids).reshape(2, 3, 10).sum(axis=2)
    assert sorted(halves.argmax(axis=1).tolist()) == [0, 1] and halves.max(axis=1).min() > 0.99


def test_a_cluster_without_documents_attracts_nothing() -> None:
    # Nine documents in four clusters of at most three: one is left without.
    centroids = fit_unigrams([np.array([i % 3, i % 3]) for i in range(9)], 3, 4, width=3, seed=0)
    assert np.isfinite(centroids).all()
    assert (centroids == np.float32(np.log(UNIFORM / 3))).all(axis=1).sum() <= 1


def test_bundles_by_hand() -> None:
    # Token 0 is twice as probable in stage 1 as in stage 0, token 1 half as much, token 2 the same: ±ln 2 = 0.69 nats.
    stages = [log([0.25, 0.5, 0.25]), log([0.5, 0.25, 0.25])]
    tokens = np.array([2, 0, 0, 1, 1, 1, 0])
    # Evidence before each token: 0, 0, 1, 2, 1, 0, -1 times ln 2.
    assert prefix_generations([tokens], stages, 1, 0.0).tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert prefix_generations([tokens], stages, 1, 1.0).tolist() == [0, 0, 0, 1, 0, 0, 0]
    assert prefix_generations([tokens], stages, 2, 0.0).tolist() == [0, 1, 1, 0]  # before tokens 0, 2, 4 and 6
    assert prefix_generations([tokens[:1]], stages, 2, 0.0).tolist() == [0]


def test_a_stage_is_as_near_as_its_nearest_centroid() -> None:
    stages = [log([0.5, 0.25, 0.25]), log([0.1, 0.1, 0.8], [0.1, 0.8, 0.1])]
    for token, bundle in ((0, 0), (1, 1), (2, 1)):
        assert prefix_generations([np.array([token, 0])], stages, 1, 0.0).tolist() == [0, bundle]


def test_a_newer_stage_must_beat_whoever_holds_the_text() -> None:
    # Stage 1 is not enough better than stage 0 to take it over; stage 2 is, though less than stage 1 by the margin.
    stages = [log([0.2, 0.8]), log([0.4, 0.6]), log([0.7, 0.3])]
    tokens = np.array([0, 0])
    assert prefix_generations([tokens], stages[:2], 1, 1.0).tolist() == [0, 0]
    assert prefix_generations([tokens], stages, 1, 1.0).tolist() == [0, 2]  # ln 3.5 > 1
    assert prefix_generations([tokens], stages, 1, 0.6).tolist() == [0, 1]  # ln 2 > 0.6, but then ln 1.75 is not


def test_any_number_of_threads_gives_the_same_bits() -> None:
    rng = np.random.default_rng(1)
    documents = [rng.integers(VOCAB, size=50) for _ in range(60)]
    made = []
    for threads in (1, 2):
        with threadpool_limits(limits=threads):
            centroids = fit_unigrams(documents, VOCAB, 4, width=8, seed=3)
            stages = [centroids[:2], centroids[2:]]
            made.append((centroids.tobytes(), [prefix_generations([d], stages, 8, 0.5).tolist() for d in documents]))
    assert made[0] == made[1]


def test_hashed_domains_are_even_and_go_by_the_first_chunk() -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(1000, size=20) for _ in range(3000)]
    domains = [hashed_domains(document, 3, 4) for document in documents]
    assert all(g[0] == 0 and len(g) == 5 and len(set(g[1:])) == 1 for g in domains)
    shares = np.bincount([g[-1] for g in domains]) / 3000
    assert np.abs(shares - 1 / 3).max() < 0.03
    other = np.concatenate([documents[0][:4], documents[1][4:]])
    assert hashed_domains(other, 3, 4).tolist() == domains[0].tolist()
    small = documents[0].astype(np.uint16)
    assert hashed_domains(small, 3, 4).tolist() == domains[0].tolist()


def test_mistakes_are_named() -> None:
    with pytest.raises(DataError, match="3 clusters need at least 3 rows"):
        fit_unigrams([np.array([0]), np.array([1])], 4, 3, width=2, seed=0)
    with pytest.raises(DataError, match="no document holds a token"):
        fit_unigrams([np.array([], np.int64)], 4, 1, width=2, seed=0)
    with pytest.raises(ValueError, match=r"\[0, 4\), got 0 to 4"):
        prefix_generations([np.array([4, 0])], [np.zeros((1, 4), np.float32)], 1, 0.0)
