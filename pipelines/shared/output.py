"""Standard streams that cannot fail: their reader may disappear, their encoding may be poor, or they may be closed."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from typing import Any, TextIO

from rich.console import Console

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
            # As if written: a short count would be tried again for ever.
            return memoryview(data).nbytes


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
    # Python's own standard error escapes such characters too, so that errors lose none.
    sys.stdout, sys.stderr = stream(1, sys.stdout, "replace"), stream(2, sys.stderr, "backslashreplace")


def console(as_json: bool = False) -> Console:
    """The console for people: standard error with ``--json``, which reserves standard output for the result."""
    terminal = (sys.stderr if as_json else sys.stdout).isatty()
    # In a pipe or a log, rich would fold lines at 80 columns.
    return Console(stderr=as_json, soft_wrap=not terminal, width=None if terminal else 140)


def finish(result: object, as_json: bool) -> None:
    """Print the result as one line of JSON, if that was asked for."""
    if as_json:
        # An encoding that lacks characters would replace them; JSON can escape them instead.
        print(json.dumps(result, ensure_ascii=not (sys.stdout.encoding or "utf-8").lower().startswith("utf")))
