"""Where a stage returns to and what it passes over, by numbers that can be checked by hand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lifelong_moe.config.run import RunConfig
from lifelong_moe.errors import DivergedError
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.training.callbacks.checkpoint import SafeCheckpointIO, checkpoint_path, checkpoints
from lifelong_moe.training.loop.rollback import (
    NonfiniteStepsError,
    Rollbacks,
    Skip,
    read_rollbacks,
    return_step,
    roll_back,
)

MakeRun = Callable[..., RunConfig]


@pytest.mark.parametrize(("first", "returned"), [(0, 0), (1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8)])
def test_returns_to_a_regular_checkpoint_that_a_sound_step_followed(first: int, returned: int) -> None:
    assert return_step(first, 4) == returned


def test_without_rollbacks_batches_are_the_steps() -> None:
    assert Rollbacks().batches(0, 3, 12) == [range(3, 12)]
    assert list(Rollbacks().batches(0, 12, 12)[0]) == []


def test_everything_read_since_is_passed_over() -> None:
    # Steps 6, 7 and 8 were bad, so training returns to 4; batches 4 to 8 were read since.
    once = Rollbacks().returning(0, 4, last=8)
    assert once == Rollbacks(1, (Skip(0, 4, 5),))
    assert once.batches(0, 0, 12) == [range(0, 4), range(9, 17)]
    assert once.batches(0, 4, 12) == [range(9, 17)] and once.batches(0, 6, 12) == [range(11, 17)]
    assert once.batches(1, 0, 12) == [range(0, 12)]  # another phase has its own


def test_a_later_rollback_adds_to_it() -> None:
    # Step 11 reads batch 16; returning to 8, the next one is 17.
    twice = Rollbacks().returning(0, 4, last=8).returning(0, 8, last=11)
    assert twice == Rollbacks(2, (Skip(0, 4, 5), Skip(0, 8, 9)))
    assert twice.batches(0, 0, 12) == [range(0, 4), range(9, 13), range(17, 21)]


@pytest.mark.parametrize("step", [4, 0])
def test_a_rollback_to_the_same_step_or_before_replaces_it(step: int) -> None:
    # Step 6 reads batch 11; nothing up to there is read again.
    twice = Rollbacks().returning(0, 4, last=8).returning(0, step, last=6)
    assert twice == Rollbacks(2, (Skip(0, step, 12 - step),))


def error(make_run: MakeRun, last: int, phase: int = 0) -> NonfiniteStepsError:
    spec = stage_specs(make_run("stage_defaults.review.fraction=0.5"))[1]
    return NonfiniteStepsError(spec, spec.phases()[phase], last)


def test_rolling_back_removes_what_came_after(
    make_run: MakeRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 4, 5):
        SafeCheckpointIO().save_checkpoint({"w": torch.ones(1)}, checkpoint_path(tmp_path, 0, step))
    with caplog.at_level(logging.WARNING):
        roll_back(tmp_path, error(make_run, 7), every_steps=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-0-00000002", "step-0-00000004"]
    assert read_rollbacks(tmp_path) == Rollbacks(1, (Skip(0, 4, 4),))
    assert "rolling back to step 4, skipping the 4 batches read since" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"step-0-00000002", "step-0-00000004", "rollbacks.json"}


def test_a_review_that_rolls_back_keeps_the_phase_before(make_run: MakeRun, tmp_path: Path) -> None:
    for phase, step in ((0, 4), (1, 2), (1, 4)):
        SafeCheckpointIO().save_checkpoint({"w": torch.ones(1)}, checkpoint_path(tmp_path, phase, step))
    roll_back(tmp_path, error(make_run, 4, phase=1), every_steps=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-0-00000004"]
    assert read_rollbacks(tmp_path).skips == (Skip(1, 0, 5),)


def test_the_third_time_is_divergence(make_run: MakeRun, tmp_path: Path) -> None:
    for _ in range(2):
        roll_back(tmp_path, error(make_run, 7), every_steps=2)
    before = read_rollbacks(tmp_path)
    with pytest.raises(DivergedError, match=r"stage python: 3 steps in a row .* after 2 rollbacks; nothing was comm"):
        roll_back(tmp_path, error(make_run, 7), every_steps=2)
    assert read_rollbacks(tmp_path) == before
