"""Meter and step checkpoints by a clock and a trainer of our own."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lifelong_moe.errors import TryAgainError
from lifelong_moe.training.callbacks import progress as callbacks
from lifelong_moe.training.callbacks.energy import EnergyCounter
from lifelong_moe.training.callbacks.interrupt import Interrupt
from lifelong_moe.training.callbacks.progress import Meter, StepCheckpoint


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(time, "perf_counter", found)
    monkeypatch.setattr(time, "monotonic", found)
    counter = EnergyCounter(lambda: round(10 * found.now), 0.5)  # five watts
    monkeypatch.setattr(callbacks, "energy_counters", lambda device: [counter])
    monkeypatch.setattr(callbacks, "peak_megabytes", lambda device: 512.0)
    return found


class Steps:
    """A trainer that takes steps of two micro-batches; each waits two seconds for data and takes three."""

    def __init__(self, clock: Clock, meter: Meter, max_steps: int = 100) -> None:
        self.clock, self.meter = clock, meter
        self.points: list[tuple[int, dict[str, float]]] = []
        logger = SimpleNamespace(log_metrics=lambda point, step: self.points.append((step, point)))
        self.trainer: Any = SimpleNamespace(
            global_step=0, max_steps=max_steps,
            loggers=[] if logger is None else [logger], strategy=SimpleNamespace(root_device=None),
            optimizers=[SimpleNamespace(param_groups=[{"lr": 0.1}, {"lr": 0.25}])],
        )  # fmt: skip
        guard = SimpleNamespace(nonfinite_steps=2, skipped_spikes=3)
        self.module: Any = SimpleNamespace(means=SimpleNamespace(values={"loss": 1.5}), grad_norm=0.75, guard=guard)

    def take(self, number: int) -> None:
        for _ in range(number):
            for micro in (0, 1):
                self.clock.now += 2
                self.meter.on_train_batch_start(self.trainer, self.module, None, micro)
                self.clock.now += 3
                self.trainer.global_step += micro
                self.meter.on_train_batch_end(self.trainer, self.module, None, None, micro)


def test_a_point_of_the_curves_by_hand(clock: Clock) -> None:
    meter = Meter(step_tokens=640, step_flops=4e13, every_steps=3, rollbacks=1)
    steps = Steps(clock, meter, max_steps=7)
    meter.on_train_start(steps.trainer, steps.module)
    steps.take(7)
    assert [step for step, _ in steps.points] == [3, 6, 7]  # and the last one
    assert steps.points[0][1] == {
        "train/loss_nats_per_token": 1.5, "train/learning_rate": 0.25, "train/tokens": 1920.0, "train/grad_norm": 0.75,
        "train/nonfinite_steps": 2.0, "train/skipped_spikes": 3.0, "train/rollbacks": 1.0,
        "train_speed/tokens_per_second": 64.0, "train_speed/tflops_per_second": 4.0, "train_speed/data_fraction": 0.4,
        "train_speed/peak_memory_megabytes": 512.0,
    }  # fmt: skip
    assert (meter.seconds, meter.data_seconds, meter.last) == (70.0, 28.0, {"train/loss": 1.5})
    meter.on_train_end(steps.trainer, steps.module)
    assert meter.energy.joules == 350.0


def test_an_interrupted_stage_counts_all_of_it(clock: Clock) -> None:
    first = Meter(640, 4e13, 3)
    steps = Steps(clock, first)
    first.on_train_start(steps.trainer, steps.module)
    steps.take(4)
    state = first.state_dict()
    assert state == {"seconds": 40.0, "data_seconds": 16.0, "joules": 200.0, "last": {"train/loss": 1.5}}
    clock.now += 500  # nobody trains
    second = Meter(640, 4e13, 3)
    second.load_state_dict(state)
    steps.meter = second
    second.on_train_start(steps.trainer, steps.module)
    steps.take(2)
    assert [step for step, _ in steps.points] == [3, 6]
    assert steps.points[-1][1]["train_speed/tokens_per_second"] == 64.0
    assert second.state_dict()["joules"] == 300.0
    second.load_state_dict({key: value for key, value in state.items() if key != "joules"})
    assert second.energy.joules is None  # of an earlier version: a part of it would pass for the whole


def test_a_process_s_peak_never_falls() -> None:
    cpu = torch.device("cpu")
    before = callbacks.peak_megabytes(cpu)
    held = bytearray(b"x" * 300_000_000)
    after = callbacks.peak_megabytes(cpu)
    del held
    # Libraries alone take more than 100 MB; a machine has less than a terabyte.
    assert 100 < before <= after == callbacks.peak_megabytes(cpu) < 1e6 and after >= 300


class Saving:
    """A trainer that only says where it is, and notes what it saves."""

    def __init__(self, work: Path, world: int = 1, *, every: int = 4, requested: bool = False) -> None:
        self.interrupt = Interrupt()
        self.interrupt.requested = requested
        self.saved, self.flushed, self.waited = [], [], list[int | str]()
        self.callback = StepCheckpoint(work, 0, every, self.interrupt, lambda: self.waited.append(len(self.saved)))
        self.trainer: Any = SimpleNamespace(
            global_step=0, max_steps=10, world_size=world, accumulate_grad_batches=2, is_global_zero=True,
            loggers=[SimpleNamespace(save=lambda: self.flushed.append(len(self.saved)))], save_checkpoint=self._save,
            strategy=SimpleNamespace(
                reduce_boolean_decision=lambda value, all: value, barrier=lambda: self.waited.append("all")
            ),
        )  # fmt: skip

    def _save(self, path: Path) -> None:
        path.mkdir(parents=True)
        self.saved.append(path.name)

    def step(self, number: int) -> None:
        """The two micro-batches of a step; Lightning counts it with the second."""
        for micro in (0, 1):
            self.trainer.global_step = number - 1 + micro
            self.callback.on_train_batch_end(self.trainer, None, None, None, 2 * (number - 1) + micro)  # type: ignore[arg-type]


def numbers(saving: Saving) -> list[int]:
    return [int(name.rsplit("-", 1)[1]) for name in saving.saved]


def test_checkpoints_come_every_so_many_whole_steps(tmp_path: Path) -> None:
    saving = Saving(tmp_path, every=2)
    for number in range(1, 11):
        saving.step(number)
    assert numbers(saving) == [2, 4, 6, 8, 10] and saving.flushed == [0, 1, 2, 3, 4]  # curves before the checkpoint
    assert saving.waited == []  # training goes on while they are written


def test_the_end_is_saved_where_another_process_goes_on_from_it(tmp_path: Path) -> None:
    alone, two = Saving(tmp_path / "alone"), Saving(tmp_path / "two", world=2)
    for saving in (alone, two):
        for number in range(7, 11):
            saving.step(number)
    assert numbers(alone) == [8] and numbers(two) == [8, 10]
    assert alone.waited == [] and two.waited == [2, "all"]


def test_a_request_to_stop_is_heard_at_the_step_s_end_and_saves_once(tmp_path: Path) -> None:
    saving = Saving(tmp_path, requested=True)
    with pytest.raises(TryAgainError, match="after step 3, which is checkpointed"):
        saving.step(3)
    assert numbers(saving) == [3] and saving.waited == [1, "all"]
    saving.callback.on_train_batch_end(saving.trainer, None, None, None, 5)  # type: ignore[arg-type]
    assert numbers(saving) == [3]
