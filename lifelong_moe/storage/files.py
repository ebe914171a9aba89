"""Write files that are either whole or absent, and files that grow by whole lines."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lifelong_moe.storage.modes import SHARED, make_folder
from lifelong_moe.storage.plain_files import open_to_write
from lifelong_moe.storage.temporary import temporary


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename a file or directory durably; a file at ``target`` is replaced."""
    os.rename(source, target)
    # Otherwise a power failure may bring the old name back.
    sync(target.parent)


@contextmanager
def new_file(path: Path, mode: int = SHARED) -> Iterator[Path]:
    """Yield a path to write to; on leaving, the file written there replaces ``path``.

    Readers see the old or the new content and never a mixture, even after a crash.

    Args:
        path: The file; missing parent directories are created.
        mode: Its permissions, less those that the umask takes away.
    """
    make_folder(path.parent)
    # In the same folder, since a rename is atomic within one file system only.
    with temporary(path.parent, mode) as folder:
        work = folder / path.name
        yield work
        # The folder's permissions are those that the umask has left.
        work.chmod(folder.stat().st_mode & mode)
        sync(work)
        rename(work, path)


def write_atomic(path: Path, content: str | bytes, mode: int = SHARED) -> None:
    """Replace the content of ``path`` by ``content``, text as UTF-8; a missing file is created with its parents.

    Its permissions are ``mode``, less those that the umask takes away.
    """
    with new_file(path, mode) as work:
        work.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def write_unsynced(path: Path, content: bytes) -> None:
    """As :func:`write_atomic`, but the disk is not waited for: what can be made again is not worth it.

    After a crash of the machine the file may hold anything, which its reader must notice.
    """
    make_folder(path.parent)
    with temporary(path.parent, SHARED) as folder:
        (folder / path.name).write_bytes(content)
        os.rename(folder / path.name, path)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file; it is on disk when this returns. A missing file is created with its parents.

    Raises:
        OSError: If the disk is full or cannot be written.
        CorruptError: If the path leads to something else than a regular file.
    """
    make_folder(path.parent)
    is_new, data = not path.exists(), f"{line}\n".encode()
    with os.fdopen(open_to_write(path), "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
            # A process that was killed here left half a line; keep it from damaging this one.
            data = b"\n" + data
        # A file of several names may be one outside the store: it stays as it is, and this name gets its own.
        if os.fstat(file.fileno()).st_nlink > 1:
            file.seek(0)
            write_atomic(path, file.read() + data)
            return
        # Set now, since others may have written: each line goes to whatever is the end then.
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_APPEND)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync(path.parent)
