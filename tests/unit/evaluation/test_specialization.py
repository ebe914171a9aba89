"""What experts specialize in: numbers by hand, signs and scales pinned."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lifelong_moe.evaluation.specialization import (
    agreement,
    coactivation,
    derangement,
    information,
    joint_counts,
    mutual_information,
    output_similarity,
    top_tokens,
)

# Six tokens, two experts each of four: the pairs are (0, 1) three times, (0, 2) twice, (1, 2) once; 3 is never chosen.
PAIRS_TK = np.array([[0, 1], [1, 0], [0, 1], [2, 0], [0, 2], [1, 2]])


def test_a_perfect_mapping_of_n_values_is_ln_n() -> None:
    assert mutual_information(np.eye(4, dtype=int) * 7) == pytest.approx(math.log(4))
    assert mutual_information(np.array([[0, 5], [5, 0]])) == pytest.approx(math.log(2))


def test_independence_is_zero() -> None:
    assert mutual_information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0.0, abs=1e-15)
    assert mutual_information(np.array([[3, 9]])) == 0.0


def test_mutual_information_by_hand() -> None:
    # p = [[1/2, 1/4], [0, 1/4]]: marginals 3/4, 1/4 and 1/2, 1/2.
    expected = 0.5 * math.log(0.5 / 0.375) + 0.25 * math.log(0.25 / 0.375) + 0.25 * math.log(0.25 / 0.125)
    assert mutual_information(np.array([[2, 1], [0, 1]])) == pytest.approx(expected)


def test_no_counts_have_no_information() -> None:
    with pytest.raises(ValueError, match="at least one count"):
        mutual_information(np.zeros((2, 2), dtype=int))
    with pytest.raises(ValueError, match="no tokens"):
        joint_counts(np.zeros((0, 2), dtype=int), np.zeros(0, dtype=int), 2)


def test_joint_counts_count_every_choice() -> None:
    counts, labels = joint_counts(PAIRS_TK, np.array([9, 9, 9, 5, 5, 5]), 4)
    assert labels.tolist() == [5, 9]
    assert counts.tolist() == [[2, 3], [1, 3], [3, 0], [0, 0]]


def test_information_stands_far_above_its_null_if_experts_know_the_label() -> None:
    labels_T = np.arange(400) % 4
    found = information(labels_T[:, None], labels_T, 4)
    assert found.nats == pytest.approx(math.log(4))
    # For independent labels 2 · T · information is chi-square with 3 · 3 degrees of freedom: mean 9, 95 % at 16.9.
    assert found.null_mean == pytest.approx(9 / 800, rel=0.5)
    assert found.null_mean < found.null_95 < 2 * 16.9 / 800


def test_information_of_chance_lies_within_its_null_and_is_repeatable() -> None:
    rng = np.random.default_rng(3)
    experts_TK, labels_T = rng.integers(0, 4, (400, 1)), rng.integers(0, 4, 400)
    found = information(experts_TK, labels_T, 4, shuffles=100)
    assert 0 < found.nats < found.null_95 * 1.5 and found.null_mean > 0
    assert found == information(experts_TK, labels_T, 4, shuffles=100)
    assert found.null_mean != information(experts_TK, labels_T, 4, shuffles=100, seed=1).null_mean


def test_top_tokens_by_hand() -> None:
    # Expert 0: token 7 four times, token 5 twice; expert 1: token 5 twice, token 3 four times, token 4 four times.
    token_ids_T = np.array([7] * 4 + [5] * 4 + [3] * 4 + [4] * 4)
    experts_TK = np.array([0] * 6 + [1] * 10)[:, None]
    first, second, third = top_tokens(experts_TK, token_ids_T, 3, min_count=2)
    # p(7 | 0) = 4/6 over p(7) = 4/16; p(5 | 0) = 2/6 over 4/16.
    assert [(t.token_id, t.count) for t in first] == [(7, 4), (5, 2)]
    assert [t.lift for t in first] == pytest.approx([16 / 6, 8 / 6])
    # Tokens 3 and 4 are equal in everything, so the smaller id stands first; token 5 goes there less than by chance.
    assert [(t.token_id, t.count) for t in second] == [(3, 4), (4, 4)]
    assert [t.lift for t in second] == pytest.approx([1.6, 1.6])
    assert third == []
    assert [len(tokens) for tokens in top_tokens(experts_TK, token_ids_T, 3, most=1, min_count=3)] == [1, 1, 0]


def test_equal_lifts_stand_by_falling_count() -> None:
    token_ids_T, experts_TK = np.array([1] * 3 + [2] * 5 + [9] * 8), np.array([0] * 8 + [1] * 8)[:, None]
    assert [t.token_id for t in top_tokens(experts_TK, token_ids_T, 2, min_count=1)[0]] == [2, 1]


def test_coactivation_by_hand() -> None:
    nan = np.nan
    # Expert 0 has five tokens: three with expert 1, two with expert 2. Expert 1 has four, expert 2 has three.
    expected = [[nan, 3 / 5, 2 / 5, 0], [3 / 4, nan, 1 / 4, 0], [2 / 3, 1 / 3, nan, 0], [nan] * 4]
    np.testing.assert_allclose(coactivation(PAIRS_TK, 4), expected)


def test_all_pairs_count_and_not_neighbours_only() -> None:
    matrix = coactivation(np.array([[0, 3, 1], [2, 0, 3]]), 4)
    assert matrix[0, 3] == matrix[3, 0] == 1.0 and matrix[0, 1] == 0.5 and matrix[1, 2] == 0.0
    assert np.nansum(matrix, axis=1).tolist() == [2.0] * 4  # K − 1


def test_one_choice_a_token_has_no_company() -> None:
    matrix = coactivation(np.array([[0], [1]]), 2)
    assert matrix[0, 1] == matrix[1, 0] == 0.0


@pytest.mark.parametrize(
    ("second", "share"),
    [([[0, 1], [2, 3]], 1.0), ([[1, 0], [3, 2]], 1.0), ([[2, 3], [0, 1]], 0.0), ([[0, 2], [2, 3]], 0.75)],
)
def test_agreement_is_the_mean_share_of_common_experts(second: list[list[int]], share: float) -> None:
    assert agreement(np.array([[0, 1], [2, 3]]), np.array(second)) == share


def test_agreement_needs_the_same_tokens() -> None:
    with pytest.raises(ValueError, match="not of the same tokens"):
        agreement(np.zeros((2, 1), dtype=int), np.zeros((3, 1), dtype=int))


def test_output_similarity_is_a_cosine() -> None:
    first = np.array([[1.0, 0.0], [0.0, 2.0]])
    outputs = np.stack([first, 5 * first, -first, first[:, ::-1], np.zeros((2, 2))])
    expected = [[1, 1, -1, 0, 0], [1, 1, -1, 0, 0], [-1, -1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_allclose(output_similarity(outputs), expected, atol=1e-12)


def test_output_similarity_averages_over_inputs() -> None:
    outputs = np.array([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    assert output_similarity(outputs)[0, 1] == pytest.approx(0.5)


@pytest.mark.parametrize("num", [2, 3, 8])
def test_no_expert_keeps_its_place(num: int) -> None:
    for seed in range(20):
        moved = derangement(num, np.random.default_rng(seed))
        assert sorted(moved) == list(range(num)) and (moved != np.arange(num)).all()


def test_a_lonely_expert_stays() -> None:
    assert derangement(1, np.random.default_rng(0)).tolist() == [0]
