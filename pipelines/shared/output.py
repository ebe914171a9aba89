"""Standard streams that no work depends on: readers may go away, any encoding will do, and they may not be there."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET)
"""What a descriptor says once nobody reads it: ``head`` has seen enough, a terminal is closed, a connection is lost."""


class Outlet(io.FileIO):
    """A descriptor that goes on taking text when nobody reads it any more: days of training must not end for that."""

    def write(self, data: Any, /) -> int:
        """Write, or let it go where nobody reads."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE:
                raise
            return memoryview(data).nbytes


def stream(number: int, like: TextIO | None, errors: str) -> TextIO:
    """Text into a descriptor; what its encoding lacks comes out as a substitute.

    Args:
        number: The descriptor, which stays open.
        like: Whose encoding and buffering it takes; None if the process was started without.
        errors: Name of the codec's error handler.
    """
    buffer = io.BufferedWriter(Outlet(number, "w", closefd=False))
    if not isinstance(like, io.TextIOWrapper):
        return io.TextIOWrapper(buffer, "utf-8", errors)
    return io.TextIOWrapper(
        buffer, like.encoding, errors, line_buffering=like.line_buffering, write_through=like.write_through
    )


def make_robust() -> None:
    """Replace standard output and error of this process, for good."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed by whoever started us; the next file opened would take its place and all output
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = stream(1, sys.stdout, "replace"), stream(2, sys.stderr, "backslashreplace")
