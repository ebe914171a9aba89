"""A comparison whose runs several processes train: killed in one arm, it goes on and takes up what was finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from lifelong_moe.errors import TryAgainError
from lifelong_moe.plan.comparison import load_comparison
from lifelong_moe.training.loop.module import StageModule
from pipelines.compare.compare import compare
from tests.forked import surroundings
from tests.tiny import CONTEXT, SEQUENCES, kill_self, tiny_config, write_config

pytestmark = pytest.mark.usefixtures("forked")

STEPS, EVERY = 4, 2


def test_a_comparison_goes_on_after_a_rank_was_killed(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(
        ("fruit",),
        trainer={"devices": 2, "strategy": "fsdp"},
        checkpoint={"every_steps": EVERY},
        stage_defaults={"tokens": STEPS * SEQUENCES * CONTEXT},
    )
    write_config(config)
    raw = {"compare": "c", "base": "tiny.yaml", "arms": {"a": [], "b": ["model.width=16"]}, "seeds": [0]}
    Path("compare.yaml").write_text(yaml.safe_dump(raw))
    original = StageModule.training_step

    def training_step(self: StageModule, batch: Any, batch_idx: int) -> Any:
        if (self.spec.model.width, self.global_step, dist.get_rank()) == (16, EVERY + 1, 1):
            kill_self()
        return original(self, batch, batch_idx)

    def start() -> Any:
        return compare(load_comparison("compare.yaml", []), [], False, surroundings().console)

    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "training_step", training_step)
        with pytest.raises(TryAgainError, match=r"^training process 1 of 2 was ended by SIGKILL"):
            start()
    (stage,) = Path("mlruns/stages").glob("fruit-*")
    before = stage.stat().st_mtime_ns
    assert [path.name for path in Path("mlruns/work").glob("*/step-*")] == [f"step-0-{EVERY:08d}"]
    found = start()
    assert [run["status"] for arm in found["arms"] for run in arm["runs"]] == ["committed"] * 2
    assert stage.stat().st_mtime_ns == before and len([*Path("mlruns/stages").glob("fruit-*")]) == 2
