"""When fine-tuning stops, and with which weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lifelong_moe.config.training import FinetuneConfig
from lifelong_moe.training.callbacks.stopping import EarlyStopping


class Steps:
    """Steps of two micro-batches of a model whose only weight is the step's number."""

    def __init__(self, work: Path, losses: list[float], max_steps: int = 100, patience: int | None = 2) -> None:
        self.model: Any = nn.Linear(1, 1, bias=False)
        left: Iterator[float] = iter(losses)
        config = FinetuneConfig(patience=patience, every_steps=5)
        self.stopping = EarlyStopping(config, lambda model: next(left), work)
        self.trainer: Any = SimpleNamespace(
            global_step=0, max_steps=max_steps, accumulate_grad_batches=2, should_stop=False
        )

    def take(self, first: int, last: int) -> None:
        for number in range(first, last + 1):
            for micro in (0, 1):
                self.trainer.global_step = number - 1 + micro
                with torch.no_grad():
                    self.model.weight.fill_(float(number))
                module: Any = SimpleNamespace(model=self.model)
                self.stopping.on_train_batch_end(self.trainer, module, None, None, 2 * (number - 1) + micro)
            if self.trainer.should_stop:
                break


def test_it_stops_after_so_many_measurements_without_a_better_one_and_keeps_the_best(tmp_path: Path) -> None:
    steps = Steps(tmp_path, [3.0, 2.0, 2.0, 1.5, 1.6, 1.5])
    steps.take(1, 100)
    assert steps.stopping.curve == [(5, 3.0), (10, 2.0), (15, 2.0), (20, 1.5), (25, 1.6), (30, 1.5)]
    assert (steps.trainer.global_step, steps.stopping.best_step) == (30, 20)
    steps.stopping.restore(steps.model)
    assert steps.model.weight.item() == 20.0


def test_the_last_step_is_measured_and_none_twice(tmp_path: Path) -> None:
    steps = Steps(tmp_path, [3.0, 5.0, 2.0], max_steps=12)
    steps.take(1, 5)
    steps.stopping.on_train_batch_end(steps.trainer, SimpleNamespace(model=steps.model), None, None, 9)  # type: ignore[arg-type]
    steps.take(6, 12)
    assert steps.stopping.curve == [(5, 3.0), (10, 5.0), (12, 2.0)]
    assert not steps.trainer.should_stop


def test_a_phase_goes_on_measuring_or_has_ended(tmp_path: Path) -> None:
    steps = Steps(tmp_path, [3.0, 4.0])
    steps.take(1, 10)
    state = steps.stopping.state_dict()
    again = Steps(tmp_path, [3.5])
    again.stopping.load_state_dict(state)
    again.stopping.on_train_start(again.trainer, None)  # type: ignore[arg-type]
    assert (again.stopping.best, again.stopping.waited, again.trainer.should_stop) == (3.0, 1, False)
    again.take(11, 15)
    assert again.stopping.best_step == 5 and again.trainer.should_stop
    ended = Steps(tmp_path, [])
    ended.stopping.load_state_dict(again.stopping.state_dict())
    ended.stopping.on_train_start(ended.trainer, None)  # type: ignore[arg-type]
    assert ended.trainer.should_stop
    assert Steps(tmp_path, []).stopping.best == float("inf")


@pytest.mark.parametrize("patience", [None, 1])
def test_without_patience_all_steps_are_taken(tmp_path: Path, patience: int | None) -> None:
    steps = Steps(tmp_path, [1.0, 2.0, 3.0, 4.0], max_steps=20, patience=patience)
    steps.take(1, 20)
    assert steps.trainer.global_step == (20 if patience is None else 10)
