"""SIGTERM as a request: training checkpoints at its next step boundary; elsewhere work simply stops."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lifelong_moe.errors import TryAgainError

EXIT_CODE = TryAgainError.exit_code


class Interrupt:
    """Whether somebody asked us to stop."""

    def __init__(self) -> None:
        self.requested = False
        self.deferred = False

    @contextmanager
    def until_step_boundary(self) -> Iterator[None]:
        """Within this context a request only sets ``requested``; somebody inside looks at it."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: the first signal asks, a second one ends the process at once."""
        if self.requested:
            os._exit(EXIT_CODE)
        self.requested = True
        if not self.deferred:
            raise TryAgainError("stopped by SIGTERM between two stages; run the same command again to continue.")


@contextmanager
def handling_sigterm() -> Iterator[Interrupt]:
    """Install the handler for the length of a run, and put the old one back."""
    interrupt = Interrupt()
    previous = signal.signal(signal.SIGTERM, interrupt.handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGTERM, previous)
