"""Ranks that a command starts: few tests, since each start imports torch and Lightning twice. The others fork."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lifelong_moe.errors import TryAgainError
from lifelong_moe.training.loop import fit
from lifelong_moe.training.ranks import supervise
from tests.forked import ForkedProcess
from tests.tiny import fork, hashes, tiny_config, train, write_config


def configure(*acts: dict[str, Any], stages: tuple[str, ...] = ("fruit",)) -> str:
    """Write a configuration of two processes, in which ranks act."""
    named = [{"class_path": "tests.acts.Act", "init_args": act} for act in acts]
    config = tiny_config(stages, trainer={"devices": 2, "callbacks": named}, routing={"jitter": 0.1})
    config["evaluate"]["watch"] = 0.5
    config["stage_defaults"]["distill"] = {"weight": 1.0, "text": "new", "fraction": 0.5}
    return write_config(config)


def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork ranks that use the main process's own objects: no file, no start."""
    kept: list[Any] = []

    def keep(folder: Path, *phase: Any) -> None:
        folder.mkdir()
        kept[:] = phase

    monkeypatch.setattr(fit, "hand_over", keep)
    monkeypatch.setattr(fit, "take_over", lambda folder: tuple(kept))
    monkeypatch.setattr(supervise, "Popen", ForkedProcess)


def gone(pid: int) -> bool:
    """Whether a process is no more, or a zombie that nobody has buried yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def comes(what: Callable[[], bool]) -> bool:
    """Whether something becomes true within some seconds."""
    until = time.monotonic() + 10
    while not what() and time.monotonic() < until:
        time.sleep(0.02)
    return what()


def test_a_phase_handed_over_ends_in_the_bits_of_one_in_memory(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        in_memory(patch)
        train(configure(stages=("fruit", "code")))
    expected = hashes()
    for kept in (*Path("mlruns/stages").glob("code-*"), Path("mlruns/runs/tiny")):
        shutil.rmtree(kept)
    capfd.readouterr()
    # What Lightning tells developers comes by the pipe, and this process decides who hears it.
    caplog.set_level(logging.ERROR, "lightning.pytorch")
    train(configure({"what": "note"}, stages=("fruit", "code")))
    assert "GPU available" not in capfd.readouterr().err
    noted = json.loads(Path("noted-1.json").read_text())
    assert noted["threads"] == 1 and noted["pid"] != os.getpid() and gone(noted["pid"])
    assert not {"mlflow", "datasets", "faiss", "pipelines", "torchmetrics.functional"} & set(noted["modules"])
    assert hashes() == expected


def test_a_rank_that_dies_and_a_request_to_stop_leave_a_checkpoint(lab: Path) -> None:
    with pytest.raises(TryAgainError, match=r"^training process 1 of 2 was ended by SIGKILL; .*continue"):
        train(configure({"what": "kill"}))
    child = fork(lambda: train(configure({"what": "ask"})))
    assert child.wait() == TryAgainError.exit_code, child.output
    assert child.output.splitlines()[-1].startswith("TryAgainError: stopped after step 6, which is checkpointed")
    assert [path.name for path in Path("mlruns/work").glob("*/step-*")].count("step-0-00000006") == 1
    assert list(Path("mlruns/work").glob("*/ranks")) == [] == list(Path("mlruns/stages").glob("*"))


def test_ranks_end_with_the_main_process(lab: Path) -> None:
    child = fork(lambda: train(configure({"what": "end", "rank": 0})))
    assert child.wait() == -signal.SIGKILL, child.output
    pid = json.loads(Path("noted-0.json").read_text())["pid"]
    assert comes(lambda: gone(pid))
