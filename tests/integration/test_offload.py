"""A run that keeps frozen experts off the device commits the same bits, and its stages are the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lifelong_moe.training.loop import fit
from tests.tiny import hashes, tiny_config, train, write_config


class Clones:
    """Copies of the CPU on the CPU; may break off at one of them."""

    device = torch.device("cpu")

    def __init__(self, breaks_at: int = 0) -> None:
        self.begun, self.breaks_at = 0, breaks_at

    def prepare(self, host: Tensor) -> Tensor:
        return host

    def start(self, hosts: Sequence[Tensor], dtype: torch.dtype | None) -> Clone:
        self.begun += 1
        if self.begun == self.breaks_at:
            raise ConnectionError("the bus broke down")
        return Clone([host.detach().to(dtype or host.dtype, copy=True) for host in hosts])


class Clone(list[Tensor]):
    """Copies that came at once."""

    def wait(self) -> list[Tensor]:
        return self


CASES: dict[str, dict[str, Any]] = {
    "distilled": {"stage_defaults": {"distill": {"weight": 1.0, "text": "replay"}}},
    "bf16-true": {"trainer": {"precision": "bf16-true"}},
    "bf16-mixed": {"trainer": {"precision": "bf16-mixed"}},
    "reviewed": {"stage_defaults": {"review": {"fraction": 0.5}}},
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits(lab: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    config, streamer = tiny_config(), Clones()
    for name, section in CASES[case].items():
        config[name] |= section
    write_config(config)
    train()
    without = hashes()
    monkeypatch.setattr(fit, "streamer_to", lambda _: streamer)
    _, printed = train("tiny.yaml", "frozen.offload=cpu")
    assert "Nothing to train" in printed and not streamer.begun  # the stages' keys are the same
    (lab / "mlruns").rename(lab / "without")
    train("tiny.yaml", "frozen.offload=cpu")
    assert streamer.begun and hashes() == without


def test_continued_without_what_broke_down(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tiny_config())
    train()
    without = hashes()
    (lab / "mlruns").rename(lab / "without")
    monkeypatch.setattr(fit, "streamer_to", lambda _: Clones(breaks_at=30))
    with pytest.raises(ConnectionError):
        train("tiny.yaml", "frozen.offload=cpu")
    _, printed = train("tiny.yaml", "frozen.offload=none")
    assert "continuing from step-0-" in printed and hashes() == without


def test_on_a_cpu_it_changes_nothing() -> None:
    assert fit.streamer_to(torch.device("cpu")) is None
