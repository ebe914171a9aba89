"""What watches a command sees each misdeed, in a process of its own and in one of many commands."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests import watched
from tests.benchmarks.fuzz_store import in_one_process
from tests.hostile import Attack, carry_out


def _connects() -> int:
    with suppress(OSError), socket.socket() as one:
        one.connect(("127.0.0.1", 9))
    return 0


def _raises() -> None:
    raise RuntimeError("a bug")


MISDEEDS: dict[str, tuple[Callable[[], object], str]] = {
    "writes": (lambda: Path("../outside/new").write_text("x"), "it reached outside: open for writing"),
    "removes": (lambda: Path("../outside/file").unlink(), "it reached outside: os.remove"),
    "connects": (_connects, "it reached outside: socket.connect"),
    "starts a program": (lambda: subprocess.run(["true"]), "it reached outside: subprocess.Popen"),
    "prints a secret": (lambda: print(os.environ["CANARY"]), "it printed a secret"),
    "moves the cursor": (lambda: print("\x1b[2J"), "it printed the control character"),
    "raises": (_raises, "exit code 99: Traceback"),
    "computes for ever": (lambda: all(iter(lambda: True, False)), "it did not end"),
}


@pytest.fixture
def intact(tmp_path: Path) -> Path:
    folder = tmp_path / "intact"
    (folder / "mlruns").mkdir(parents=True)
    return folder


NOTHING = Attack("", "nothing", lambda scene: None)


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_a_misdeed_is_seen(misdeed: str, intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    act, complaint = MISDEEDS[misdeed]
    monkeypatch.setattr(watched, "CPU_SECONDS", 1)
    monkeypatch.setattr(watched, "COMMAND_LINE", act)
    _, wrong = carry_out("status", intact, tmp_path / "copy", NOTHING)
    assert wrong is not None and wrong.startswith(complaint)


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_a_misdeed_is_seen_among_others(
    misdeed: str, intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, _ = MISDEEDS[misdeed]
    monkeypatch.setattr(watched, "CPU_SECONDS", 1)
    monkeypatch.setattr(watched, "COMMAND_LINE", lambda: act() if os.path.exists("bad") else None)
    bad = Attack("", "bad", lambda scene: (scene.work / "bad").touch())
    codes = in_one_process([("status", NOTHING), ("status", bad), ("status", NOTHING)], intact, tmp_path / "copy")
    # None is repeated alone, and so is what ended the process.
    assert codes == ([0] if misdeed == "computes for ever" else [0, None, 0])
