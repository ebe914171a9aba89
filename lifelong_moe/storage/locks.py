"""Lock files between processes; the system releases the locks however a process ends.

These are POSIX locks: children do not inherit them, so data workers that outlive a killed run hold none.
"""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lifelong_moe.errors import LockedError

LOOK_SECONDS = 0.01
"""Pause between two attempts at a lock that another process holds."""


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold an advisory lock, or fail at once. It prevents duplicate work; correctness never depends on it.

    Args:
        path: Lock file; created with its parents if missing, never removed.
        what: Name of the locked thing, for the message.

    Raises:
        LockedError: If another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Append mode, which keeps the holder's process id until the lock is ours.
    with path.open("a+") as file:
        if not _acquire(file):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise LockedError(f"{what} is being worked on by process {holder}; try again later.")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def locked_when_free(path: Path, deadline: float = math.inf) -> Iterator[None]:
    """Hold an advisory lock, once the process that holds it releases it.

    Args:
        path: Lock file; created with its parents if missing, never removed.
        deadline: When to stop waiting, by ``time.monotonic()``.

    Raises:
        TimeoutError: If another process still holds it at the deadline.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        while not _acquire(file):
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process holds {path}")
            time.sleep(LOOK_SECONDS)
        yield


def _acquire(file: IO[str]) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # POSIX allows either error for a lock that another process holds.
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        # lockf's error does not name the file.
        raise OSError(error.errno, error.strerror, file.name) from None
    return True
