"""The rise of a loss and its standard error, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lifelong_moe.evaluation.rise import Rise, paired_rise

LN2 = math.log(2)


def test_excerpts_of_one_length_have_the_error_of_a_mean() -> None:
    # Differences of 1, 2, 3 and 6 nats on ten tokens of 40 bytes each: their sum is 12, their deviation sqrt(14 / 3).
    before, tokens = np.array([5.0, 90.0, 7.0, 20.0]), np.full(4, 10)
    found = paired_rise(before, before + np.array([1, 2, 3, 6]), tokens, 160)
    assert found.bits_per_byte == pytest.approx(12 / LN2 / 160)
    assert found.error == pytest.approx(math.sqrt(4 * 14 / 3) / LN2 / 160)


def test_what_makes_an_excerpt_hard_cancels_and_its_length_weighs() -> None:
    # Each token is worse by 0.1 nats, in whatever excerpt: there is no noise.
    tokens = np.array([10, 30, 5])
    found = paired_rise(np.array([1.0, 200.0, 3.0]), np.array([1.0, 200.0, 3.0]) + 0.1 * tokens, tokens, 90)
    assert found.bits_per_byte == pytest.approx(4.5 / LN2 / 90)
    assert found.error == pytest.approx(0, abs=1e-12)


def test_one_excerpt_says_nothing_of_noise() -> None:
    found = paired_rise(np.array([1.0]), np.array([9.0]), np.array([4]), 16)
    assert found.bits_per_byte == pytest.approx(8 / LN2 / 16) and found.error == math.inf
    assert not found.is_real


@pytest.mark.parametrize(
    ("rise", "error", "is_real"),
    [(0.4, 0.1, True), (0.3, 0.1, False), (0.011, 0.0, True), (0.01, 0.0, False), (-1.0, 0.0, False),
     (math.nan, math.nan, False), (math.nan, 0.0, False)],
)  # fmt: skip
def test_a_rise_is_real_beyond_three_errors_and_a_hundredth_of_a_bit(rise: float, error: float, is_real: bool) -> None:
    assert Rise(rise, error).is_real is is_real


def test_chance_is_seldom_taken_for_a_rise() -> None:
    """Of eight excerpts without a rise, one in a hundred at most seems to have one."""
    draw, tokens = np.random.default_rng(0), np.full(8, 32)
    looks = [paired_rise(np.zeros(8), draw.normal(0, 20, 8), tokens, 800).is_real for _ in range(4000)]
    assert 0.004 < np.mean(looks) < 0.016
