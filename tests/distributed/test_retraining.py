"""A tick whose probes and candidate two processes train promotes what a tick of one process does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lifelong_moe.errors import TryAgainError
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.loop.module import StageModule
from tests.retrain_lab import arrive, head, ledger, make_base, tick_and_text, write_retraining
from tests.tiny import CONTEXT, SEQUENCES, kill_self, stored_evaluations, working_in

pytestmark = pytest.mark.usefixtures("forked")

STEPS = 12


@dataclass(frozen=True)
class Ticked:
    """What a tick left."""

    outcome: dict[str, Any]
    printed: str
    weights: dict[str, Tensor]
    """Of the champion."""
    losses: list[float]
    """Nats of each held-out text by each stage and probe, sorted."""


def ticked(*overrides: str) -> Ticked:
    """One tick in the current directory."""
    outcome, printed = tick_and_text(*overrides)
    store = StageStore(Path("mlruns"))
    losses = sorted(sum(one["nats"]) for one in stored_evaluations() if "nats" in one)
    return Ticked(outcome, printed, store.tensors(store.get(head()["stages"][-1])), losses)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a batch in its inbox; to be copied."""
    root = tmp_path_factory.mktemp("base")
    with working_in(root):
        make_base(root, stage_defaults={"tokens": STEPS * SEQUENCES * CONTEXT}, checkpoint={"every_steps": 4})
        write_retraining(probe={"fraction": 0.5}, drift={"documents": 40})
        arrive("sea")
    return root


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Ticked:
    """What one process does."""
    root = tmp_path_factory.mktemp("one") / "lab"
    shutil.copytree(base, root)
    with working_in(root):
        return ticked()


@pytest.fixture
def lab(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the base to work in."""
    shutil.copytree(base, tmp_path / "lab")
    monkeypatch.chdir(tmp_path / "lab")


def kill_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the candidate, after its first checkpoint."""
    original: Callable[..., Any] = StageModule.training_step

    def training_step(self: StageModule, batch: Any, batch_idx: int) -> Any:
        if (self.spec.steps, self.global_step, dist.get_rank()) == (STEPS, 6, 1):
            kill_self()
        return original(self, batch, batch_idx)

    monkeypatch.setattr(StageModule, "training_step", training_step)


@pytest.mark.usefixtures("lab")
@pytest.mark.parametrize(
    ("overrides", "is_killed"),
    [
        (("strategy=ddp",), False),
        (("strategy=fsdp",), True),
        (("expert_parallel=2",), False),
    ],
    ids=["ddp", "fsdp, a rank is killed", "expert parallel"],
)
def test_two_processes_promote_what_one_does(
    alone: Ticked, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], is_killed: bool
) -> None:
    before, settings = head(), ("trainer.devices=2", *(f"trainer.{one}" for one in overrides))
    if is_killed:
        with monkeypatch.context() as patch:
            kill_a_rank(patch)
            with pytest.raises(TryAgainError, match="process 1 of 2 was ended by SIGKILL"):
                ticked(*settings)
        assert head()["stages"] == before["stages"] and ledger()[-1]["outcome"] == "failed"
    found = ticked(*settings)
    assert ("continuing from step-0-00000004" in found.printed) == is_killed
    # The key does not know how many processes there were.
    for key in ("outcome", "action", "candidate", "batch", "champion"):
        assert found.outcome[key] == alone.outcome[key]
    assert found.outcome["outcome"] == "promoted"
    # Rounding of float32, of which AdamW makes more where a gradient is almost 0.
    assert found.weights.keys() == alone.weights.keys()
    apart = torch.cat([(one - alone.weights[name]).flatten() for name, one in found.weights.items()])
    assert float(apart.norm() / torch.cat([one.flatten() for one in alone.weights.values()]).norm()) < 1e-5
    assert len(found.losses) > 5 and found.losses == pytest.approx(alone.losses, rel=1e-4)
