from __future__ import annotations

import math

import pytest

from lifelong_moe.evaluation.routing import dead_experts, routing_statistics


def test_by_hand() -> None:
    # Layer 0 even over four; layer 1 half and half on experts 0 and 3.
    statistics = routing_statistics([[5, 5, 5, 5], [10, 0, 0, 10]], [[0, 0, 1, 2]] * 2, learned_in=0)
    assert statistics.entropy == pytest.approx((math.log(4) + math.log(2)) / 2)
    assert statistics.max_over_mean == pytest.approx((1 + 2) / 2)
    assert statistics.unused_experts == 2
    assert statistics.leak == pytest.approx((0.5 + 0.5) / 2)


@pytest.mark.parametrize(("learned_in", "leak"), [(0, 0.75), (1, 0.5), (2, 0.0), (3, 0.0)])
def test_leak_counts_experts_born_later(learned_in: int, leak: float) -> None:
    assert routing_statistics([[2, 2, 4]], [[0, 1, 2]], learned_in).leak == leak


def test_layers_that_grew_differently() -> None:
    # Layer 0 grew in stage 1, layer 1 in stage 2, layer 2 never.
    statistics = routing_statistics([[6, 2], [1, 1, 2], [3, 1]], [[0, 1], [0, 0, 2], [0, 0]], learned_in=0)
    assert statistics.leak == pytest.approx((2 / 8 + 2 / 4 + 0) / 3)
    assert statistics.max_over_mean == pytest.approx((6 / 4 + 2 * 3 / 4 + 3 / 2) / 3)
    assert routing_statistics([[6, 2], [1, 1, 2]], [[0, 1], [0, 0, 2]], learned_in=1).leak == pytest.approx(2 / 4 / 2)


def test_collapse_is_not_hidden_by_the_other_layer() -> None:
    # Pooled, the two layers would look even.
    statistics = routing_statistics([[8, 0], [0, 8]], [[0, 0]] * 2, 0)
    assert (statistics.entropy, statistics.max_over_mean, statistics.unused_experts) == (0.0, 2.0, 2)


def test_unused_is_less_than_a_thousandth_of_an_even_share() -> None:
    # Two experts: an even share is half, so unused is below 0.0005.
    assert routing_statistics([[99_960, 40]], [[0, 0]], 0).unused_experts == 1
    assert routing_statistics([[99_940, 60]], [[0, 0]], 0).unused_experts == 0


def test_a_layer_without_assignments_is_refused() -> None:
    with pytest.raises(ValueError, match="every layer needs at least one assignment"):
        routing_statistics([[1, 1], [0, 0]], [[0, 0]] * 2, 0)


def test_an_expert_of_another_distribution_is_not_dead() -> None:
    # Two generations of two experts: each distribution uses its own, and of the second one layer 1 leaves one out.
    old, new = [[6, 4, 0, 0], [5, 5, 0, 0]], [[0, 0, 3, 7], [0, 0, 10, 0]]
    births = [[0, 0, 1, 1]] * 2
    assert [routing_statistics(c, births, g).unused_experts for g, c in enumerate((old, new))] == [4, 5]
    assert dead_experts([old, new]) == 1
    assert dead_experts([old]) == 4 and dead_experts([[[99_960, 40]]]) == 1 and dead_experts([[[99_940, 60]]]) == 0
    assert dead_experts([[[], [1, 1]], [[], [2, 0]]]) == 0  # a dense layer has none
