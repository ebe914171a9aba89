from __future__ import annotations

import numpy as np

from lifelong_moe.reports.matrix import backward_transfer, forgetting, forward_transfer

#                     a    b    c
R = np.array([[2.0, 5.0, 6.0], [2.5, 3.0, 5.5], [2.25, 3.5, 4.0]])
INIT = [8.0, 8.0, 8.0]


def test_forgetting_is_positive_where_it_became_worse() -> None:
    assert forgetting(R, [0, 1, 2]).tolist() == [0.25, 0.5, 0.0]
    assert forgetting(R[:2], [0, 1]).tolist() == [0.5, 0.0]


def test_forgetting_where_it_became_better_is_negative() -> None:
    assert forgetting([[3.0, 9.0], [2.0, 4.0]], [0, 1]).tolist() == [-1.0, 0.0]


def test_backward_transfer_is_minus_the_mean_forgetting_of_earlier_ones() -> None:
    assert backward_transfer(R, [0, 1, 2]) == -(0.25 + 0.5) / 2
    assert backward_transfer([[3.0, 9.0], [2.0, 4.0]], [0, 1]) == 1.0


def test_forward_transfer_is_what_earlier_stages_taught() -> None:
    assert forward_transfer(R, INIT, [0, 1, 2]) == ((8.0 - 5.0) + (8.0 - 5.5)) / 2
    assert forward_transfer([[2.0, 9.0], [2.0, 4.0]], INIT, [0, 1]) == -1.0


def test_one_stage_has_neither() -> None:
    assert backward_transfer([[2.0]], [0]) is None
    assert forward_transfer([[2.0]], [8.0], [0]) is None
    assert forgetting([[2.0]], [0]).tolist() == [0.0]


def test_a_distribution_that_is_learned_twice() -> None:
    # Stages a, b, a: a was last learned in stage 2, first in stage 0.
    assert forgetting(R, [2, 1]).tolist() == [0.0, 0.5]
    assert backward_transfer(R, [2, 1]) == -0.5
    assert forward_transfer(R, INIT, [0, 1]) == 3.0


def test_columns_that_are_never_trained_do_not_count() -> None:
    assert forgetting(R, [0]).tolist() == [0.25]
    assert backward_transfer(R, [0]) == -0.25
