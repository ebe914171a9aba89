"""Open files that somebody else may have made: regular files only, without waiting, and no larger than is expected."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from lifelong_moe.storage.modes import SHARED, as_private_as

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISLNK, "a symbolic link"),
)


def open_regular(path: Path, *, follow: bool, folder: int | None = None) -> BufferedReader:
    """Open a regular file for reading.

    Args:
        path: The file.
        follow: Whether ``path`` itself may be a symbolic link, as files that the user names may be. Files of a store
            and of an inbox may not: a link could name any file that this user can read.
        folder: Descriptor of the folder that ``path`` is relative to; None for the current one.

    Raises:
        OSError: Missing, unreadable, a link that is not followed, or not a regular file; ``strerror`` says which.
    """
    flags = os.O_RDONLY | (0 if follow else os.O_NOFOLLOW)
    return os.fdopen(open_descriptor(path, flags, folder), "rb")


def open_descriptor(path: Path, flags: int, folder: int | None = None) -> int:
    """Open a regular file with flags of :func:`os.open`; other arguments and errors as for :func:`open_regular`."""
    try:
        # Without waiting: opening a FIFO would otherwise last until somebody writes to it.
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, SHARED, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ELOOP and flags & os.O_NOFOLLOW:
            raise _link(path) from None
        raise
    # The descriptor is examined, not the name, behind which another file may stand by now.
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{kind_of(mode)}, not a regular file", str(path))
    return descriptor


def open_below(folder: int, path: Path) -> BufferedReader:
    """Open a regular file below an open folder; neither it nor a folder on the way may be a symbolic link.

    Args:
        folder: Descriptor of the folder.
        path: Relative to it, without "..".

    Raises:
        OSError: As :func:`open_regular`.
    """
    *folders, name = path.parts
    # Each folder is opened in the one before, so that nobody can exchange one for a link between check and use.
    inner = os.dup(folder)
    try:
        for part in folders:
            outer = inner
            try:
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=outer)
            except OSError as error:
                # Linux says of a link that it is no directory.
                if error.errno in (errno.ELOOP, errno.ENOTDIR) and _is_link(part, outer):
                    raise _link(path) from None
                raise
            os.close(outer)
        return open_regular(Path(name), follow=False, folder=inner)
    finally:
        os.close(inner)


def _is_link(name: str, folder: int) -> bool:
    return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)


def _link(path: Path) -> OSError:
    return OSError(errno.ELOOP, "a symbolic link, which is not followed here", str(path))


def read_bounded(path: Path, most_bytes: int, *, follow: bool) -> bytes:
    """Read a whole regular file of at most ``most_bytes``; see :func:`open_regular`.

    Raises:
        OSError: As :func:`open_regular`, or the file is longer.
    """
    with open_regular(path, follow=follow) as file:
        return _read(file, most_bytes, path)


def read_given(path: Path, most_bytes: int) -> tuple[bytes, int]:
    """Read what the user names on the command line: a regular file, a terminal, or a pipe such as ``<(sed …)``.

    A FIFO into which nobody writes is empty and not waited for; a device, which may be endless or act when it is read,
    is refused.

    Returns:
        The bytes, and permissions of files that are made of them.

    Raises:
        OSError: Missing, unreadable, something else, or longer than ``most_bytes``.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or os.isatty(descriptor)):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{kind_of(mode)}, neither a file nor a pipe", str(path))
    # From here on a pipe may be waited for: somebody has it open for writing, or it ends at once.
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "rb") as file:
        return _read(file, most_bytes, path), as_private_as(mode)


def read_up_to(file: BufferedReader, most_bytes: int) -> bytes:
    """Read to the end of an open file, or one byte beyond ``most_bytes``.

    That byte shows that a file is too long, also one that grows or whose size is not stated.
    """
    # Python takes as much memory as it is asked to read, however short the file.
    stated = os.fstat(file.fileno()).st_size
    data = file.read(min(stated, most_bytes) + 1)
    return data + file.read(most_bytes - stated) if stated < len(data) <= most_bytes else data


def _read(file: BufferedReader, most_bytes: int, path: Path) -> bytes:
    data = read_up_to(file, most_bytes)
    if len(data) > most_bytes:
        most = f"{most_bytes >> 20} MiB" if most_bytes >> 20 else f"{most_bytes:,} bytes"
        raise OSError(errno.EFBIG, f"longer than {most}", str(path))
    return data


def kind_of(mode: int) -> str:
    """What a file that is not a regular one is, in words."""
    return next((name for matches, name in _KINDS if matches(mode)), "a device")
