"""What makes a forked process a rank, and which of several outcomes is said; the processes: tests/distributed."""

from __future__ import annotations

import logging
import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lifelong_moe.errors import ConfigError, TryAgainError
from lifelong_moe.training.loop import ranks
from lifelong_moe.training.loop.ranks import _prepare, _result


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_all_ranks_but_the_first_are_silent(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    done: list[Any] = []
    for name in ("OMP_NUM_THREADS", "LOCAL_RANK", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "before")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(ranks, "_prctl_pr_set_pdeathsig", lambda number: done.append(("death", number)))
    monkeypatch.setattr(os, "_exit", lambda code: done.append(("exit", code)))
    monkeypatch.setattr(signal, "signal", lambda *handler: done.append(handler))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: done.append(("threads", number)))
    monkeypatch.setattr(logging, "disable", lambda level: done.append(("silent", level)))
    _prepare(rank, os.getppid())
    expected: list[Any] = [("death", signal.SIGKILL), (signal.SIGINT, signal.SIG_IGN), ("threads", 1)]
    assert done == [*expected, ("silent", logging.WARNING)] if rank else done == expected
    assert (os.environ["LOCAL_RANK"], os.environ["OMP_NUM_THREADS"]) == (str(rank), "1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    done.clear()
    _prepare(0, os.getppid() + 1)  # the main process died before the kernel was asked to say so
    assert done[1] == ("exit", 1)


def ended(rank: int, outcome: dict[str, Any] | None = None, code: int = 0, killed: bool = False) -> Any:
    return SimpleNamespace(rank=rank, number=3, outcome=outcome or {}, code=code, killed=killed)


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
