"""What the suite takes its speed from, without which no other test would fail: stages known, and groups kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lifelong_moe.training.loop.module import StageModule
from tests import known_stages
from tests.tiny import hashes, tiny_config, train, write_config


class TrainedError(Exception):
    """A stage was trained."""


@pytest.mark.usefixtures("known_stages")
def test_what_was_trained_is_known_until_something_is_replaced(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise TrainedError

    write_config(tiny_config())
    train()
    expected = hashes()
    monkeypatch.setattr(known_stages, "train_stage", refuse)
    shutil.rmtree("mlruns")
    train()
    assert hashes() == expected
    shutil.rmtree("mlruns")
    monkeypatch.setattr(StageModule, "on_fit_end", lambda self: None)
    with pytest.raises(TrainedError):
        train()


@pytest.mark.xdist_group("itself")
def test_a_group_is_told_to_xdist(request: pytest.FixtureRequest) -> None:
    assert request.node.nodeid.endswith("@itself") == getattr(request.config.option, "loadgroup", False)
