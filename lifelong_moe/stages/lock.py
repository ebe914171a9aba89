"""One process at a time on one thing. Saves work; correctness never depends on it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lifelong_moe.errors import LockedError


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold an advisory lock; the system releases it however the process ends.

    The lock is POSIX's: children do not inherit it, so data workers that outlive a killed run hold nothing.

    Args:
        path: Lock file; made if absent, never removed.
        what: What is locked, for the message.

    Raises:
        LockedError: If another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise LockedError(f"{what} is being worked on by process {holder}; try again later.") from None
        except OSError as error:  # which names no file
            raise OSError(error.errno, error.strerror, str(path)) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
