"""A rank: a process that takes training steps together with others.

:mod:`lifelong_moe.training.ranks.supervise` starts it as torchrun starts a worker: by a command, with ``RANK``,
``LOCAL_RANK`` and ``WORLD_SIZE`` in its environment. It inherits nothing else of the main process but a pipe, so that
it can use a device that the main process has used.
"""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

from lifelong_moe.errors import LifelongError
from lifelong_moe.training.callbacks.interrupt import PendingInterrupt
from lifelong_moe.training.callbacks.late import importing_lightning
from lifelong_moe.training.callbacks.lost import peer_is_lost
from lifelong_moe.training.callbacks.points import Row
from lifelong_moe.training.ranks.surroundings import Surroundings

MEETING = "meeting"
"""File in the folder of the work through which the ranks find each other."""

Work = Callable[[int, Path, Surroundings], Any]
"""The work of a rank, from its number, the folder with all that it needs, and its surroundings; returns JSON data."""


@dataclass(frozen=True)
class Orders:
    """What a rank is told when it is started."""

    entry: str
    """Its :data:`Work`, as ``module:function``."""
    folder: str
    pipe: int
    """Descriptor of its end of the pipe."""
    parent: int
    """The main process."""
    timeout: float
    """Seconds that it waits for the other ranks."""
    width: int
    """Columns of the main process's console."""
    is_terminal: bool
    meeting: Sequence[Any] | None = None
    """Host, port and prefix of the store where the ranks of several machines meet; on one it is a file."""


def run_rank(orders: Orders) -> None:
    """Be a rank: prepare, connect, work, and report the outcome."""
    rank, number, pipe = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), _Pipe(orders.pipe)
    _prepare(rank, orders.parent, pipe)
    folder = Path(orders.folder)
    try:
        limit = timedelta(seconds=orders.timeout)
        store = _meeting(orders.meeting, folder, number, limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=number, timeout=limit)
        outcome = {"result": _work(orders.entry)(rank, folder, _surroundings(orders, pipe))}
        dist.destroy_process_group()
    except LifelongError as error:
        outcome = {"error": type(error).__name__, "message": str(error)}
    except BaseException as error:
        outcome = {"lost": str(error)} if peer_is_lost(error) else {"bug": traceback.format_exc()}
    pipe.tell(outcome)


def _meeting(meeting: Sequence[Any] | None, folder: Path, number: int, limit: timedelta) -> Store:
    """Where the ranks find each other."""
    if meeting is None:
        return FileStore(str(folder / MEETING), number)
    host, port, prefix = meeting
    return PrefixStore(prefix, TCPStore(host, port, is_master=False, timeout=limit))


def _work(entry: str) -> Work:
    module, _, name = entry.partition(":")
    with importing_lightning():
        work: Work = getattr(import_module(module), name)
        # Its import sets up handlers of its own, which would write past the main process.
        import_module("lightning.pytorch")
    for known in ("lightning", "lightning.pytorch", "lightning.fabric"):
        log = logging.getLogger(known)
        log.handlers, log.propagate = [], True
    return work


class _Pipe:
    """The rank's end of its pipe to the main process; messages are JSON."""

    def __init__(self, descriptor: int) -> None:
        self._connection = Connection(descriptor)
        self._lock = threading.Lock()

    def tell(self, message: Mapping[str, object]) -> None:
        """Send a message, from any thread."""
        with self._lock:
            self._connection.send_bytes(json.dumps(message).encode())

    def send_rows(self, rows: list[Row]) -> None:
        """Hand curves to the main process, and wait until it has sent them."""
        self.tell({"rows": rows})
        # A checkpoint comes next, and a run that continues from it does not log these points again.
        self._connection.recv_bytes()


class _Told(io.TextIOBase):
    """A file whose text the main process writes on its console."""

    def __init__(self, pipe: _Pipe) -> None:
        self._pipe = pipe

    def write(self, text: str, /) -> int:
        """Hand it over."""
        self._pipe.tell({"text": text})
        return len(text)


class _Relay(logging.Handler):
    """Hands records to the main process, which knows where they go."""

    def __init__(self, pipe: _Pipe) -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        """Hand over name, level and message."""
        self._pipe.tell({"log": [record.name, record.levelno, self.format(record)]})


def _surroundings(orders: Orders, pipe: _Pipe) -> Surroundings:
    """As the main process's, at the other end of the pipe."""
    console = Console(
        file=_Told(pipe),  # type: ignore[arg-type]
        width=orders.width,
        force_terminal=orders.is_terminal,
        highlight=False,
        markup=False,
        emoji=False,
    )
    return Surroundings(PendingInterrupt(), pipe.send_rows, console)


def _prepare(rank: int, parent: int, pipe: _Pipe) -> None:
    """Turn a process that was just started into a rank."""
    # No rank trains on for a main process that is gone; it may be gone before this line.
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the main process too, which asks the ranks to stop
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    torch.set_num_threads(1)
    logging.getLogger().handlers = [_Relay(pipe)]
    if rank > 0:
        logging.disable(logging.WARNING)  # rank 0 says the same
        warnings.showwarning = lambda *_, **__: None
        return

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        pipe.tell({"warning": [str(message), category.__name__, filename, lineno]})

    warnings.showwarning = show
