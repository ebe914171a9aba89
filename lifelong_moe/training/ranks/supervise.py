"""Start ranks, which take training steps together, and watch over them from the main process.

A rank is a process of its own for one phase, with a pipe to the main process, which keeps everything but training
steps: locks, tracking, evaluation and commits. It is started by a command, not forked, since CUDA does not survive a
fork; and neither by ``torch.multiprocessing.spawn``, which pickles and would run the ``__main__`` script of a caller
once more in each rank, nor by torchrun's agent, which ends all ranks on SIGTERM where ours first commit a checkpoint.
"""

from __future__ import annotations

import builtins
import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

from lifelong_moe import errors
from lifelong_moe.errors import TryAgainError
from lifelong_moe.training.ranks.rank import MEETING, Orders
from lifelong_moe.training.ranks.surroundings import Surroundings

TIMEOUT_SECONDS = 300.0
"""Time that a rank waits for the others; rank 0 writes checkpoints and waits for MLflow within it."""
GRACE_SECONDS = 5.0
"""Time for the other ranks to report their errors after one has failed, before they are killed."""
POLL_SECONDS = 0.1
"""Between two checks for dead ranks and a request to stop."""
MODULE = "lifelong_moe.training.ranks"
"""Run as a command, by its ``__main__.py``."""


def run_ranks(number: int, entry: str, folder: Path, here: Surroundings) -> Any:
    """Run work in several ranks, and return the result of rank 0.

    Args:
        number: Of ranks.
        entry: The work of each rank, ``module:function``; see :data:`lifelong_moe.training.ranks.rank.Work`.
        folder: With all that the work needs.
        here: Of the main process: a request to stop is passed on, and rank 0's curves and words come out here.

    Raises:
        LifelongError: What a rank raised, with the same message.
        TryAgainError: If a rank died or did not answer.
        RuntimeError: After a bug in a rank; with its traceback.
    """
    # A file that a killed main process left would make the new ranks meet the dead ones.
    (folder / MEETING).unlink(missing_ok=True)
    ranks: list[_Rank] = []
    try:
        for rank in range(number):
            ranks.append(_Rank(rank, number, entry, folder, here))
        _supervise(ranks, here)
    finally:
        # Also after Ctrl-C: no rank outlives this call.
        for one in ranks:
            one.end()
        if here.console.is_terminal:
            here.console.show_cursor()  # a bar hides it, and a rank that was killed has not brought it back
    return _result(ranks)


class _Rank:
    """A rank as the main process sees it."""

    def __init__(self, rank: int, number: int, entry: str, folder: Path, here: Surroundings) -> None:
        self.rank, self.number = rank, number
        self.outcome: dict[str, Any] = {}
        """Empty until it arrives: ``result``, or ``error`` with its ``message``, ``lost`` (a peer) or ``bug``."""
        self.killed = False
        self.pipe, theirs = Pipe()
        console = here.console
        told = Orders(
            entry, str(folder), theirs.fileno(), os.getpid(), TIMEOUT_SECONDS, console.width, console.is_terminal
        )
        # `-P`: nothing is imported from the working directory unless this process does so, too.
        command = [sys.executable, "-P", "-m", MODULE, json.dumps(asdict(told))]
        # In a rank SIGTERM stays pending, from the first moment on: a handler would act on one rank alone. So does
        # Ctrl-C, until the rank ignores it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            self.process = Popen(command, env=_environment(rank, number), pass_fds=[theirs.fileno()], stdin=DEVNULL)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    @property
    def code(self) -> int | None:
        """Exit code, or minus the signal's number; None while it lives."""
        return self.process.poll()

    @property
    def failed(self) -> bool:
        """Whether it has failed."""
        return bool(self.code) or bool(self.outcome and "result" not in self.outcome)

    def listen(self, here: Surroundings) -> None:
        """Take one message."""
        try:
            match json.loads(self.pipe.recv_bytes()):
                case {"rows": rows}:
                    here.send([(key, value, step) for key, value, step in rows])
                    self.pipe.send_bytes(b"told")
                case {"text": text}:
                    here.console.file.write(text)
                    here.console.file.flush()
                case {"log": [name, level, text]}:
                    # Whether it is heard, this process decides, as of its own.
                    logging.getLogger(name).log(level, "%s", text)
                case {"warning": [text, category, filename, lineno]}:
                    kind = getattr(builtins, category, UserWarning)
                    warnings.warn_explicit(text, kind, filename, lineno)
                case outcome:
                    self.outcome = outcome
        except (EOFError, ConnectionError):
            self.pipe.close()

    def end(self) -> None:
        """Kill it if it lives, also if it is stopped or stuck."""
        if self.code is None:
            self.killed = True
            self.process.kill()
        self.process.wait()
        self.pipe.close()


def _environment(rank: int, number: int) -> dict[str, str]:
    """A rank's environment variables: this process's, and those that torchrun would set."""
    # Absolute, since "" stands for the working directory; and all of it, for a caller may have added to it.
    path = os.pathsep.join(os.path.abspath(one) for one in sys.path)
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
    return {"GLOO_SOCKET_IFNAME": "lo", **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **own}


def _supervise(ranks: Sequence[_Rank], here: Surroundings) -> None:
    """Relay messages and a request to stop until all ranks ended, one died, or one failed and time is up."""
    asked, failed_at = False, None
    while any(rank.code is None or not rank.pipe.closed for rank in ranks):
        for pipe in wait([rank.pipe for rank in ranks if not rank.pipe.closed], POLL_SECONDS):
            next(rank for rank in ranks if rank.pipe is pipe).listen(here)
        # Once: all ranks agree at their next step boundary, where any one request is enough. After Ctrl-C it is SIGTERM
        # too: they need not know which, and the main process tells it.
        if here.interrupt.requested and not asked:
            asked = True
            for rank in ranks:
                if rank.code is None:
                    os.kill(rank.process.pid, signal.SIGTERM)
        # Killed by a signal: the others would wait for it until the timeout.
        if any((rank.code or 0) < 0 for rank in ranks):
            return
        if failed_at is None and any(rank.failed for rank in ranks):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE_SECONDS:
            return


def _result(ranks: Sequence[_Rank]) -> Any:
    """Rank 0's result; or raise the cause of a failure."""
    # Causes before consequences: a death, a bug and an error each make the other ranks lose their peer.
    again = "nothing was committed; run the same command again to continue from the newest checkpoint."
    for rank in ranks:
        if not rank.killed and not rank.outcome and rank.code:
            how = f"was ended by {signal.Signals(-rank.code).name}" if rank.code < 0 else f"ended with {rank.code}"
            raise TryAgainError(f"training process {rank.rank} of {rank.number} {how}; {again}")
    if bug := next((rank.outcome["bug"] for rank in ranks if "bug" in rank.outcome), None):
        raise RuntimeError(f"in a training process: {bug}")
    if error := next((rank.outcome for rank in ranks if "error" in rank.outcome), None):
        raise getattr(errors, error["error"])(error["message"])
    if lost := [rank for rank in ranks if "result" not in rank.outcome]:
        silent = min(lost, key=lambda rank: bool(rank.outcome))
        raise TryAgainError(
            f"training process {silent.rank} of {silent.number} did not answer the others within "
            f"{TIMEOUT_SECONDS:.0f} s; {again}"
        )
    return ranks[0].outcome["result"]
