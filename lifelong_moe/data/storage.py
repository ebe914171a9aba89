"""Small files that are either whole or absent: hashing, and all temporary names of this package."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

GRACE_SECONDS = 24 * 3600.0
"""A thing is young for a day."""
_CHUNK_BYTES = 1 << 20
_TMP = ".tmp-"
_DEPTH = 3
"""Folders between a root and what is written half."""


def canonical_json(value: Any) -> str:
    """Return the one JSON text of ``value``: sorted keys, no spaces, UTF-8 characters as they are."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def text_sha256(text: str) -> str:
    """Return the SHA-256 of the UTF-8 bytes of ``text``, hexadecimal."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, hexadecimal, reading one MiB at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the names within a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` so that a reader, or a crash, sees the old or the new content and no mixture.

    Args:
        path: The file; missing parent directories are made.
        data: Its whole content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary(path.parent) as folder:
        work = folder / path.name
        work.write_bytes(data)
        sync(work)
        os.replace(work, path)
    sync(path.parent)
