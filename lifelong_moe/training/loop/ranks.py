"""Ranks: processes on this machine that take training steps together, while the main process watches over them.

A rank is forked for one phase and has a pipe to the main process. Everything that is not a training step stays with
the main process alone: locks, tracking, evaluation and commits.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

from lifelong_moe import errors
from lifelong_moe.errors import LifelongError, TryAgainError
from lifelong_moe.training.callbacks.interrupt import Interrupt, PendingInterrupt
from lifelong_moe.training.callbacks.logger import Row, Send

TIMEOUT_SECONDS = 300.0
"""Longest time that a rank waits for the others, within which rank 0 may write a checkpoint or wait for MLflow."""
GRACE_SECONDS = 5.0
"""Once a rank has failed: time for the others to say why they failed, before they are killed."""
LOOK_SECONDS = 0.1
"""Between two looks at whether a rank has died, or somebody asked us to stop."""
LOST = ("gloo/transport/", "Application timeout caused pair closure")
"""Gloo's errors are RuntimeErrors. Their messages name the file that raised them, or say that another wait failed."""

Work = Callable[[int, Interrupt, Send], Any]
"""What a rank does: its number, what tells it to stop, and where its curves go; returns plain JSON data."""


def run_ranks(number: int, work: Work, interrupt: Interrupt, send: Send, meeting: Path) -> Any:
    """Do something in several ranks; returns what rank 0 returned.

    Args:
        number: Ranks.
        work: What each does.
        interrupt: Of the main process; a request to stop is passed on.
        send: Receives in this process the curves that rank 0 sends; it waits meanwhile.
        meeting: A file of their own, through which they find each other.

    Raises:
        LifelongError: What a rank raised, with the same message.
        TryAgainError: If a rank died, or the others waited for it in vain.
        RuntimeError: If there was a bug of ours in a rank; with its traceback.
    """
    meeting.unlink(missing_ok=True)  # of a main process that was killed
    ranks: list[_Rank] = []
    try:
        for rank in range(number):
            ranks.append(_Rank(rank, number, work, meeting))
        _watch(ranks, interrupt, send)
    finally:
        for one in ranks:
            one.end()
        meeting.unlink(missing_ok=True)
    return _result(ranks)


class _Rank:
    """A rank as the main process sees it."""

    def __init__(self, rank: int, number: int, work: Work, meeting: Path) -> None:
        self.rank, self.number = rank, number
        self.outcome: dict[str, Any] = {}
        """Empty until it comes: ``result``, or ``error`` with its ``message``, ``lost`` or ``bug``."""
        self.killed = False
        self.pipe, theirs = get_context("fork").Pipe()
        arguments = (rank, number, work, meeting, theirs, os.getpid())
        self.process = get_context("fork").Process(target=_live, args=arguments)
        # In a rank SIGTERM stays pending, from the first moment on: a handler would act on one rank alone.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        self.process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    @property
    def code(self) -> int | None:
        """Exit code, or minus the signal's number; None while it lives."""
        return self.process.exitcode

    @property
    def failed(self) -> bool:
        """Whether it will not finish."""
        return bool(self.code) or bool(self.outcome and "result" not in self.outcome)

    def listen(self, send: Send) -> None:
        """Take one message."""
        try:
            message = json.loads(self.pipe.recv_bytes())
            if "rows" in message:
                send([(key, value, step) for key, value, step in message["rows"]])
                self.pipe.send_bytes(b"told")
            else:
                self.outcome = message
        except (EOFError, ConnectionError):
            self.pipe.close()

    def end(self) -> None:
        """Kill it if it lives, also if it is stopped or stuck; nothing that it holds outlives it."""
        if self.process.is_alive():
            self.killed = True
            self.process.kill()
        self.process.join()
        self.pipe.close()


def _watch(ranks: list[_Rank], interrupt: Interrupt, send: Send) -> None:
    """Until all ranks ended, or one died, or one failed and the others had their time to do so too."""
    asked, failed_at = False, None
    while any(rank.code is None or not rank.pipe.closed for rank in ranks):
        for pipe in wait([rank.pipe for rank in ranks if not rank.pipe.closed], LOOK_SECONDS):
            next(rank for rank in ranks if rank.pipe is pipe).listen(send)
        if interrupt.requested and not asked:
            asked = True
            for rank in ranks:
                if rank.code is None:
                    os.kill(rank.process.ident or 0, signal.SIGTERM)
        if any((rank.code or 0) < 0 for rank in ranks):
            return
        if failed_at is None and any(rank.failed for rank in ranks):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE_SECONDS:
            return


def _result(ranks: list[_Rank]) -> Any:
    """What rank 0 returned; or raises the cause: a death, else a bug, else an error. To be lost is what follows."""
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


def _live(rank: int, number: int, work: Work, meeting: Path, pipe: Connection, parent: int) -> None:
    """The life of a rank."""
    _prepare(rank, parent)
    try:
        store = dist.FileStore(str(meeting), number)  # type: ignore[attr-defined]
        limit = timedelta(seconds=TIMEOUT_SECONDS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=number, timeout=limit)
        outcome = {"result": work(rank, PendingInterrupt(), lambda rows: _tell(pipe, rows))}
        dist.destroy_process_group()
    except LifelongError as error:
        outcome = {"error": type(error).__name__, "message": str(error)}
    except BaseException as error:
        lost = isinstance(error, dist.DistError) or any(words in str(error) for words in LOST)
        outcome = {"lost": str(error)} if lost else {"bug": traceback.format_exc()}
    pipe.send_bytes(json.dumps(outcome).encode())


def _tell(pipe: Connection, rows: list[Row]) -> None:
    """Hand curves to the main process and wait until it has sent them: a checkpoint that follows implies them."""
    pipe.send_bytes(json.dumps({"rows": rows}).encode())
    pipe.recv_bytes()


def _prepare(rank: int, parent: int) -> None:
    """Make a forked process a rank."""
    _prctl_pr_set_pdeathsig(signal.SIGKILL)  # nobody trains on behalf of a main process that is gone
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process hears it too, and ends us
    # A pool of threads that the main process began does not survive the fork: the first use of it would never end.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["LOCAL_RANK"] = str(rank)  # tells Lightning that we are what it would have started
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if rank > 0:
        logging.disable(logging.WARNING)  # rank 0 says the same
