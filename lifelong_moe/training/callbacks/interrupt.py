"""SIGTERM and Ctrl-C as requests: training checkpoints at its next step boundary; other work stops at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from lifelong_moe.errors import TryAgainError

# 128 + SIGINT, as shells report it.
EXIT_CODES = {signal.SIGTERM: TryAgainError.exit_code, signal.SIGINT: 130}
"""Exit code of a process that stopped on a signal."""
NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class Interrupt:
    """A request to stop, from SIGTERM or Ctrl-C."""

    def __init__(self) -> None:
        self.requested = False
        self.deferred = False
        self._signal = signal.SIGTERM
        """The one that requested it."""

    @contextmanager
    def until_step_boundary(self) -> Iterator[None]:
        """Context in which a signal only sets ``requested``, for the code within to check.

        Raises:
            TryAgainError: On leaving, if SIGTERM came after the last check.
            KeyboardInterrupt: After Ctrl-C, in place of any TryAgainError, and of the SystemExit that Lightning makes
                of a KeyboardInterrupt.
        """
        self.deferred, before = True, signal.getsignal(signal.SIGINT)
        try:
            yield
        except TryAgainError as error:
            # Not raised before: Lightning answers it with an exit, and a rank's error is what it sends.
            if self.requested and self._signal == signal.SIGINT:
                raise KeyboardInterrupt(str(error)) from None
            raise
        except SystemExit as stop:
            # Lightning turns Ctrl-C into an exit with code 1, which would hide it from the command's own handling.
            if isinstance(stop.__context__, KeyboardInterrupt):
                signal.signal(signal.SIGINT, before)  # Lightning has set it to be ignored
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
            os._exit(EXIT_CODES[signal.Signals(signum)])
        self.requested, self._signal = True, signal.Signals(signum)
        if not self.deferred:
            self._stop()
        # A step may take a minute. Python's own streams may be in the middle of a line, and are not reentrant.
        with suppress(OSError):
            os.write(2, f"\n{NAMES[self._signal]}: stopping after this step; a second one ends at once\n".encode())

    def _stop(self) -> NoReturn:
        told = f"stopped by {NAMES[self._signal]} between two steps of work; run the same command again to continue."
        # Not an error of ours: whoever pressed Ctrl-C needs no failed tick in the ledger and no hook's message.
        raise KeyboardInterrupt(told) if self._signal == signal.SIGINT else TryAgainError(told)


class PendingInterrupt(Interrupt):
    """The request in a process that blocks SIGTERM, where the signal stays pending."""

    def __init__(self) -> None:
        self.deferred = True

    @property
    def requested(self) -> bool:  # type: ignore[override]
        """Whether the signal came."""
        return signal.SIGTERM in signal.sigpending()

    @contextmanager
    def until_step_boundary(self) -> Iterator[None]:
        """Do nothing: the main process answers the request where no step does."""
        yield

    def take_over(self) -> None:
        """Do nothing: a blocked signal calls no handler."""


@contextmanager
def handling_signals() -> Iterator[Interrupt]:
    """Context with the handler installed for SIGTERM and Ctrl-C; the old ones are restored at its end."""
    interrupt = Interrupt()
    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt.handle)}
    # Ignored by nohup, and by shells without job control for what goes on in the background.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        previous[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt.handle)
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
