"""What makes a process a rank, and which of several outcomes is said; the processes: tests/distributed."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from lifelong_moe.errors import ConfigError, TryAgainError
from lifelong_moe.training.callbacks.interrupt import Interrupt
from lifelong_moe.training.ranks import rank
from lifelong_moe.training.ranks.supervise import _Place, _Rank, _result
from lifelong_moe.training.ranks.surroundings import Surroundings


@pytest.mark.parametrize("number", [0, 1, 2])
def test_all_ranks_but_the_first_are_silent(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    done: list[Any] = []
    monkeypatch.setattr(rank, "_prctl_pr_set_pdeathsig", lambda number: done.append(("death", number)))
    monkeypatch.setattr(os, "_exit", lambda code: done.append(("exit", code)))
    monkeypatch.setattr(signal, "signal", lambda *handler: done.append(handler))
    monkeypatch.setattr(signal, "pthread_sigmask", lambda *mask: done.append(mask))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: done.append(("threads", number)))
    monkeypatch.setattr(logging, "disable", lambda level: done.append(("silent", level)))
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(warnings, "showwarning", None)
    pipe: Any = SimpleNamespace(tell=done.append)
    rank._prepare(number, os.getppid(), pipe)
    expected: list[Any] = [("death", signal.SIGKILL), (signal.SIGINT, signal.SIG_IGN)]
    expected += [(signal.SIG_UNBLOCK, {signal.SIGINT}), ("threads", 1)]
    assert done == [*expected, ("silent", logging.WARNING)] if number else done == expected
    done.clear()
    rank._prepare(0, os.getppid() + 1, pipe)  # the main process died before the kernel was asked to say so
    assert done[1] == ("exit", 1)


def test_a_rank_is_told_what_torchrun_would_tell_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", "/some/where"])
    found = _Place(rank=5, local=1, number=8, node=1).environment()
    assert {name: found[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")} == {
        "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "NODE_RANK": "1",
    }  # fmt: skip
    assert (found["PYTHONPATH"], found["OMP_NUM_THREADS"]) == (f"{os.getcwd()}{os.pathsep}/some/where", "1")
    assert found["PATH"] == os.environ["PATH"]


def test_what_a_rank_says_comes_out_here(caplog: pytest.LogCaptureFixture) -> None:
    printed, sent = io.StringIO(), list[Any]()
    here = Surroundings(Interrupt(), sent.extend, Console(file=printed))
    ours, theirs = Pipe()
    pipe = rank._Pipe(os.dup(theirs.fileno()))
    orders = rank.Orders("", "", 0, 0, 1.0, 40, False)
    there, heard = rank._surroundings(orders, pipe), SimpleNamespace(pipe=ours, outcome={})
    there.console.print("[b]a stage[/b]: step 3")
    rank._Relay(pipe).emit(logging.LogRecord("lifelong_moe.x", logging.WARNING, "", 1, "%d lost", (7,), None))
    pipe.tell({"warning": ["soon gone", "DeprecationWarning", "x.py", 3]})
    with pytest.warns(DeprecationWarning, match="soon gone"):
        while ours.poll():
            _Rank.listen(heard, here)  # type: ignore[arg-type]
    assert printed.getvalue() == "[b]a stage[/b]: step 3\n"
    assert [(one.name, one.getMessage()) for one in caplog.records] == [("lifelong_moe.x", "7 lost")]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(there.send, [("loss", 2.5, 4)])
        assert ours.poll(10)
        _Rank.listen(heard, here)  # type: ignore[arg-type]
        waiting.result()
    assert sent == [("loss", 2.5, 4)]
    pipe.tell({"result": 5})
    _Rank.listen(heard, here)  # type: ignore[arg-type]
    assert heard.outcome == {"result": 5}


def test_a_quiet_console_hears_no_words_of_a_rank() -> None:
    printed = io.StringIO()
    here = Surroundings(Interrupt(), list[Any]().extend, Console(file=printed, quiet=True))
    ours, theirs = Pipe()
    rank._Pipe(os.dup(theirs.fileno())).tell({"text": "a stage: step 3"})
    _Rank.listen(SimpleNamespace(pipe=ours), here)  # type: ignore[arg-type]
    assert printed.getvalue() == ""


def ended(number: int, outcome: dict[str, Any] | None = None, code: int = 0, killed: bool = False) -> Any:
    return SimpleNamespace(rank=number, number=3, outcome=outcome or {}, code=code, killed=killed)


RESULT, LOST = {"result": 17}, {"lost": "gloo/transport/tcp"}


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        ([ended(0, LOST, 1), ended(1, code=-9), ended(2, LOST)], TryAgainError, "process 1 of 3 was ended by SIGKILL"),
        ([ended(0, {"bug": "x"}, 1), ended(1, code=7)], TryAgainError, "process 1 of 3 ended with 7"),
        ([ended(0, LOST), ended(1, {"bug": "a traceback"}, 1)], RuntimeError, "in a training process: a traceback"),
        ([ended(0, {"bug": "b"}), ended(1, {"error": "ConfigError", "message": "m"})], RuntimeError, "process: b"),
        ([ended(0, LOST), ended(1, {"error": "ConfigError", "message": "wrong"})], ConfigError, "^wrong$"),
        ([ended(0, LOST), ended(1, code=-9, killed=True), ended(2, RESULT)], TryAgainError, "process 1 of 3 did not"),
        ([ended(0, RESULT), ended(1, LOST), ended(2, LOST)], TryAgainError, "process 1 of 3 did not answer"),
    ],
)
def test_the_cause_is_said_and_not_what_followed(found: list[Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        _result(found)


def test_what_the_first_rank_returned_is_the_result() -> None:
    assert _result([ended(0, RESULT), ended(1, {"result": None})]) == 17
