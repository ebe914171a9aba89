"""SIGTERM as a request: training checkpoints at its next step boundary; elsewhere work simply stops."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from lifelong_moe.errors import TryAgainError

EXIT_CODE = TryAgainError.exit_code


class Interrupt:
    """Whether somebody asked us to stop."""

    def __init__(self) -> None:
        self.requested = False
        self.deferred = False

    @contextmanager
    def until_step_boundary(self) -> Iterator[None]:
        """Within this context a request only sets ``requested``; somebody inside looks at it.

        Raises:
            TryAgainError: On leaving, if the request came too late for anybody inside to see it.
            KeyboardInterrupt: If Lightning made an exit of it.
        """
        self.deferred = True
        try:
            yield
        except SystemExit as stop:
            if isinstance(stop.__context__, KeyboardInterrupt):
                signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it from then on
                raise KeyboardInterrupt from None
            if not self.requested:
                raise
        finally:
            self.deferred = False
        if self.requested:
            self._stop()

    def take_over(self) -> None:
        """Undo a handler that a library put around ours: Lightning's would end training between two micro-batches."""
        signal.signal(signal.SIGTERM, self.handle)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: the first signal asks, a second one ends the process at once."""
        if self.requested:
            os._exit(EXIT_CODE)
        self.requested = True
        if not self.deferred:
            self._stop()

    def _stop(self) -> NoReturn:
        raise TryAgainError("stopped by SIGTERM between two steps of work; run the same command again to continue.")


class PendingInterrupt(Interrupt):
    """For a process that blocks SIGTERM, where the signal stays pending however often it comes."""

    def __init__(self) -> None:
        self.deferred = True

    @property
    def requested(self) -> bool:  # type: ignore[override]
        """Whether the signal came."""
        return signal.SIGTERM in signal.sigpending()

    def take_over(self) -> None:
        """Nothing: no handler is ever called."""


@contextmanager
def handling_sigterm() -> Iterator[Interrupt]:
    """Install the handler for the length of a run, and put the old one back."""
    interrupt = Interrupt()
    previous = signal.signal(signal.SIGTERM, interrupt.handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGTERM, previous)
