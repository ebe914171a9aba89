from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from lifelong_moe.clustering import balanced_stream, corpus
from lifelong_moe.clustering.balanced import balanced_assign
from lifelong_moe.clustering.balanced_stream import assign_in_order, sample_prices
from lifelong_moe.clustering.batches import batches
from lifelong_moe.clustering.corpus import assign_corpus, evenly_spread, fit_corpus
from lifelong_moe.clustering.documents import count_frequencies, document_features, feature_batches, fit_tfidf
from lifelong_moe.clustering.kmeans import similarity, unit_rows

VOCAB = 50


def documents(count: int) -> list[NDArray[np.int64]]:
    """Of 0 to 60 tokens from one of five topics, the first of which half of the documents are about."""
    rng = np.random.default_rng(0)
    topics = rng.choice(5, size=count, p=[0.5, 0.2, 0.1, 0.1, 0.1])
    return [rng.integers(10, size=rng.integers(61)) + 10 * topic for topic in topics]


def features_one_by_one(texts: list[NDArray[np.int64]], projection: NDArray[np.float32]) -> NDArray[np.float32]:
    """What features are, document by document: each token's row times its count, normalized."""
    rows = np.zeros((len(texts), projection.shape[1]))
    for row, text in enumerate(texts):
        for token in range(len(projection)):
            rows[row] += np.sum(text == token) * projection[token].astype(np.float64)
        rows[row] /= np.linalg.norm(rows[row]) or 1
    return rows.astype(np.float32)


def row_by_row(
    features: NDArray[np.float32], centroids: NDArray[np.float32], prices: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The greedy assignment as its docstring has it."""
    room, labels = [-(-len(features) // len(centroids))] * len(centroids), []
    for row in similarity(features, unit_rows(centroids)) - prices:
        label = max((k for k in range(len(row)) if room[k]), key=lambda k: (row[k], -k))
        room[label] -= 1
        labels.append(label)
    return np.array(labels)


def test_features_are_those_made_one_by_one_whatever_the_batch() -> None:
    texts = documents(80)
    projection = fit_tfidf(texts, VOCAB, 8, seed=0)
    whole = document_features(iter(texts), projection)
    np.testing.assert_allclose(whole, features_one_by_one(texts, projection), atol=2e-7)
    for most, enough in [(1, 1), (7, 10_000), (80, 90), (1000, 10_000)]:
        rows = list(feature_batches(batches(iter(texts), most, enough), projection))
        assert np.concatenate(rows).tobytes() == whole.tobytes()
    assert document_features([], projection).shape == (0, projection.shape[1])


def test_a_batch_ends_at_either_bound() -> None:
    texts = [np.zeros(length, int) for length in (3, 3, 3, 0, 9, 1, 1, 1)]
    found = [[len(text) for text in batch] for batch in batches(texts, 3, 6)]
    assert found == [[3, 3], [3, 0, 9], [1, 1, 1]]
    assert list(batches([])) == []
    with pytest.raises(ValueError, match="got 0 and 6"):
        next(batches(texts, 0, 6))


def test_frequencies_by_hand_and_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = count_frequencies(iter([np.array([0, 0, 2]), np.array([], int), np.array([2])]), 4)
    assert found.num_documents == 2 and found.containing_V.tolist() == [1, 0, 2, 0]
    np.testing.assert_allclose(found.idf(), [np.log(3 / 2) + 1, np.log(3) + 1, 1, np.log(3) + 1])
    texts = documents(50)
    contains = [sum(token in text for text in texts) for token in range(VOCAB)]
    monkeypatch.setattr(batches, "__defaults__", (3, 100))
    assert count_frequencies(iter(texts), VOCAB).containing_V.tolist() == contains


def test_frequencies_of_the_same_documents_change_no_bit_and_those_of_others_do() -> None:
    texts = documents(60)
    plain = fit_tfidf(texts, VOCAB, 6, seed=0)
    counted = fit_tfidf(iter(texts), VOCAB, 6, seed=0, frequencies=count_frequencies(texts, VOCAB))
    assert counted.tobytes() == plain.tobytes()
    others = fit_tfidf(texts, VOCAB, 6, seed=0, frequencies=count_frequencies(texts[:9], VOCAB))
    assert others.tobytes() != plain.tobytes()


@pytest.mark.parametrize(
    ("rows", "clusters", "block"), [(200, 5, 64), (203, 7, 16), (64, 64, 64), (3, 9, 4), (40, 1, 7)]
)
def test_assignment_is_that_made_row_by_row(
    rows: int, clusters: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balanced_stream, "BLOCK", block)
    rng = np.random.default_rng(rows)
    features, centroids = unit_rows(rng.normal(size=(rows, 4)) + 0.7), unit_rows(rng.normal(size=(clusters, 4)))
    prices = sample_prices(features[::3], centroids)
    expected = row_by_row(features, centroids, prices)
    for step in (1, 10, rows):
        parts = [features[start : start + step] for start in range(0, rows, step)]
        labels = list(assign_in_order(iter(parts), centroids, prices, rows))
        assert [len(part) for part in labels] == [len(part) for part in parts]
        np.testing.assert_array_equal(np.concatenate(labels), expected)


def test_the_prices_of_a_sample_nearly_reach_the_best_total() -> None:
    rng = np.random.default_rng(0)
    features, centroids = unit_rows(rng.normal(size=(3000, 6)) + 0.7), unit_rows(rng.normal(size=(6, 6)) + 0.7)

    def total(prices: NDArray[np.int64]) -> float:
        labels = np.concatenate(list(assign_in_order([features], centroids, prices, len(features))))
        assert np.bincount(labels).tolist() == [500] * 6
        return float(similarity(features, centroids)[np.arange(3000), labels].sum())

    best_labels = balanced_assign(features, centroids)
    best = float(similarity(features, centroids)[np.arange(3000), best_labels].sum())
    priced, free = total(sample_prices(features[::3], centroids)), total(np.zeros(6, np.int64))
    assert free < priced <= best
    assert best - priced < 0.1 * (best - free)


def test_rows_that_cannot_be_told_apart_fill_one_cluster_after_another() -> None:
    labels = np.concatenate(list(assign_in_order([np.ones((9, 2))], np.eye(2), np.zeros(2, np.int64), 9)))
    assert labels.tolist() == [0] * 5 + [1] * 4


def test_a_corpus_is_clustered_without_holding_more_than_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = documents(300)
    clusters = fit_corpus(texts, VOCAB, 5, width=6, seed=0, sample=100)
    handed_out = 0

    def stream() -> Iterator[NDArray[np.int64]]:
        nonlocal handed_out
        for text in texts:
            handed_out += 1
            yield text

    one = np.concatenate(list(assign_corpus(texts, 300, clusters)))
    monkeypatch.setattr(batches, "__defaults__", (16, 10_000))
    labels: list[int] = []
    for part in assign_corpus(stream(), 300, clusters):
        labels += part.tolist()
        assert len(part) <= 16 and handed_out == len(labels)  # nothing is read ahead
    assert labels == one.tolist()
    assert np.bincount(one, minlength=5).tolist() == [60] * 5
    again = fit_corpus(texts, VOCAB, 5, width=6, seed=0, sample=100)
    for name in ("projection_VD", "centroids_KD", "prices_K"):
        assert getattr(again, name).tobytes() == getattr(clusters, name).tobytes()


def test_only_the_sample_is_fitted_on_and_all_documents_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, seen = documents(101), []
    monkeypatch.setattr(
        corpus, "document_features", lambda some, rows: seen.append(some) or document_features(some, rows)
    )
    monkeypatch.setattr(
        corpus, "count_frequencies", lambda some, size: seen.append(list(some)) or count_frequencies(texts, size)
    )
    fit_corpus(texts, VOCAB, 3, width=4, seed=0, sample=20)
    assert len(seen[0]) == 101 and len(seen[1]) == 17  # every sixth
    assert [id(text) for text in seen[1]] == [id(text) for text in texts[::6]]
    assert evenly_spread([], 4) == [] and len(evenly_spread(texts, 101)) == 101


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="more rows than the 3"):
        list(assign_in_order([np.ones((2, 2)), np.ones((2, 2))], np.eye(2), np.zeros(2, np.int64), 3))
    with pytest.raises(ValueError, match="at least one centroid"):
        list(assign_in_order([], np.zeros((0, 2)), np.zeros(0, np.int64), 3))
    with pytest.raises(ValueError, match=r"\[0, 5\), got 0 to 5"):
        count_frequencies([np.array([0, 5])], 5)
