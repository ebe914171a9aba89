"""Where a model reads and writes text between steps; GPUs are counted, not there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch

from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Generation
from lifelong_moe.training.loop.device import on_configured_device
from tests.pretended_gpu import Pretended, pretended_gpu

Make = Callable[..., LanguageModel]


@pytest.fixture(autouse=True)
def _gpu() -> Iterator[None]:
    with pretended_gpu():
        yield


def test_on_the_device_that_trains(make_model: Make) -> None:
    model = on_configured_device(make_model("bundles", (4, 2)), TrainerConfig())
    assert all(isinstance(tensor, Pretended) for tensor in (*model.parameters(), *model.buffers()))
    assert not isinstance(on_configured_device(model, TrainerConfig(accelerator="cpu")).embedding.weight, Pretended)


def test_what_is_there_is_not_walked_through(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(LanguageModel, "_apply", lambda self, *more: pytest.fail("moved to where it is"))
    assert on_configured_device(model, TrainerConfig(accelerator="cpu")) is model


@pytest.mark.parametrize(("free", "fits"), [(1.2, False), (1.3, True)])
def test_what_has_no_room_there_stays_on_the_cpu(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, free: float, fits: bool
) -> None:
    model = make_model()
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * size), 2 * size))
    with caplog.at_level(logging.WARNING):
        on_configured_device(model, TrainerConfig())
    assert isinstance(model.embedding.weight, Pretended) is fits
    assert ("is read on the CPU: cuda:0 has" in caplog.text) is not fits


def test_a_generation_that_is_added_is_where_the_model_is(make_model: Make) -> None:
    model = make_model("learned", (4,)).to("cuda:0")
    for generation in (Generation("a", 2, delta_rank=2), Generation("b", 2, rank=2)):
        model.add_generation(generation)
    assert all(isinstance(tensor, Pretended) for tensor in (*model.parameters(), *model.buffers()))
