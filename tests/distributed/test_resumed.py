"""Ranks that each hold a part of the model go on from a step checkpoint, bit for bit if there are as many of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lifelong_moe.errors import TryAgainError
from lifelong_moe.training.loop.module import StageModule
from tests.tiny import CONTEXT, SEQUENCES, hashes, kill_self, tiny_config, train, wait_for_checkpoint, write_config

pytestmark = pytest.mark.usefixtures("forked")

STEPS, EVERY = 6, 2


@pytest.mark.parametrize(
    "trainer",
    [
        {"devices": 2, "strategy": "fsdp"},
        {"devices": 2, "expert_parallel": 2},
        {"devices": 4, "strategy": "fsdp", "expert_parallel": 2},
    ],
    ids=["fsdp", "expert parallel", "both, with four"],
)
def test_as_many_ranks_end_in_the_same_bits(
    lab: Path, monkeypatch: pytest.MonkeyPatch, trainer: dict[str, Any]
) -> None:
    # Each rank draws noise; the second stage has frozen experts, a teacher and old text.
    config = tiny_config(trainer=trainer, routing={"jitter": 0.3}, checkpoint={"every_steps": EVERY})
    config["stage_defaults"] |= {"tokens": STEPS * SEQUENCES * CONTEXT, "distill": {"text": "new", "fraction": 0.5}}
    write_config(config)
    train()
    expected, original = hashes(), StageModule.training_step
    for kept in (*Path("mlruns/stages").glob("code-*"), Path("mlruns/runs/tiny")):
        shutil.rmtree(kept)

    def training_step(self: StageModule, batch: Any, batch_idx: int) -> Any:
        if (self.global_step, dist.get_rank()) == (EVERY + 1, 1):
            wait_for_checkpoint(EVERY)
            kill_self()
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "training_step", training_step)
        with pytest.raises(TryAgainError):
            train()
    (stopped,) = Path("mlruns").glob(f"work/*/step-0-{EVERY:08d}")
    # Each writes what it has; beside shards the first has the states of generators alone, of 5 KB.
    sizes = [path.stat().st_size for path in stopped.glob("*.safetensors")]
    assert len(sizes) == trainer["devices"]
    assert trainer.get("strategy") != "fsdp" or "expert_parallel" in trainer or max(sizes) < 1.5 * min(sizes)
    _, printed = train()
    assert f"code: continuing from step-0-{EVERY:08d}" in printed
    assert hashes() == expected
