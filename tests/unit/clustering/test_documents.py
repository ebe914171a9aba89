import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfTransformer

from lifelong_moe.clustering.documents import document_features, fit_tfidf, prefix_features, prefix_sums
from lifelong_moe.errors import DataError


def themed_documents() -> list[np.ndarray]:
    """Twenty documents: the even ones of tokens 0–9, the odd ones of 10–19, all with the frequent token 20."""
    rng = np.random.default_rng(0)
    return [np.append(rng.integers(10, size=40) + 10 * (i % 2), [20] * 10) for i in range(20)]


def test_at_full_rank_inner_products_are_those_of_tfidf() -> None:
    documents = [np.array(ids) for ids in ([0, 0, 1], [1, 2], [2, 2, 2, 3], [0, 3])]
    counts = np.stack([np.bincount(document, minlength=4) for document in documents])
    tfidf = TfidfTransformer().fit_transform(counts).toarray()
    features = document_features(documents, fit_tfidf(documents, 4, 4, seed=0))
    np.testing.assert_allclose(features @ features.T, tfidf @ tfidf.T, atol=1e-6)


def test_idf_by_hand() -> None:
    # Two documents; token 0 is in both (idf ln(3/3) + 1 = 1), token 1 in one (ln(3/2) + 1), token 2 in none.
    projection = fit_tfidf([np.array([0, 1]), np.array([0])], 3, 2, seed=0)
    np.testing.assert_allclose(np.linalg.norm(projection, axis=1), [1, np.log(1.5) + 1, 0], atol=1e-6)


def test_documents_of_one_theme_lie_together() -> None:
    documents = themed_documents()
    features = document_features(documents, fit_tfidf(documents, 30, 4, seed=0))
    products = features @ features.T
    same = np.equal.outer(np.arange(20) % 2, np.arange(20) % 2)
    assert products[same].min() > products[~same].max()


def test_the_last_prefix_is_the_document_without_its_last_chunk() -> None:
    documents = themed_documents()
    projection = fit_tfidf(documents, 30, 4, seed=0)
    prefixes = prefix_features([documents[3]], projection, 8)  # 50 tokens: chunks of 8, 8, 8, 8, 8, 8, 2
    assert prefixes.shape == (7, 4) and prefixes.dtype == np.float32
    assert not prefixes[0].any()
    np.testing.assert_allclose(prefixes[6], document_features([documents[3][:48]], projection)[0], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(prefixes[1:], axis=1), 1, atol=1e-6)


def test_prefixes_by_hand() -> None:
    projection = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    rows = prefix_features([np.array([0, 0, 0, 0, 1, 1, 1, 0])], projection, 2)
    np.testing.assert_allclose(rows, [[0, 0], [1, 0], [1, 0], [4 / 20**0.5, 2 / 20**0.5]], atol=1e-6)
    assert prefix_features([np.array([0, 1])], projection, 2).shape == (1, 2)
    assert prefix_features([np.array([], int)], projection, 2).shape == (0, 2)


def test_prefix_sums_are_those_of_each_document_alone() -> None:
    table, rng = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32), np.random.default_rng(1)
    documents = [rng.integers(30, size=length) for length in (0, 1, 4, 5, 8, 0, 17)]
    expected = np.concatenate(
        [
            [table[document[:end]].sum(axis=0) for end in range(0, len(document), 4)]
            for document in documents
            if len(document)
        ]
    )
    together = prefix_sums(documents, table, 4)
    np.testing.assert_allclose(together, expected, atol=1e-5)
    alone = [prefix_sums([document], table, 4) for document in documents]
    assert np.concatenate(alone).tobytes() == together.tobytes()


def test_width_shrinks_to_what_the_documents_span() -> None:
    documents = [np.array([0, 1]), np.array([2]), np.array([2])]
    assert fit_tfidf(documents, 5, 64, seed=0).shape == (5, 2)
    assert fit_tfidf([np.array([0, 1, 2])] * 9, 5, 3, seed=0).shape == (5, 1)


def test_empty_documents_count_in_nothing() -> None:
    documents, nothing = themed_documents(), np.array([], np.int64)
    projection = fit_tfidf(documents, 30, 4, seed=0)
    assert fit_tfidf([nothing, *documents, nothing], 30, 4, seed=0).tobytes() == projection.tobytes()
    assert not document_features([nothing], projection).any()


def test_same_seed_same_bits_and_small_integer_types_do() -> None:
    documents = themed_documents()
    projection = fit_tfidf(documents, 30, 4, seed=5)
    small = fit_tfidf([document.astype(np.uint16) for document in documents], 30, 4, seed=5)
    assert projection.dtype == np.float32
    assert small.tobytes() == projection.tobytes()


def test_mistakes_are_named() -> None:
    projection = np.eye(3, dtype=np.float32)
    with pytest.raises(DataError, match="no document holds a token"):
        fit_tfidf([np.array([], np.int64)], 5, 2, seed=0)
    with pytest.raises(ValueError, match=r"\[0, 5\), got 0 to 5"):
        fit_tfidf([np.array([0, 5])], 5, 2, seed=0)
    with pytest.raises(ValueError, match="width"):
        fit_tfidf([np.array([0])], 5, 0, seed=0)
    with pytest.raises(ValueError, match="got -1 to 0"):
        prefix_features([np.array([0, -1])], projection, 4)
    with pytest.raises(ValueError, match="chunk"):
        prefix_features([np.array([0])], projection, 0)
