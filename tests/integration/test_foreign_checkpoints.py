"""A step checkpoint of somebody else: its manifest fits, and what it holds is not what Lightning and PyTorch expect."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lifelong_moe.errors import CorruptError
from lifelong_moe.training.callbacks import progress
from tests.tiny import tiny_config, train, write_config, write_corpora

STEP = 8


class StoppedError(Exception):
    """By the fixture."""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted after :data:`STEP` steps."""
    root = tmp_path_factory.mktemp("interrupted")
    original = progress.StepCheckpoint.on_train_batch_end

    def on_train_batch_end(self: Any, trainer: Any, *args: Any) -> None:
        original(self, trainer, *args)
        if trainer.global_step == STEP:
            raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(progress.StepCheckpoint, "on_train_batch_end", on_train_batch_end)
        write_corpora(root)
        write_config(tiny_config(("fruit",)))
        with pytest.raises(StoppedError):
            train()
    return root


def put(where: str, value: Any) -> Callable[[Any], None]:
    """Set what stands at a dotted path of the state."""
    *steps, last = (int(step) if step.isdigit() else step.replace("/", ".") for step in where.split("."))

    def change(state: Any) -> None:
        for step in steps:
            state = state[step]
        if value is None:
            del state[last]
        else:
            state[last] = value

    return change


def change_tensor(of: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, dict[str, Any]], None]:
    """Change the tensor of the first parameter's state."""

    def apply(state: Any, tensors: dict[str, Any]) -> None:
        _, moments = state["optimizer_states"][0]["state"]["$items"][0]
        name = moments[of]["$tensor"]
        tensors[name] = change(tensors[name])

    return apply


LOOP = "loops.fit_loop"
OPTIMIZER = f"{LOOP}.epoch_loop/automatic_optimization/optim_progress.optimizer"
CHANGES: dict[str, Callable[[Any], None]] = {
    "no loop": put("loops.fit_loop", None),
    "a loop's list": put("loops.fit_loop", []),
    "a count's text": put(f"{LOOP}.epoch_progress.total.processed", "x"),
    "a count's object": put(f"{LOOP}.epoch_progress.current.processed", {}),
    "another step": put(f"{OPTIMIZER}.step.total.completed", -(10**9)),
    "another global step": put(f"{LOOP}.epoch_loop/batch_progress.current.ready", "x"),
    "no schedule": put("lr_schedulers.0", None),
    "a rate's tensor": put("lr_schedulers.0.base_lrs.0", {"$tensor": "t0"}),
    "a schedule's text": put("lr_schedulers.0.base_lrs", "x"),
    "no groups": put("optimizer_states.0.param_groups", None),
    "a rate's text": put("optimizer_states.0.param_groups.0.lr", "x"),
    "a group's parameters": put("optimizer_states.0.param_groups.0.params", [0]),
    "no moment": put("optimizer_states.0.state.$items.0.1.exp_avg", None),
    "a moment's text": put("optimizer_states.0.state.$items.0.1.exp_avg", "x"),
    "no optimizer": put("optimizer_states", []),
    "no guard": put("guard", None),
    "a guard's text": put("guard.losses", "x"),
    "a guard's method": put("guard.nonfinite_steps", "x"),
    "no meter": put("callbacks.Meter.seconds", None),
    "a meter's text": put("callbacks.Meter.last", "x"),
    "callbacks' list": put("callbacks", []),
    "random states": put("random_states.0.cpu", "x"),
    "weights' list": put("state_dict", []),
    "a weight's text": put("state_dict.model/embedding/weight", "x"),
    "assignments": put("assignments_before", {"$tensor": "t0"}),
    "assignments' number": put("assignments_before", 3),
}  # fmt: skip
TENSORS = {
    "a moment's shape": change_tensor("exp_avg", lambda tensor: torch.zeros(3, 5)),
    "a moment of one number": change_tensor("exp_avg_sq", lambda tensor: torch.zeros(())),
    "a step's shape": change_tensor("step", lambda tensor: torch.zeros(4)),
}


def changed(interrupted: Path, into: Path, change: Callable[[Any, dict[str, Any]], None]) -> Path:
    """A copy of the run with another checkpoint, whose manifest lists what is there."""
    shutil.copytree(interrupted, into)
    [newest] = into.glob(f"mlruns/work/*/step-*{STEP}")
    state, tensors = json.loads((newest / "state.json").read_text()), load_file(newest / "state.safetensors")
    change(state, tensors)
    (newest / "state.json").write_text(json.dumps(state))
    save_file(tensors, newest / "state.safetensors")
    manifest = json.loads((newest / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (newest / name).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    return newest


@pytest.mark.parametrize("kind", [*CHANGES, *TENSORS])
def test_a_checkpoint_that_does_not_fit_is_one_line(
    kind: str, interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = TENSORS.get(kind) or (lambda state, tensors: CHANGES[kind](state))
    newest = changed(interrupted, tmp_path / "copy", change)
    monkeypatch.chdir(tmp_path / "copy")
    with pytest.raises(CorruptError) as caught:
        train()
    assert "\n" not in str(caught.value) and str(newest.parent.relative_to(tmp_path / "copy")) in str(caught.value)
    assert not list(Path("mlruns/stages").glob("*"))
    shutil.rmtree(newest.relative_to(tmp_path / "copy"))  # the remedy that the message names
    _, printed = train()
    assert "continuing from step-0-00000004" in printed


def test_a_bug_of_a_later_step_is_no_fault_of_the_checkpoint(
    interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(interrupted, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    original = progress.Meter.on_train_batch_end

    def on_train_batch_end(self: Any, trainer: Any, *args: Any) -> None:
        original(self, trainer, *args)
        if trainer.global_step == STEP + 2:
            raise TypeError("a bug")

    monkeypatch.setattr(progress.Meter, "on_train_batch_end", on_train_batch_end)
    with pytest.raises(TypeError, match="a bug"):
        train()
