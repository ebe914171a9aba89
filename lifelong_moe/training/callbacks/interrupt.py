"""SIGTERM as a request: training checkpoints at its next step boundary; other work stops at once."""

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
    """A request to stop, from SIGTERM."""

    def __init__(self) -> None:
        self.requested = False
        self.deferred = False

    @contextmanager
    def until_step_boundary(self) -> Iterator[None]:
        """Context in which SIGTERM only sets ``requested``, for the code within to check.

        Raises:
            TryAgainError: On leaving, if the request came after the last check.
            KeyboardInterrupt: In place of the SystemExit that Lightning makes of it.
        """
        self.deferred = True
        try:
            yield
        except SystemExit as stop:
            # Lightning turns Ctrl-C into an exit with code 1, which would hide it from the command's own handling.
            if isinstance(stop.__context__, KeyboardInterrupt):
                signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning has set it to be ignored
                raise KeyboardInterrupt from None
            if not self.requested:
                raise
        finally:
            self.deferred = False
        if self.requested:
            self._stop()

    def take_over(self) -> None:
        """Install the handler again, after a library replaced it."""
        # Lightning's own one would end training between two micro-batches, where no checkpoint is possible.
        signal.signal(signal.SIGTERM, self.handle)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Signal handler: the first signal is a request, a second one ends the process at once."""
        if self.requested:
            # Without cleanup: everything on disk is whole or absent, so a kill at any point is safe.
            os._exit(EXIT_CODE)
        self.requested = True
        if not self.deferred:
            self._stop()

    def _stop(self) -> NoReturn:
        raise TryAgainError("stopped by SIGTERM between two steps of work; run the same command again to continue.")


class PendingInterrupt(Interrupt):
    """The request in a process that blocks SIGTERM, where the signal stays pending."""

    def __init__(self) -> None:
        self.deferred = True

    @property
    def requested(self) -> bool:  # type: ignore[override]
        """Whether the signal came."""
        return signal.SIGTERM in signal.sigpending()

    def take_over(self) -> None:
        """Do nothing: a blocked signal calls no handler."""


@contextmanager
def handling_sigterm() -> Iterator[Interrupt]:
    """Context with the handler installed; the old one is restored at its end."""
    interrupt = Interrupt()
    previous = signal.signal(signal.SIGTERM, interrupt.handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGTERM, previous)
