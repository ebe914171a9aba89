"""When the watch looks, what it says of whom, and what it keeps for a stage that is interrupted."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.data.tokens.windows import EvaluationSet, evaluation_windows
from lifelong_moe.evaluation.rise import Rise
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.storage.directories import write_directory
from lifelong_moe.training.callbacks.watch import FILE, ForgettingWatch, Watched

Row = tuple[int, dict[str, float]]


def text(seed: int, documents: int = 8) -> EvaluationSet:
    draw = np.random.default_rng(seed)
    rows = np.concatenate([np.concatenate([[0], draw.integers(1, 61, 9)]) for _ in range(documents)])
    shard = TokenShard(rows, np.arange(0, 10 * documents + 1, 10), np.full(documents, 30))
    return evaluation_windows(shard, 16, shard.num_tokens)


TEXTS = {"english": text(0), "german": text(1), "czech": text(2)}


class Stage:
    """Steps of a stage of 20, which learns ``czech``, and what is logged of it."""

    def __init__(self, model: LanguageModel, path: Path, first_step: int = 0, **changes: Any) -> None:
        given = {"texts": TEXTS, "after": frozenset({5, 10, 15}), "batch_tokens": 64} | changes
        self.watch = ForgettingWatch(Watched(stage="three", own=("czech",), steps=20, **given), first_step, path)
        self.model, self.points = model, list[Row]()
        logger = SimpleNamespace(log_metrics=lambda found, step: self.points.append((step, found)))
        self.trainer: Any = SimpleNamespace(
            global_step=0, accumulate_grad_batches=2, loggers=[logger], is_global_zero=True
        )
        self.module: Any = SimpleNamespace(model=model)

    def begin(self, step: int = 0) -> None:
        self.trainer.global_step = step
        self.watch.on_train_start(self.trainer, self.module)

    def take(self, first: int, last: int) -> None:
        """Steps of two micro-batches, each of which moves the weights."""
        for number in range(first, last + 1):
            for micro in (0, 1):
                self.trainer.global_step = number - 1 + micro
                self.watch.on_train_batch_end(self.trainer, self.module, None, None, 2 * (number - 1) + micro)
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.mul_(1.01)


@pytest.fixture
def stage(make_model: Callable[..., LanguageModel], tmp_path: Path) -> Stage:
    return Stage(make_model(), tmp_path / "watch")


def test_it_looks_at_the_start_and_once_after_each_step_that_is_due(stage: Stage) -> None:
    stage.begin()
    stage.take(1, 20)
    assert [step for step, _ in stage.points] == [0, 5, 10, 15]
    names = {f"watch_bits_per_byte/{name}" for name in TEXTS} | {"watch/kl_nats_per_token"}
    assert all(set(found) == names for _, found in stage.points)
    kl = [found["watch/kl_nats_per_token"] for _, found in stage.points]
    assert kl[0] == 0 and kl == sorted(kl) and kl[-1] > kl[1] > 0
    assert stage.model.training


def test_numbers_are_those_of_the_whole_text(stage: Stage) -> None:
    from lifelong_moe.evaluation.loss import evaluate

    stage.begin()
    for name, windows in TEXTS.items():
        found = evaluate(stage.model, windows, distribution=name, batch_tokens=999)
        assert stage.points[0][1][f"watch_bits_per_byte/{name}"] == pytest.approx(found.bits_per_byte, rel=1e-6)


def test_a_falling_distribution_is_named_when_it_begins_and_when_it_is_twice_as_bad(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    looks = [
        {"english": Rise(0.005, 0.0), "german": Rise(0.08, 0.03)},  # little, and noise
        {"english": Rise(0.04, 0.01), "german": Rise(0.13, 0.03)},
        {"english": Rise(0.07, 0.01), "german": Rise(0.27, 0.03)},
        {"english": Rise(0.081, 0.03), "german": Rise(2.0, 0.03)},  # not sure any more; said twice
        {"english": Rise(0.09, 0.01), "german": Rise(2.0, 0.03)},
        {"english": Rise(9.0, 0.01), "german": Rise(9.0, 0.03)},
    ]
    with caplog.at_level(logging.WARNING):
        for step, rises in enumerate(looks, 1):
            stage.watch._warn(step, rises, 0.314)
    assert caplog.messages == [
        "stage three, 10 % in: held-out bits per byte are above the stage's start by 0.04 ± 0.01 on english, "
        "0.13 ± 0.03 on german; KL from the old model on czech is 0.31 nats a token",
        "stage three, 15 % in: held-out bits per byte are above the stage's start by 0.27 ± 0.03 on german; "
        "KL from the old model on czech is 0.31 nats a token",
        "stage three, 25 % in: held-out bits per byte are above the stage's start by 0.09 ± 0.01 on english; "
        "KL from the old model on czech is 0.31 nats a token",
    ]


def test_a_loss_that_rises_is_found_and_the_stage_s_own_is_not_blamed(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    stage.begin()
    with torch.no_grad():
        # Sure of what it says, as right or wrong as before.
        stage.model.head.weight.mul_(4)
    with caplog.at_level(logging.WARNING):
        stage.take(5, 5)
    (said,) = caplog.messages
    assert said.startswith("stage three, 25 % in: ") and " on english, " in said and " on german; " in said
    assert "± " in said and "on czech is" in said and "on czech," not in said


def test_nothing_is_said_of_a_model_that_stays(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.begin()
    with caplog.at_level(logging.WARNING):
        stage.take(5, 5)
    assert caplog.messages == []
    assert stage.points[1][1] == pytest.approx(stage.points[0][1], abs=1e-6)


def test_an_interrupted_stage_compares_with_what_it_began_with(stage: Stage, tmp_path: Path) -> None:
    stage.begin()
    stage.take(1, 7)
    again = Stage(stage.model, tmp_path / "watch")
    again.begin(step=7)
    again.take(8, 20)
    assert [step for step, _ in again.points] == [10, 15]
    # Not with the weights that it continues with, from which step 10 is three steps away.
    assert again.points[0][1]["watch/kl_nats_per_token"] > stage.points[1][1]["watch/kl_nats_per_token"]
    # A later phase counts the steps before it, and begins with nothing of its own.
    review = Stage(stage.model, tmp_path / "watch", first_step=12)
    review.begin()
    review.take(1, 8)
    assert [step for step, _ in review.points] == [3]


def test_without_what_the_stage_began_with_nothing_is_compared(stage: Stage, tmp_path: Path) -> None:
    stage.begin(step=4)
    stage.take(5, 20)
    assert stage.points == [] and not (tmp_path / "watch").exists()


@pytest.mark.parametrize("damage", ["bytes", "text", "ids", "file", "shape", "more"])
def test_a_damaged_start_costs_the_watch_and_not_the_stage(
    stage: Stage, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    stage.begin()
    path, start = tmp_path / "watch", stage.watch._start
    assert start is not None
    tensors = {f"nats/{name}": torch.from_numpy(nats) for name, nats in start.nats.items()}
    said = start.predictions
    tensors |= {"ids": said.ids_TK, "logs": said.logs_TK, "rest": said.rest_T}
    match damage:
        case "bytes":
            (path / FILE).write_bytes(b"x")
        case "text":
            tensors["nats/german"] = tensors["nats/german"][:7]
        case "ids":
            tensors["ids"] = tensors["ids"] + 61
        case "file":
            del tensors["rest"]
        case "shape":
            tensors["ids"] = tensors["ids"][0, 0]
        case "more":
            tensors["nats/french"] = tensors["nats/german"].clone()
    if damage != "bytes":
        shutil.rmtree(path)
        write_directory(path, {FILE: lambda file: save_file(tensors, file)})
    again = Stage(stage.model, path)
    with caplog.at_level(logging.WARNING):
        again.begin(step=4)
        again.take(5, 20)
    assert again.points == []
    (line,) = caplog.messages
    assert line.startswith("stage three: forgetting is not watched: ") and str(path) in line


def test_where_nothing_is_logged_it_still_looks(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.trainer.loggers = []
    stage.begin()
    stage.take(1, 20)
    assert stage.points == []


def test_with_nothing_known_before_only_the_divergence_is_there(
    make_model: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    stage = Stage(make_model(), tmp_path / "watch", texts={"czech": TEXTS["czech"]})
    stage.begin()
    stage.take(1, 20)
    assert {key for _, found in stage.points for key in found} == {
        "watch_bits_per_byte/czech",
        "watch/kl_nats_per_token",
    }
