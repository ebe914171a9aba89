"""Tell how far the reading of text has come, how fast it is, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
EACH_SECONDS = 1.0
"""Between two sentences."""
# Of the process and not of a call: text is read many calls below the command that shows it.
_listener: ContextVar[Callable[[str], None] | None] = ContextVar("listener", default=None)


@contextmanager
def telling(listener: Callable[[str], None]) -> Iterator[None]:
    """Let a function hear how far whatever is read within has come, a sentence each second."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def told(things: Iterable[T], what: str, total_bytes: int, done_bytes: Callable[[T], int]) -> Iterator[T]:
    """Yield things, telling how far one has come.

    Args:
        things: What is read.
        what: What is done with it.
        total_bytes: Of all of it.
        done_bytes: Bytes that are done with each thing.
    """
    listener = _listener.get()
    if listener is None:
        yield from things
        return
    began = spoke = time.monotonic()
    done = 0
    for thing in things:
        yield thing
        done += done_bytes(thing)
        if (now := time.monotonic()) - spoke >= EACH_SECONDS:
            spoke = now
            listener(sentence(what, done, total_bytes, now - began))


def sentence(what: str, done: int, total: int, seconds: float) -> str:
    """``reading a: 120 of 400 MB, 8.0 MB/s, 35 s left``."""
    speed = done / max(seconds, 1e-9)
    left = f", {max(0, total - done) / speed:,.0f} s left" if speed else ""
    # A packed file holds more than it says.
    return f"{what}: {done / 1e6:,.0f} of {max(done, total) / 1e6:,.0f} MB, {speed / 1e6:,.1f} MB/s{left}"
