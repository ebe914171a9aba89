"""Open files that somebody else may have made: regular files only, without waiting, and no larger than is expected."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISLNK, "a symbolic link"),
)


def open_regular(path: Path, *, follow: bool) -> BinaryIO:
    """Open a regular file for reading.

    Args:
        path: The file.
        follow: Whether ``path`` itself may be a symbolic link, as files that the user names may be. Files of a store
            and of an inbox may not: a link could name any file that this user can read.

    Raises:
        OSError: Missing, unreadable, a link that is not followed, or not a regular file; ``strerror`` says which.
    """
    # Without waiting: opening a FIFO would otherwise last until somebody writes to it.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise OSError(errno.ELOOP, "a symbolic link, which is not followed here", str(path)) from None
        raise
    # The descriptor is examined, not the name, behind which another file may stand by now.
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((name for matches, name in _KINDS if matches(mode)), "a device")
        raise OSError(errno.EINVAL, f"{kind}, not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bounded(path: Path, most_bytes: int, *, follow: bool) -> bytes:
    """Read a whole regular file of at most ``most_bytes``; see :func:`open_regular`.

    Raises:
        OSError: As :func:`open_regular`, or the file is longer.
    """
    with open_regular(path, follow=follow) as file:
        # One byte more than allowed shows that a file is too long, also one that grows or whose size is not stated.
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"longer than {most_bytes >> 20} MiB", str(path))
    return data
