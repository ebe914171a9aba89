"""Ranks that are forks of the test's process: a test can patch what they do, and they need not import anything.

Only what starts them is replaced; orders, messages and ends are those of processes that a command starts
(``tests/distributed/test_started.py``).
"""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lifelong_moe.training.callbacks.interrupt import Interrupt
from lifelong_moe.training.ranks.rank import Orders, run_rank
from lifelong_moe.training.ranks.supervise import run_ranks
from lifelong_moe.training.ranks.surroundings import Surroundings

_given: list[Callable[[int], Any]] = []


class ForkedProcess:
    """In place of ``subprocess.Popen``, as far as ``supervise.py`` uses it."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], **_: Any) -> None:
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.environ.update(env)
                run_rank(Orders(**json.loads(command[-1])))
                code = 0
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        """Exit code, or minus the signal's number; None while it lives."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def kill(self) -> None:
        """Kill it."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code


def run_forked(number: int, work: Callable[[int], Any], folder: Path) -> Any:
    """Run a closure in forked ranks; the result of rank 0. Needs the fixture ``forked``."""
    _given[:] = [work]
    return run_ranks(number, f"{__name__}:given", folder, surroundings())


def given(rank: int, folder: Path, here: Surroundings) -> Any:
    """What :func:`run_forked` was given."""
    return _given[0](rank)


def surroundings() -> Surroundings:
    """Of a process that nobody interrupts, and whose words nobody reads."""
    return Surroundings(Interrupt(), lambda rows: None, Console(file=io.StringIO()))
