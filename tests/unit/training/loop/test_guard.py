"""Which steps may be taken, by numbers that can be checked by hand."""

from __future__ import annotations

import json
import math

import pytest

from lifelong_moe.training.loop.guard import MAX_SPIKES, MIN_LOSSES, WINDOW, StepGuard, Verdict, spike_score

EVEN = [2.0, 4.0] * 64
"""Mean 3, deviation 1."""


def full(losses: list[float]) -> StepGuard:
    """A guard that took steps with these losses."""
    guard = StepGuard()
    guard.losses.extend(losses)
    return guard


def verdicts(guard: StepGuard, losses: list[float]) -> list[Verdict]:
    return [guard.judge(loss) for loss in losses]


@pytest.mark.parametrize(("loss", "score"), [(3.0, 0.0), (4.0, 1.0), (9.5, 6.5), (1.0, -2.0)])
def test_score_by_hand(loss: float, score: float) -> None:
    assert spike_score(loss, EVEN) == pytest.approx(score, abs=1e-12)


def test_the_deviation_is_the_root_of_the_mean_square() -> None:
    # Mean 3, squares of 1 and 9 by halves: a variance of 5, while absolute values average 2 and fourth powers 41.
    losses = [2.0, 4.0, 0.0, 6.0] * 32
    assert spike_score(3.0 + 5**0.5, losses) == pytest.approx(1.0, abs=1e-12)
    assert full(losses).judge(3.0 + 6.01 * 5**0.5) == Verdict.spike
    assert full(losses).judge(3.0 + 5.99 * 5**0.5) == Verdict.sound


def test_a_flat_curve_has_a_floor_of_a_twentieth_nat() -> None:
    assert spike_score(2.2, [2.0] * WINDOW) == pytest.approx(0.2 / 0.05)
    assert full([2.0] * WINDOW).judge(2.29) == Verdict.sound
    assert full([2.0] * WINDOW).judge(2.31) == Verdict.spike


@pytest.mark.parametrize(("loss", "verdict"), [(8.99, Verdict.sound), (9.01, Verdict.spike), (-1000.0, Verdict.sound)])
def test_only_a_rise_of_more_than_six_deviations_is_a_spike(loss: float, verdict: Verdict) -> None:
    assert full(EVEN).judge(loss) == verdict


def test_too_few_losses_judge_nothing() -> None:
    assert full(EVEN[: MIN_LOSSES - 2]).judge(1e6) == Verdict.sound
    assert full(EVEN[:MIN_LOSSES]).judge(1e6) == Verdict.spike


def test_the_window_holds_the_newest_sound_losses() -> None:
    guard = full([100.0] * 8 + [2.0] * (WINDOW - 8))
    verdicts(guard, [2.0] * 8)
    assert list(guard.losses) == [2.0] * WINDOW
    assert guard.judge(2.5) == Verdict.spike  # with the old hundreds in it, no rise would have counted


def test_what_is_skipped_never_enters_the_window() -> None:
    guard = full(EVEN)
    assert verdicts(guard, [50.0, math.nan, math.inf, -math.inf]) == [Verdict.spike] + [Verdict.nonfinite] * 3
    assert list(guard.losses) == EVEN
    assert (guard.skipped_spikes, guard.nonfinite_steps, guard.nonfinite_in_a_row) == (1, 3, 3)


@pytest.mark.parametrize("others", [(math.nan, 1.0), (3.0, math.inf)])
def test_everything_must_be_finite(others: tuple[float, float]) -> None:
    guard = StepGuard()
    assert guard.judge(3.0, *others) == Verdict.nonfinite and not guard.losses


def test_a_finite_step_ends_a_row_even_if_it_is_a_spike() -> None:
    guard = full(EVEN)
    verdicts(guard, [math.nan, math.nan, 50.0])
    assert guard.nonfinite_in_a_row == 0
    verdicts(guard, [math.nan, 3.0])
    assert (guard.nonfinite_in_a_row, guard.nonfinite_steps) == (0, 3)


def test_a_rise_that_lasts_is_a_new_level() -> None:
    guard = full(EVEN)
    assert verdicts(guard, [50.0] * (MAX_SPIKES + 50)) == [Verdict.spike] * MAX_SPIKES + [Verdict.sound] * 50
    assert list(guard.losses) == [50.0] * 50
    assert guard.judge(51.0) == Verdict.spike


def test_spikes_apart_are_never_a_new_level() -> None:
    guard = full(EVEN)
    assert verdicts(guard, [50.0, 3.0] * 5) == [Verdict.spike, Verdict.sound] * 5
    assert guard.skipped_spikes == 5


def test_the_fall_at_a_stage_s_beginning_is_no_spike() -> None:
    falling = [1.5 + 8.0 * math.exp(-step / 20) + 0.05 * (-1) ** step for step in range(600)]
    guard = StepGuard()
    assert set(verdicts(guard, falling)) == {Verdict.sound}
    assert guard.judge(falling[-1] + 0.5) == Verdict.spike


def test_state_goes_through_json() -> None:
    guard, again = full(EVEN), StepGuard()
    verdicts(guard, [50.0, math.nan, 50.0])
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert vars(again) == vars(guard) and again.losses.maxlen == WINDOW
    coming = [50.0, 50.0, math.nan, 3.0, 50.0]
    assert verdicts(again, coming) == verdicts(guard, coming)
    assert guard.losses == again.losses and guard.skipped_spikes == 3
