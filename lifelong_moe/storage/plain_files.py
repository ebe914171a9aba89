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


def require_plain_files(root: Path) -> None:
    """Require that nothing but directories and regular files is below a directory, which may itself be a link to one.

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
        # Not there yet; or the folder of another process that is done with it.
        except FileNotFoundError:
            continue


def _refused(entry: os.DirEntry[str]) -> str:
    kind = "a symbolic link" if entry.is_symlink() else kind_of(entry.stat(follow_symlinks=False).st_mode)
    hint = " Put what it leads to in its place." if entry.is_symlink() else ""
    return f"{entry.path}: {kind}; a store holds directories and regular files only.{hint}"


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
