import numpy as np
import pytest
from numpy.typing import NDArray

from lifelong_moe.clustering.batches import batches
from lifelong_moe.clustering.documents import document_features, evenly_spread, fit_tfidf

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


def test_features_are_those_made_one_by_one_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = documents(80)
    projection = fit_tfidf(texts, VOCAB, 8, seed=0)
    whole = document_features(iter(texts), projection)
    np.testing.assert_allclose(whole, features_one_by_one(texts, projection), atol=2e-7)
    for most, enough in [(1, 1), (7, 10_000), (80, 90), (1000, 10_000)]:
        monkeypatch.setattr(batches, "__defaults__", (most, enough))
        assert document_features(iter(texts), projection).tobytes() == whole.tobytes()
    assert document_features([], projection).shape == (0, projection.shape[1])


def test_a_batch_ends_at_either_bound() -> None:
    texts = [np.zeros(length, int) for length in (3, 3, 3, 0, 9, 1, 1, 1)]
    found = [[len(text) for text in batch] for batch in batches(texts, 3, 6)]
    assert found == [[3, 3], [3, 0, 9], [1, 1, 1]]
    assert list(batches([])) == []
    with pytest.raises(ValueError, match="got 0 and 6"):
        next(batches(texts, 0, 6))


def test_a_sample_is_evenly_spread() -> None:
    texts = documents(101)
    assert [id(text) for text in evenly_spread(texts, 20)] == [id(text) for text in texts[::6]]
    assert evenly_spread([], 4) == [] and len(evenly_spread(texts, 101)) == 101
