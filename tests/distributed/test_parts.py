"""Ranks that each write a part of a step checkpoint: a part is damaged afterwards, or a rank hangs while it writes."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch.distributed as dist
from torch import Tensor

from lifelong_moe.errors import CorruptError, TryAgainError
from lifelong_moe.model.block import Block
from lifelong_moe.training.callbacks import checkpoint
from lifelong_moe.training.loop import fit
from lifelong_moe.training.loop.module import StageModule
from lifelong_moe.training.ranks import supervise
from pipelines.cli import exit_code
from tests.distributed.test_ranks import no_children
from tests.forked import ForkedProcess
from tests.tiny import (
    CONTEXT,
    SEQUENCES,
    hashes,
    kill_self,
    tiny_config,
    train,
    wait_for_checkpoint,
    working_in,
    write_config,
    write_corpora,
)

pytestmark = pytest.mark.usefixtures("forked")

STEPS, EVERY = 6, 2
PART = "rank-0001.safetensors"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run with a committed stage, killed in the fifth step of the second, and the hashes that it ends with."""
    root = tmp_path_factory.mktemp("stopped") / "lab"
    root.mkdir()
    with working_in(root) as patch:
        patch.setattr(supervise, "Popen", ForkedProcess)
        write_corpora(root)
        config = tiny_config(trainer={"devices": 2, "strategy": "fsdp"}, checkpoint={"every_steps": EVERY})
        config["stage_defaults"]["tokens"] = STEPS * SEQUENCES * CONTEXT
        write_config({**config, "stages": config["stages"][:1]}, "first.yaml")
        train("first.yaml", "trainer.devices=1", "trainer.strategy=auto")
        write_config(config)
        with before_step(2 * EVERY + 1, killed_later), pytest.raises(TryAgainError):
            train()
    shutil.copytree(root, root.parent / "whole")
    with working_in(root.parent / "whole") as patch:
        patch.setattr(supervise, "Popen", ForkedProcess)
        train()
        return root, hashes()


@pytest.fixture
def lab(stopped: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, as the current directory."""
    shutil.copytree(stopped[0], tmp_path / "lab")
    monkeypatch.chdir(tmp_path / "lab")
    return tmp_path / "lab"


@contextmanager
def before_step(step: int, act: Callable[[], object]) -> Iterator[None]:
    """Context in which the first rank acts before a step of the second stage."""
    original = StageModule.training_step

    def training_step(self: StageModule, batch: Any, batch_idx: int) -> Any:
        if (self.spec.name, self.global_step, rank()) == ("code", step, 0):
            act()
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageModule, "training_step", training_step)
        yield


def rank() -> int | None:
    """Of this process; None of one that is no rank."""
    return dist.get_rank() if dist.is_initialized() else None


def killed_later() -> None:
    """Once the last checkpoint before is there."""
    wait_for_checkpoint(2 * EVERY)
    kill_self()


def stop() -> None:
    """Hang, with all threads."""
    # To this thread: after a signal to the process it might go on a while.
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def flip(file: Path) -> None:
    """One byte is another."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    """The last byte is gone."""
    os.truncate(file, file.stat().st_size - 1)


def part(step: int) -> Path:
    """The second rank's file of a checkpoint."""
    (found,) = Path("mlruns").glob(f"work/*/step-0-{step:08d}/{PART}")
    return found


def committed(pattern: str = "*") -> dict[str, bytes]:
    """The files of stages."""
    kept = Path("mlruns/stages").glob(f"{pattern}/**/*")
    return {str(path): path.read_bytes() for path in kept if path.is_file()}


def test_no_damaged_part_is_loaded(
    stopped: tuple[Path, list[str]],
    lab: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = committed()
    assert len(before) > 2

    # Where none is whole nothing begins, and nothing is written.
    def no_ranks(*args: Any) -> NoReturn:
        raise AssertionError("ranks were started")

    with monkeypatch.context() as patch:
        patch.setattr(fit, "run_ranks", no_ranks)
        kept = part(EVERY).read_bytes(), part(2 * EVERY).read_bytes()
        cut(part(EVERY))
        flip(part(2 * EVERY))
        assert exit_code(lambda: train()) == CorruptError.exit_code == 7
        assert "none of its 2 step checkpoints verifies" in capsys.readouterr().err.splitlines()[-1]
        assert committed() == before
        part(EVERY).write_bytes(kept[0])
        part(2 * EVERY).write_bytes(kept[1])

    def damaging(step: int, damage: Callable[[Path], None], after: bool) -> Callable[..., Any]:
        original = fit.run_ranks

        def run_ranks(*args: Any) -> Any:
            if not after:
                damage(part(step))
            result = original(*args)
            if after:
                damage(part(step))
            return result

        return run_ranks

    # The main process has found it whole, and the ranks look again.
    with monkeypatch.context() as patch:
        patch.setattr(fit, "run_ranks", damaging(2 * EVERY, Path.unlink, after=False))
        assert exit_code(lambda: train()) == 7
    assert PART in capsys.readouterr().err.splitlines()[-1] and no_children()
    # So does the main process before it takes the result from the last one.
    with monkeypatch.context() as patch:
        patch.setattr(fit, "run_ranks", damaging(STEPS, flip, after=True))
        assert exit_code(lambda: train()) == 7
    assert f"step-0-{STEPS:08d}/{PART}" in capsys.readouterr().err.splitlines()[-1]
    assert committed() == before
    _, printed = train()
    assert f"code: continuing from step-0-{2 * EVERY:08d}" in printed
    passed_over = [one.getMessage() for one in caplog.records if "passed over" in one.getMessage()]
    assert [step for step in (4, 6) if any(f"step-0-{step:08d}/{PART}" in one for one in passed_over)] == [4, 6]
    assert hashes() == stopped[1] and [*Path("mlruns/work").glob("*/*")] == []
    assert committed("fruit-*") == before


def test_a_rank_that_hangs_while_parts_are_written_ends_all(
    stopped: tuple[Path, list[str]], lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Block.forward

    def hanging(which: int) -> Callable[..., Any]:
        original = checkpoint.write_hashed

        def write_hashed(tensors: dict[str, Tensor], path: Path) -> Any:
            entry = original(tensors, path)
            if rank() == which:
                os.truncate(path, path.stat().st_size // 2)
                stop()
            return entry

        return write_hashed

    def no_answer(which: int) -> str:
        return rf"^training process {which} of 2 did not answer the others within 2 s; nothing was committed"

    def ends(told: str, *overrides: str) -> None:
        with pytest.raises(TryAgainError, match=told):
            train("tiny.yaml", *overrides)
        assert no_children() and not [*Path("mlruns/stages").glob("code-*")]
        assert [path.name for path in checkpoint.checkpoints(next(Path("mlruns/work").iterdir()))] == [
            f"step-0-{step:08d}" for step in (EVERY, 2 * EVERY)
        ]

    with monkeypatch.context() as patch:
        patch.setattr(supervise, "TIMEOUT_SECONDS", 2.0)
        patch.setattr(supervise, "GRACE_SECONDS", 0.2)
        # In the first step that it takes: the checkpoint is not to blame. The other has gathered weights, and waits for
        # those of the next block.
        with monkeypatch.context() as inner:
            inner.setattr(Block, "forward", lambda self, *args: (rank() == 1 and stop()) or forward(self, *args))
            ends(no_answer(1))
        for which in (1, 0):
            with monkeypatch.context() as inner:
                inner.setattr(checkpoint, "write_hashed", hanging(which))
                # In a step the others wait for its messages, after the last one for its file, too.
                ends(no_answer(which), f"checkpoint.every_steps={2 * EVERY + 1}")
                unwritten = rf"^{PART}, a part of a step checkpoint, was not written within 2 s; nothing was committed"
                ends(no_answer(0) if which == 0 else f"{unwritten}|{no_answer(1)}")
    _, printed = train()
    assert f"code: continuing from step-0-{2 * EVERY:08d}" in printed and hashes() == stopped[1]
    assert [*Path("mlruns/work").glob("*/*")] == []
