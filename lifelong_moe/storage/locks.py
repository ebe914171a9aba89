"""Lock files between processes; the system releases the locks however a process ends.

These are POSIX locks: children do not inherit them, so data workers that outlive a killed run hold none. Who may only
read a lock file could hold a shared lock for ever, so it is readable for those alone who may write it.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lifelong_moe.errors import CorruptError, LockedError
from lifelong_moe.storage.modes import make_folder
from lifelong_moe.storage.plain_files import open_to_write

LOOK_SECONDS = 0.01
"""Pause between two attempts at a lock that another process holds."""
WAIT_SECONDS = 300.0
"""Longest wait for a lock that is held for moments only."""
_MOST_DIGITS = 20
_FLOCK = "hhqqi0q"
"""Linux's ``struct flock``: type, whence, start, length, process."""


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold an advisory lock, or fail at once. It prevents duplicate work; correctness never depends on it.

    Args:
        path: Lock file; created with its parents if missing, never removed.
        what: Name of the locked thing, for the message.

    Raises:
        LockedError: If another process holds it.
        CorruptError: If the path leads to something else than a lock file.
    """
    with _lock_file(path) as descriptor:
        if not _acquire(descriptor, path):
            holder = _holder(descriptor)
            raise LockedError(f"{what} is being worked on by process {holder}; try again later.")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield


@contextmanager
def locked_when_free(path: Path, deadline: float | None = None) -> Iterator[None]:
    """Hold an advisory lock, once the process that holds it releases it.

    Args:
        path: Lock file; created with its parents if missing, never removed.
        deadline: When to stop waiting, by ``time.monotonic()``; by default after ``WAIT_SECONDS``.

    Raises:
        TimeoutError: If another process still holds it at the deadline; names the process.
        CorruptError: If the path leads to something else than a lock file.
    """
    # A holder that hangs, or does not mean to let go, must not stop us for ever.
    deadline = min(time.monotonic() + WAIT_SECONDS, deadline or float("inf"))
    with _lock_file(path) as descriptor:
        while not _acquire(descriptor, path):
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {_holder(descriptor)} holds {path}")
            time.sleep(LOOK_SECONDS)
        yield


@contextmanager
def _lock_file(path: Path) -> Iterator[int]:
    make_folder(path.parent)
    descriptor = open_to_write(path)
    try:
        # What else it holds would be lost when a process writes its number there.
        if (found := os.pread(descriptor, _MOST_DIGITS + 1, 0)) and not (
            found.isdigit() and len(found) <= _MOST_DIGITS
        ):
            raise CorruptError(f"{path}: not a lock file; it holds something else than a process's number.")
        status = os.fstat(descriptor)
        writes = stat.S_IMODE(status.st_mode) & 0o222
        # A read permission is the bit above the write permission. Another user's file is theirs to mend.
        if stat.S_IMODE(status.st_mode) != writes | writes << 1 and status.st_uid == os.geteuid():
            os.fchmod(descriptor, writes | writes << 1)
        yield descriptor
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # POSIX allows either error for a lock that another process holds.
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        # lockf's error does not name the file.
        raise OSError(error.errno, error.strerror, str(path)) from None
    return True


def _holder(descriptor: int) -> str:
    """Number of the process that holds a lock: as the system knows it, or else as the last holder wrote it."""
    if sys.platform == "linux":
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        with suppress(OSError):
            told = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
            # Of a process on another machine or in another container there is no number.
            if told[0] != fcntl.F_UNLCK and told[-1] > 0:
                return str(told[-1])
    return os.pread(descriptor, _MOST_DIGITS, 0).decode("ascii", "replace").strip() or "unknown"
