"""Make temporary folders for half-written files, remove those that killed processes left, and make unnamed files."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lifelong_moe.storage.modes import SHARED, folder_mode, make_folder

GRACE_SECONDS = 24 * 3600.0
"""Grace period: nothing younger than a day is collected."""
_TMP = ".tmp-"
# After a token and a machine, as earlier versions named them: for a process, a host's process, a spool's and MLflow's.
_NAME = re.compile(
    rf"{re.escape(_TMP)}(?:[0-9a-f]{{16}}(?:@.+)?|\d+-[0-9a-f]{{16}}|[^@]+-\d+-[0-9a-f]{{8}}|"
    r"\d+-(?:address|[0-9a-f]{64})|mlflow\.db)"
)
# As deep as any folder that we write to, such as `spool/<key>/files`; what lies deeper is not ours.
_DEPTH = 3
"""Most folders between a root and a temporary folder."""


@contextmanager
def temporary(parent: Path, mode: int = SHARED) -> Iterator[Path]:
    """Make a directory to write in; the caller moves its content elsewhere, or renames the directory itself.

    If it still exists on leaving, it is removed. A kill leaves it behind for :func:`remove_temporary`, which tells by a
    lock whether the writer lives: the system releases the lock with the process. Only a locked directory is named after
    this machine; where a file system has no locks, age must decide.

    Args:
        parent: Final folder of the content.
        mode: Widest permissions of files in it; the directory may be entered by those who may read them.
    """
    # Not `tempfile`, whose folders only their owner may read; ours may be shared within a group.
    path = parent / f"{_TMP}{secrets.token_hex(8)}"
    path.mkdir(mode=folder_mode(mode))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            # flock, since POSIX locks need a descriptor open for writing, which directories do not have.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path = path.replace(path.with_name(path.name + _machine()))
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def unnamed_file(folder: Path) -> IO[bytes] | None:
    """A file to write and read in that goes when it is closed, or with the process; None where none may be written."""
    try:
        make_folder(folder)
        return tempfile.TemporaryFile(dir=folder)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return None


def remove_temporary(root: Path) -> int:
    """Remove the half-written folders of killed processes, up to three folders down; return their number.

    Those locked on this machine go as soon as the lock is free. The rest, of other machines and of earlier versions, go
    once nothing in them has changed for a day.
    """
    return sum(_remove_abandoned(path) for path in _temporary(root))


def find_temporary(root: Path) -> list[Path]:
    """What :func:`remove_temporary` would remove."""
    return sorted(path for path in _temporary(root) if _is_abandoned(path))


def _temporary(root: Path) -> Iterator[Path]:
    patterns = ["*/" * depth + _TMP + "*" for depth in range(_DEPTH + 1)]
    return (path for pattern in patterns for path in root.glob(pattern) if _NAME.fullmatch(path.name))


def remove_dead(folder: Path) -> int:
    """Remove the half-written folders that killed processes of this machine left in a folder of the user's.

    Only what has the whole name of ours, directly in the folder; returns their number.
    """
    ours = re.compile(rf"{re.escape(_TMP)}[0-9a-f]{{16}}{re.escape(_machine())}")
    return sum(_remove_abandoned(path) for path in folder.glob(f"{_TMP}*") if ours.fullmatch(path.name))


def _machine() -> str:
    """Name the running kernel, within which every process sees the locks. Containers of one machine share it, while a
    host name changes with the pod, and two machines may have the same one."""
    with suppress(OSError):
        return f"@{Path('/proc/sys/kernel/random/boot_id').read_text()[:8]}"
    return f"@{socket.gethostname()}"


def _is_abandoned(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:  # gone by now, or another user's
        return False
    try:
        return not _may_be_written(path, descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(path: Path) -> bool:
    try:
        # Non-blocking, since opening a FIFO of such a name would wait for a writer.
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
        # A free lock proves a dead writer on this machine only: another one's locks may be invisible here.
        if path.name.endswith(_machine()):
            return False
    except BlockingIOError:
        return True
    except OSError:  # no locks here
        pass
    return not _is_old(path)


def _is_old(path: Path) -> bool:
    """Whether nothing in it has changed for a day, by the clock of its file system, which may differ from ours."""
    try:
        # Of the parent alone: an entry that each nightly check touched would never be a day old.
        os.utime(path.parent)
        now, entries = path.parent.stat().st_mtime, [path, *path.rglob("*")]
        changed = max(entry.lstat().st_mtime for entry in entries)
        # Dated by a clock that was ahead: its day begins now, or it would stay until that date.
        if changed > now + GRACE_SECONDS:
            for entry in entries:
                os.utime(entry, follow_symlinks=False)
    except OSError:  # it is changing, or another user's
        return False
    return now - changed > GRACE_SECONDS
