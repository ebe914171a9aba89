"""What a stage held while it trained is gone once it is committed: evaluation reads the stage anew."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from lifelong_moe.training import stage as stages
from tests.tiny import tiny_config, train, write_config


@pytest.mark.parametrize("changes", [{}, {"distill": {"weight": 0.5}}, {"average": 0.25}], ids=str)
def test_models_and_optimizer_are_gone(lab: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    held: list[weakref.ref[Any]] = []
    commit, train_stage = stages.commit_stage, stages.train_stage

    def watched(run: Any, model: Any, metrics: Any) -> Any:
        held.extend(map(weakref.ref, [model, *model.parameters()]))
        return commit(run, model, metrics)

    def checked(*arguments: Any) -> Any:
        gc.disable()
        try:
            stage = train_stage(*arguments)
            assert held and not any(one() is not None for one in held)
        finally:
            gc.enable()
        held.clear()
        return stage

    monkeypatch.setattr(stages, "commit_stage", watched)
    monkeypatch.setattr("pipelines.run.run.train_stage", checked)
    train(write_config(tiny_config(stage_defaults=changes)))
