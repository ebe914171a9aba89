"""Write and remove directories that exist whole or not at all, whatever kills the process."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError

from lifelong_moe.errors import ResourceError, disk_is_full
from lifelong_moe.storage.files import rename, sync
from lifelong_moe.storage.keys import canonical_json, file_sha256
from lifelong_moe.storage.modes import SHARED, folder_mode, make_folder
from lifelong_moe.storage.temporary import temporary
from lifelong_moe.storage.verified import MANIFEST, Entry


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
    try:
        with new_directory(target) as work:
            entries = {name: asdict(_entry(work / name, write(work / name))) for name, write in files.items()}
            (work / MANIFEST).write_text(canonical_json({"files": entries}), encoding="utf-8")
            # What another process has committed meanwhile stays, and so does its signature.
            if sign is not None and not target.exists():
                sign(work)
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
