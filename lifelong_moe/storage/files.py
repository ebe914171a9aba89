"""Write files that are either whole or absent, and files that grow by whole lines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lifelong_moe.storage.modes import SHARED, make_folder
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


def append_line(path: Path, line: str) -> None:
    """Append a line to a file; it is on disk when this returns. A missing file is created with its parents.

    Raises:
        OSError: If the disk is full or cannot be written.
    """
    make_folder(path.parent)
    is_new = not path.exists()
    data = f"{line}\n".encode()
    # Nobody may have put a link here, which would lead the line into another file.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    with open(os.open(path, flags, SHARED), "ab+") as file:
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            # A process that was killed here left half a line; keep it from damaging this one.
            data = b"\n" + data
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync(path.parent)
