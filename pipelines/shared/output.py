"""Standard streams that cannot fail: their reader may disappear, their encoding may be poor, or they may be closed."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET)
"""Errors of a descriptor that nobody reads any more: ``head`` has ended, a terminal was closed, a connection lost."""


class Outlet(io.FileIO):
    """A descriptor that accepts text even if nobody reads it: days of training must not end because a pipe did."""

    def write(self, data: Any, /) -> int:
        """Write, or drop the data if nobody reads it."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE:
                raise
            return memoryview(data).nbytes  # as if written: a short count would be tried again for ever


def stream(number: int, like: TextIO | None, errors: str) -> TextIO:
    """Open a descriptor for text; characters that its encoding lacks are replaced.

    Args:
        number: The descriptor; it stays open when the stream is closed.
        like: Gives encoding and buffering; None if the process was started without this stream.
        errors: Name of the codec's error handler.
    """
    buffer = io.BufferedWriter(Outlet(number, "w", closefd=False))
    if not isinstance(like, io.TextIOWrapper):
        return io.TextIOWrapper(buffer, "utf-8", errors)
    return io.TextIOWrapper(
        buffer, like.encoding, errors, line_buffering=like.line_buffering, write_through=like.write_through
    )


def make_robust() -> None:
    """Replace standard output and error of this process."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The parent closed it. Left so, the next file opened would get this number, and all output with it.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = stream(1, sys.stdout, "replace"), stream(2, sys.stderr, "backslashreplace")
