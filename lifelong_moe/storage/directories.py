"""Write and remove directories that exist whole or not at all, whatever kills the process.

Several processes may fill one: the one that commits it waits for the files of the others (:func:`write_file_for`,
:func:`await_file`). They share its file system and nothing else.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from lifelong_moe.errors import ResourceError, TryAgainError, disk_is_full
from lifelong_moe.storage.files import rename, sync
from lifelong_moe.storage.keys import canonical_json, file_sha256
from lifelong_moe.storage.modes import SHARED, folder_mode, make_folder
from lifelong_moe.storage.plain import from_plain
from lifelong_moe.storage.stored import read_stored
from lifelong_moe.storage.temporary import temporary
from lifelong_moe.storage.verified import MANIFEST, Entry

POLL_SECONDS = 0.02
"""Between two looks for a file of another process."""


@contextmanager
def new_directory(target: Path, mode: int = SHARED) -> Iterator[Path]:
    """Yield a folder to fill with files and folders of files; on leaving it becomes ``target``.

    Everything is flushed to disk before the rename, and then the rename itself. If ``target`` exists by then, another
    process was first with the same content address, and its version stays.

    Args:
        target: Directory to create, with its parents.
        mode: Permissions of its files, less those that the umask takes away.
    """
    make_folder(target.parent)
    with temporary(target.parent, mode) as work:
        yield work
        # The folder's permissions are those that the umask has left.
        mode &= work.stat().st_mode
        for path in sorted(work.rglob("*"), reverse=True):
            # safetensors makes its files readable by their owner alone, and others follow the umask alone.
            path.chmod(folder_mode(mode) if path.is_dir() else mode)
            # Contents before the rename: after a power failure the final name must not lead to empty files.
            sync(path)
        sync(work)
        _publish(work, target)


def _publish(work: Path, target: Path) -> None:
    try:
        rename(work, target)
    except OSError as error:
        # File systems differ in which of the two a rename onto a filled directory raises.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def write_directory(
    target: Path, files: Mapping[str, Callable[[Path], object]], sign: Callable[[Path], object] | None = None
) -> None:
    """Write files and a manifest of their hashes into a :func:`new_directory`.

    Args:
        target: Directory to create, with its parents.
        files: By file name, a function that writes the file to a given path. One that hashes what it writes returns
            the :class:`Entry`; other files are read again for it.
        sign: Called with the complete directory before it gets its name, so that none is ever there unsigned.

    Raises:
        ResourceError: If the disk is full; ``target`` is then untouched.
    """
    with _explained_full_disk(target), new_directory(target) as work:
        entries = {name: asdict(_entry(work / name, write(work / name))) for name, write in files.items()}
        (work / MANIFEST).write_text(canonical_json({"files": entries}), encoding="utf-8")
        # What another process has committed meanwhile stays, and so does its signature.
        if sign is not None and not target.exists():
            sign(work)


def write_file_for(path: Path, write: Callable[[Path], Entry]) -> None:
    """Write a file into a directory that another process commits, which waits for it (:func:`await_file`).

    Does nothing if that process has given up: it says why.

    Raises:
        ResourceError: If the disk is full.
    """
    unread = path.with_name(f"{path.name}.unread")
    with _explained_full_disk(path), suppress(FileNotFoundError):
        entry = write(path)
        sync(path)
        # The note on the file comes last, and whole.
        unread.write_text(canonical_json(asdict(entry)), encoding="utf-8")
        os.rename(unread, _note(path))


def await_file(path: Path, limit: float) -> Entry:
    """Wait for a file of another process (:func:`write_file_for`).

    Args:
        path: In a directory that this process commits.
        limit: Seconds after which the other one is given up if its file does not grow.

    Raises:
        TryAgainError: If it is given up.
    """
    seen, since = -1, time.monotonic()
    while True:
        size = path.stat().st_size if path.exists() else -1
        with suppress(FileNotFoundError):
            entry = read_stored(_note(path), partial(from_plain, Entry))
            # On a network's file system the note may be visible before all of the file.
            if size == entry.bytes:
                _note(path).unlink()
                return entry
        if size != seen:
            seen, since = size, time.monotonic()
        if time.monotonic() - since > limit:
            raise TryAgainError(
                f"{path.name}, a part of a step checkpoint, was not written within {limit:.0f} s; nothing was "
                f"committed; run the same command again to continue from the newest checkpoint."
            )
        time.sleep(POLL_SECONDS)


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


@contextmanager
def _explained_full_disk(target: Path) -> Iterator[None]:
    try:
        yield
    # safetensors reports a full disk as an error of its own, without an error number.
    except (OSError, SafetensorError) as error:
        if disk_is_full(error):
            raise ResourceError(f"{target}: no space left on the disk; nothing committed was touched.") from error
        raise


def _entry(path: Path, written: object) -> Entry:
    return written if isinstance(written, Entry) else Entry(path.stat().st_size, file_sha256(path))


def remove_directory(path: Path) -> None:
    """Remove a directory such that it exists whole or not at all: it is renamed first, and if the process is killed,
    the rest is cleaned up like any half-written directory."""
    with temporary(path.parent) as work:
        rename(path, work / path.name)
        # `rename` flushes the new name's folder. The old name must be gone for good before the first file is.
        sync(path.parent)
