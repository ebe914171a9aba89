"""Files of a store, whoever made it: directories and regular files, and nothing else.

A symbolic link could name any file that this user can read, write or delete, and a FIFO makes its reader wait for ever.
:func:`require_plain_files` refuses them where a command opens a store; files are then opened without following a link
that somebody puts there later.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.opening import kind_of, open_descriptor, open_regular

# Of a directory that is opened for writing, and of a socket, the system does not show the kind.
_IRREGULAR = (errno.ELOOP, errno.EINVAL, errno.EISDIR, errno.ENXIO, errno.EFBIG)
_JOURNAL = "-journal"
_NAMES_ANOTHER = bytes.fromhex("d9d505f920a163d7")
"""Ends a SQLite journal that holds the path of a super-journal."""


def require_plain_files(root: Path) -> None:
    """Require that nothing but directories and regular files is below a directory, which may itself be a link to one.

    Nor may a database's journal name another file: whoever opens the database deletes that file.

    Raises:
        CorruptError: If there is something else; names it.
        OSError: If a directory cannot be read.
    """
    # Directory entries tell their kind, so not even a store of a hundred thousand files takes long.
    open_ = [os.fspath(root)]
    while open_:
        folder = open_.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        open_.append(entry.path)
                    elif not entry.is_file(follow_symlinks=False):
                        raise CorruptError(_refused(entry))
                    elif entry.name.lower().endswith(_JOURNAL):
                        _require_alone(Path(entry.path))
        # Not there yet; or the folder of another process that is done with it.
        except FileNotFoundError:
            continue


def _refused(entry: os.DirEntry[str]) -> str:
    kind = "a symbolic link" if entry.is_symlink() else kind_of(entry.stat(follow_symlinks=False).st_mode)
    hint = " Put what it leads to in its place." if entry.is_symlink() else ""
    return f"{entry.path}: {kind}; a store holds directories and regular files only.{hint}"


def _require_alone(journal: Path) -> None:
    """Require that a SQLite journal names no super-journal, which only transactions over several databases have.

    A killed process leaves a journal, from which SQLite restores the database. It then deletes the super-journal, which
    may be any file of this user's. A write-ahead log (``-wal``) names nothing.
    """
    try:
        with open_stored(journal) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - len(_NAMES_ANOTHER)))
            is_alone = file.read() != _NAMES_ANOTHER
    except FileNotFoundError:  # its transaction is over
        return
    if not is_alone:
        raise CorruptError(f"{journal}: opening its database would delete the file that it names; remove it.")


def open_stored(path: Path) -> BufferedReader:
    """Open a file of a store for reading.

    Raises:
        OSError: Missing or unreadable.
        CorruptError: If it is no regular file.
    """
    with corrupt_if_irregular(path):
        return open_regular(path, follow=False)


def open_to_write(path: Path) -> int:
    """Open a file of a store for reading and writing; a missing one is created. Returns the descriptor.

    Raises:
        OSError: Not ours to write.
        CorruptError: If it is no regular file.
    """
    with corrupt_if_irregular(path):
        return open_descriptor(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)


@contextmanager
def corrupt_if_irregular(path: Path) -> Iterator[None]:
    """Turn the refusal to open what is no regular file, or is too long, into a :class:`CorruptError`."""
    try:
        yield
    except OSError as error:
        if error.errno in _IRREGULAR:
            raise CorruptError(f"{path}: {error.strerror}.") from None
        raise
