"""The speed of a plan: a few steps of the model that a run begins with."""

from __future__ import annotations

import math

import pytest

from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.plan.cost import training_flops
from lifelong_moe.training import timing
from lifelong_moe.training.timing import timed_speed
from tests.conftest import ROUTER_KINDS, build_architecture


@pytest.mark.parametrize("kind", ROUTER_KINDS)
def test_steps_of_every_router_are_timed(kind: str) -> None:
    speed = timed_speed(build_architecture(kind, (4,)), 2, TrainerConfig(accelerator="cpu"), 0.0)
    assert math.isfinite(speed) and speed > 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "auto"])
def test_steps_are_those_of_the_precision(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, clock = build_architecture("learned", (4,)), iter(range(100))
    # A step begins where less than ten seconds have passed, of a clock that moves on by three each time it is read.
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 3.0 * next(clock))
    speed = timed_speed(architecture, 2, TrainerConfig(accelerator="cpu", precision=precision), 10.0)
    tokens = 2 * architecture.model.context
    # Read after the first step, which is not timed, then as the third timed one begins and each after it.
    assert speed == pytest.approx(training_flops(architecture, 5 * tokens, None, 0) / 15.0)
