import numpy as np
import pytest

from lifelong_moe.clustering import tokens
from lifelong_moe.clustering.tokens import _pair_counts, _ppmi, token_embedding
from lifelong_moe.errors import DataError


def test_pair_counts_by_hand() -> None:
    # 0 1 0 2, one neighbour on each side: 0-1 twice, 0-2 once.
    counts = _pair_counts([np.array([0, 1, 0, 2])], 4, 1).toarray()
    np.testing.assert_array_equal(counts, [[0, 2, 1, 0], [2, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    # Two neighbours: also the pair 0-0, which stands in the matrix once for each of its ends, and 1-2.
    counts = _pair_counts([np.array([0, 1, 0, 2])], 4, 2).toarray()
    np.testing.assert_array_equal(counts, [[2, 2, 1, 0], [2, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]])


def test_mutual_information_by_hand() -> None:
    information = _ppmi(_pair_counts([np.array([0, 1, 0, 2])], 3, 1)).toarray()
    smoothed = np.array([3.0, 2.0, 1.0]) ** 0.75
    smoothed /= smoothed.sum()
    np.testing.assert_allclose(information[1, 0], np.log((2 / 2) / smoothed[0]))
    np.testing.assert_allclose(information[0, 1], np.log((2 / 3) / smoothed[1]))
    assert information[0, 0] == 0


def test_tokens_in_the_same_company_lie_together() -> None:
    # Tokens 0 and 1 stand between 4 and 5, tokens 2 and 3 between 6 and 7.
    rng = np.random.default_rng(0)
    sentences = [[4, rng.integers(2), 5] if rng.integers(2) else [6, 2 + rng.integers(2), 7] for _ in range(500)]
    embedding = token_embedding([np.array(sentences).ravel()], 8, 4, seed=0, window=1)
    products = embedding @ embedding.T
    assert products[0, 1] > 0.95 and products[2, 3] > 0.95
    assert abs(products[0, 2]) < 0.5 and abs(products[1, 3]) < 0.5


def test_rows_are_unit_and_an_unseen_token_has_its_own() -> None:
    stream = np.tile([0, 1, 2, 3, 1], 20)
    embedding = token_embedding([stream], 9, 3, seed=0)
    assert embedding.shape == (9, 3) and embedding.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-6)
    assert len(np.unique(embedding[4:], axis=0)) == 5
    later = token_embedding([np.tile([0, 1, 2, 3, 4], 20)], 9, 3, seed=0)
    np.testing.assert_array_equal(later[5:], embedding[5:])


def test_same_seed_same_bits() -> None:
    stream = np.random.default_rng(0).integers(50, size=2000).astype(np.uint16)
    first = token_embedding([stream], 60, 8, seed=4)
    assert token_embedding([stream.astype(np.int64)], 60, 8, seed=4).tobytes() == first.tobytes()


@pytest.mark.parametrize("piece", [1, 3, 7, 1 << 20])
@pytest.mark.parametrize("cuts", [[], [1], [2, 3, 500], [0, 999]])
def test_parts_and_pieces_count_as_one_stream(monkeypatch: pytest.MonkeyPatch, piece: int, cuts: list[int]) -> None:
    stream = np.random.default_rng(0).integers(30, size=1000).astype(np.uint16)
    expected = np.zeros((30, 30))
    for distance in range(1, 5):
        np.add.at(expected, (stream[:-distance], stream[distance:]), 1)
    expected += expected.T
    monkeypatch.setattr(tokens, "PIECE_TOKENS", piece)
    np.testing.assert_array_equal(_pair_counts(np.split(stream, cuts), 30, 4).toarray(), expected)


def test_width_above_the_vocabulary_is_filled_with_zeros() -> None:
    embedding = token_embedding([np.tile([0, 1, 2, 1], 5)], 3, 8, seed=0, window=1)
    assert embedding.shape == (3, 8)
    assert not embedding[:, 3:].any()


def test_mistakes_are_named() -> None:
    with pytest.raises(DataError, match="at least two tokens, but the stream holds 1"):
        token_embedding([np.array([0])], 4, 2, seed=0)
    with pytest.raises(ValueError, match=r"\[0, 4\), got 0 to 4"):
        token_embedding([np.array([0, 4])], 4, 2, seed=0)
    with pytest.raises(ValueError, match="at least 1, got 0 and 4"):
        token_embedding([np.array([0, 1])], 4, 0, seed=0)
