"""Which device a run's models are read on; GPUs are counted, not there."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.training.loop.device import configured_device, rounds_products
from lifelong_moe.training.loop.execution import tf32
from lifelong_moe.training.loop.trainer import lightning_precision


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("accelerator", "devices", "expected"),
    [
        ("auto", 1, "cuda:0"),
        ("gpu", [2], "cuda:2"),
        ("cuda", "3,", "cuda:3"),
        ("auto", [1], "cuda:1"),
        ("cpu", 1, "cpu"),
        ("cpu", 2, "cpu"),
    ],
)
def test_it_is_the_one_that_trains(accelerator: str, devices: Any, expected: str) -> None:
    assert configured_device(TrainerConfig(accelerator=accelerator, devices=devices)) == torch.device(expected)


@pytest.mark.parametrize(("accelerator", "devices"), [("gpu", 1), ("gpu", [3]), ("auto", [1]), ("tpu", 1)])
def test_of_a_run_of_another_machine_it_is_the_cpu(
    accelerator: str, devices: Any, caplog: pytest.LogCaptureFixture
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine may have that device")
    with caplog.at_level(logging.WARNING):
        assert configured_device(TrainerConfig(accelerator=accelerator, devices=devices)) == torch.device("cpu")
    assert f"trainer.accelerator={accelerator}, trainer.devices={devices}: using the CPU instead" in caplog.text


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("precision", "accelerator", "capability", "expected"),
    [
        ("auto", "gpu", (8, 0), "bf16-mixed"),
        ("auto", "auto", (9, 0), "bf16-mixed"),
        ("auto", "gpu", (7, 5), "32-true"),  # no products in bfloat16 there
        ("auto", "cpu", (9, 0), "32-true"),
        ("32-true", "gpu", (9, 0), "32-true"),
        ("bf16-true", "gpu", (9, 0), "bf16-true"),
    ],
)
def test_auto_precision_is_what_the_device_multiplies_in(
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    accelerator: str,
    capability: tuple[int, int],
    expected: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = TrainerConfig(precision=precision, accelerator=accelerator)
    assert lightning_precision(config) == expected
    assert rounds_products(config) == (precision == "auto" and expected == "bf16-mixed")


def test_tf32_is_allowed_where_it_is_asked_for_and_not_after() -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    with tf32(False):
        assert torch.get_float32_matmul_precision() == "highest"
    with tf32(True):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"
