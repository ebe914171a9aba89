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
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

from lifelong_moe import errors
from lifelong_moe.errors import LifelongError, TryAgainError
from lifelong_moe.training.ranks.nodes import Nodes, await_folder
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


def run_ranks(number: int, entry: str, folder: Path, here: Surroundings, nodes: Nodes | None = None) -> Any:
    """Run work in several ranks, and return the result of the first of them.

    Args:
        number: Of ranks on this machine.
        entry: The work of each rank, ``module:function``; see :data:`lifelong_moe.training.ranks.rank.Work`.
        folder: With all that the work needs.
        here: Of the main process: a request to stop is passed on, and rank 0's curves and words come out here.
        nodes: Other machines that take part, each with as many ranks.

    Raises:
        LifelongError: What a rank raised, with the same message.
        TryAgainError: If a rank died or did not answer.
        RuntimeError: After a bug in a rank; with its traceback.
    """
    if nodes is None:
        # A file that a killed main process left would make the new ranks meet the dead ones.
        (folder / MEETING).unlink(missing_ok=True)
        return _run_here(number, entry, folder, here, None)
    nodes.begin(entry, folder)
    try:
        await_folder(folder)
        result = _run_here(number, entry, folder, here, nodes)
    except BaseException as error:
        nodes.end(error)
        # Where a rank elsewhere was the first to fail, ranks here have only lost it.
        if isinstance(error, TryAgainError) and (cause := nodes.failure(GRACE_SECONDS)) is not None:
            raise cause from None
        raise
    nodes.end(None)
    return result


def lend_ranks(nodes: Nodes, number: int, here: Surroundings) -> int:
    """Run this machine's ranks of all phases, until node 0 has ended; returns its exit code.

    Args:
        nodes: This one is not the first.
        number: Of ranks on this machine.
        here: Of this process: a request to stop is passed on.

    Raises:
        TryAgainError: If node 0 is gone, or after SIGTERM between two phases.
    """
    while "over" not in (told := nodes.wait_for_phase()):
        # Node 0 hears of the error and decides; it may be one that makes it begin the phase again.
        with suppress(LifelongError, RuntimeError), here.interrupt.until_step_boundary():
            run_ranks(number, told["entry"], Path(told["folder"]), here, nodes)
    nodes.leave()
    return int(told["over"])


def _run_here(number: int, entry: str, folder: Path, here: Surroundings, nodes: Nodes | None) -> Any:
    ranks: list[_Rank] = []
    first, world = (0, number) if nodes is None else (nodes.rank * number, nodes.number * number)
    try:
        for local in range(number):
            place = _Place(first + local, local, world, 0 if nodes is None else nodes.rank)
            ranks.append(_Rank(place, entry, folder, here, None if nodes is None else nodes.meeting))
        _supervise(ranks, here, nodes)
    finally:
        # Also after Ctrl-C: no rank outlives this call.
        for one in ranks:
            one.end()
        if here.console.is_terminal:
            here.console.show_cursor()  # a bar hides it, and a rank that was killed has not brought it back
    return _result(ranks)


@dataclass(frozen=True)
class _Place:
    """A rank's place among all."""

    rank: int
    local: int
    """Its number on its machine."""
    number: int
    """Of ranks on all machines."""
    node: int

    def environment(self) -> dict[str, str]:
        """Environment variables: this process's, and those that torchrun would set."""
        # Absolute, since "" stands for the working directory; and all of it, for a caller may have added to it.
        path = os.pathsep.join(os.path.abspath(one) for one in sys.path)
        own = {"RANK": self.rank, "LOCAL_RANK": self.local, "WORLD_SIZE": self.number, "NODE_RANK": self.node}
        told = {name: str(number) for name, number in own.items()}
        return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **told}


class _Rank:
    """A rank as the main process sees it."""

    def __init__(
        self, place: _Place, entry: str, folder: Path, here: Surroundings, meeting: Sequence[Any] | None
    ) -> None:
        self.rank, self.number = place.rank, place.number
        self.outcome: dict[str, Any] = {}
        """Empty until it arrives: ``result``, or ``error`` with its ``message``, ``lost`` (a peer) or ``bug``."""
        self.killed = False
        self.pipe, theirs = Pipe()
        console = here.console
        told = Orders(
            entry=entry,
            folder=str(folder),
            pipe=theirs.fileno(),
            parent=os.getpid(),
            timeout=TIMEOUT_SECONDS,
            width=console.width,
            is_terminal=console.is_terminal,
            meeting=meeting,
        )
        environment = place.environment()
        if meeting is None:
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this machine
        # `-P`: nothing is imported from the working directory unless this process does so, too.
        command = [sys.executable, "-P", "-m", MODULE, json.dumps(asdict(told))]
        # In a rank SIGTERM stays pending, from the first moment on: a handler would act on one rank alone. So does
        # Ctrl-C, until the rank ignores it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            self.process = Popen(command, env=environment, pass_fds=[theirs.fileno()], stdin=DEVNULL)
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
                    # A rank renders its text itself, and knows nothing of a quiet console.
                    if not here.console.quiet:
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


def _supervise(ranks: Sequence[_Rank], here: Surroundings, nodes: Nodes | None) -> None:
    """Relay messages and a request to stop until all ranks ended, one died, or one ended and time for others is up."""
    asked, failed_at, ended_at = False, None, None
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
        has_failed = any(rank.failed for rank in ranks) or (nodes is not None and nodes.failure() is not None)
        if failed_at is None and has_failed:
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE_SECONDS:
            return
        # One that hangs after its last message to the others: no rank is left that would wait for it in vain.
        if ended_at is None and any(rank.code == 0 for rank in ranks):
            ended_at = time.monotonic()
        if ended_at is not None and time.monotonic() - ended_at > TIMEOUT_SECONDS:
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
