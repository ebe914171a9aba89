"""All temporary folders of this package: what is written half, and what killed processes left of it."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

GRACE_SECONDS = 24 * 3600.0
"""A thing is young for a day."""
_TMP = ".tmp-"
_DEPTH = 3
"""Folders between a root and what is written half."""


@contextmanager
def temporary(parent: Path) -> Iterator[Path]:
    """A new directory, to write in and then move the content out of it, or to be renamed itself.

    If it is still there in the end, it is removed. A kill leaves it behind, for :func:`remove_temporary`, which sees
    by a lock whether the writer lives: the system releases it with the process. Only what is locked is named after
    this machine; where a file system has no locks, age must decide.

    Args:
        parent: Where the content is going to be. (``tempfile`` makes what only its owner may read; this is shared.)
    """
    path = parent / f"{_TMP}{secrets.token_hex(8)}"
    path.mkdir()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path = path.replace(path.with_name(path.name + _machine()))
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def remove_temporary(root: Path) -> int:
    """Remove what killed processes left half written, up to three folders down; returns how many entries.

    What was locked on this machine goes as soon as its lock is free. The rest, of other machines and of earlier
    versions, goes once nothing in it has changed for a day.
    """
    patterns = ["*/" * depth + _TMP + "*" for depth in range(_DEPTH + 1)]
    return sum(_remove_abandoned(path) for pattern in patterns for path in root.glob(pattern))


def _machine() -> str:
    """Name of the running kernel, within which locks are seen by all: containers of one machine share it, while a
    host's name changes with the pod and may be that of two machines."""
    with suppress(OSError):
        return f"@{Path('/proc/sys/kernel/random/boot_id').read_text()[:8]}"
    return f"@{socket.gethostname()}"


def _remove_abandoned(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:  # gone by now, or another user's
        return False
    try:
        if _may_be_written(path, descriptor):
            return False
        with suppress(OSError):  # another user's
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return not path.exists()
    finally:
        os.close(descriptor)


def _may_be_written(path: Path, descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.name.endswith(_machine()):
            return False
    except BlockingIOError:
        return True
    except OSError:  # no locks here
        pass
    return not _is_old(path)


def _is_old(path: Path) -> bool:
    """Whether nothing in it has changed for a day, by the clock of its file system, which need not be ours."""
    try:
        os.utime(path.parent)
        now, entries = path.parent.stat().st_mtime, [path, *path.rglob("*")]
        changed = max(entry.lstat().st_mtime for entry in entries)
        if changed > now + GRACE_SECONDS:  # by a clock that was ahead: its day begins now
            for entry in entries:
                os.utime(entry, follow_symlinks=False)
    except OSError:  # it is changing, or another user's
        return False
    return now - changed > GRACE_SECONDS
