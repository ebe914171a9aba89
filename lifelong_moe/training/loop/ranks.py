"""Ranks: processes on this machine that take training steps together, supervised by the main process.

A rank is forked for one phase and has a pipe to the main process, which keeps everything but training steps: locks,
tracking, evaluation and commits.
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
from lifelong_moe.training.callbacks.points import Row, Send

TIMEOUT_SECONDS = 300.0
"""Time that a rank waits for the others; rank 0 writes checkpoints and waits for MLflow within it."""
GRACE_SECONDS = 5.0
"""Time for the other ranks to report their errors after one has failed, before they are killed."""
POLL_SECONDS = 0.1
"""Between two checks for dead ranks and a request to stop."""
# Gloo's errors are plain RuntimeErrors: only their messages tell them from a bug of ours.
PEER_LOST = ("gloo/transport/", "Application timeout caused pair closure")
"""Parts of the messages of Gloo's errors after another rank has gone."""

Work = Callable[[int, Interrupt, Send], Any]
"""The work of a rank, from its number, its interrupt and the receiver of its curves; returns plain JSON data."""


def run_ranks(number: int, work: Work, interrupt: Interrupt, send: Send, meeting: Path) -> Any:
    """Run work in several ranks, and return the result of rank 0.

    Args:
        number: Of ranks.
        work: Of each rank.
        interrupt: Of the main process; a request to stop is passed on.
        send: Receives rank 0's curves in this process, while the rank waits.
        meeting: File through which the ranks find each other.

    Raises:
        LifelongError: What a rank raised, with the same message.
        TryAgainError: If a rank died or did not answer.
        RuntimeError: After a bug in a rank; with its traceback.
    """
    # A file that a killed main process left would make the new ranks meet the dead ones.
    meeting.unlink(missing_ok=True)
    ranks: list[_Rank] = []
    try:
        for rank in range(number):
            ranks.append(_Rank(rank, number, work, meeting))
        _supervise(ranks, interrupt, send)
    finally:
        # Also after Ctrl-C: no rank outlives this call.
        for one in ranks:
            one.end()
        meeting.unlink(missing_ok=True)
    return _result(ranks)


class _Rank:
    """A rank as the main process sees it."""

    def __init__(self, rank: int, number: int, work: Work, meeting: Path) -> None:
        self.rank, self.number = rank, number
        self.outcome: dict[str, Any] = {}
        """Empty until it arrives: ``result``, or ``error`` with its ``message``, ``lost`` (a peer) or ``bug``."""
        self.killed = False
        self.pipe, theirs = get_context("fork").Pipe()
        arguments = (rank, number, work, meeting, theirs, os.getpid())
        self.process = get_context("fork").Process(target=_run_rank, args=arguments)
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
        """Whether it has failed."""
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
        """Kill it if it lives, also if it is stopped or stuck."""
        if self.process.is_alive():
            self.killed = True
            self.process.kill()
        self.process.join()
        self.pipe.close()


def _supervise(ranks: list[_Rank], interrupt: Interrupt, send: Send) -> None:
    """Relay messages and a request to stop until all ranks ended, one died, or one failed and time is up."""
    asked, failed_at = False, None
    while any(rank.code is None or not rank.pipe.closed for rank in ranks):
        for pipe in wait([rank.pipe for rank in ranks if not rank.pipe.closed], POLL_SECONDS):
            next(rank for rank in ranks if rank.pipe is pipe).listen(send)
        # Once: all ranks agree at their next step boundary, where any one request is enough. After Ctrl-C it is SIGTERM
        # too: they need not know which, and the main process tells it.
        if interrupt.requested and not asked:
            asked = True
            for rank in ranks:
                if rank.code is None:
                    os.kill(rank.process.ident or 0, signal.SIGTERM)
        # Killed by a signal: the others would wait for it until the timeout.
        if any((rank.code or 0) < 0 for rank in ranks):
            return
        if failed_at is None and any(rank.failed for rank in ranks):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE_SECONDS:
            return


def _result(ranks: list[_Rank]) -> Any:
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


def _run_rank(rank: int, number: int, work: Work, meeting: Path, pipe: Connection, parent: int) -> None:
    """Run a forked process as a rank: prepare, connect, work, and report the outcome."""
    _prepare(rank, parent)
    try:
        store = dist.FileStore(str(meeting), number)  # type: ignore[attr-defined]
        limit = timedelta(seconds=TIMEOUT_SECONDS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=number, timeout=limit)
        outcome = {"result": work(rank, PendingInterrupt(), lambda rows: _send_rows(pipe, rows))}
        dist.destroy_process_group()
    except LifelongError as error:
        outcome = {"error": type(error).__name__, "message": str(error)}
    except BaseException as error:
        lost = isinstance(error, dist.DistError) or any(words in str(error) for words in PEER_LOST)
        outcome = {"lost": str(error)} if lost else {"bug": traceback.format_exc()}
    pipe.send_bytes(json.dumps(outcome).encode())


def _send_rows(pipe: Connection, rows: list[Row]) -> None:
    """Hand curves to the main process, and wait until it has sent them."""
    pipe.send_bytes(json.dumps({"rows": rows}).encode())
    # A checkpoint comes next, and a run that continues from it does not log these points again.
    pipe.recv_bytes()


def _prepare(rank: int, parent: int) -> None:
    """Turn a forked process into a rank."""
    # No rank trains on for a main process that is gone; it may be gone before this line.
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process too, which asks the ranks to stop
    # Threads do not survive a fork: the first use of a pool that the main process had started would hang.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["LOCAL_RANK"] = str(rank)  # so that Lightning takes this process for one that it started
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if rank > 0:
        logging.disable(logging.WARNING)  # rank 0 says the same
