"""SIGTERM and Ctrl-C as requests: at once, or at the next step boundary."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from lifelong_moe.errors import TryAgainError
from lifelong_moe.training.callbacks import interrupt as module
from lifelong_moe.training.callbacks.interrupt import EXIT_CODES, Interrupt, PendingInterrupt, handling_signals


@pytest.fixture(autouse=True)
def in_the_foreground() -> Iterator[None]:
    """A shell starts what runs in its background with SIGINT ignored, which is then respected."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "error", "told"),
    [(signal.SIGTERM, TryAgainError, "stopped by SIGTERM"), (signal.SIGINT, KeyboardInterrupt, "stopped by Ctrl-C")],
)
def test_outside_of_training_a_request_stops_at_once(
    number: signal.Signals, error: type[BaseException], told: str
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(error, match=told), handling_signals() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), number)
    assert interrupt.requested and signal.getsignal(number) is before


def test_after_ctrl_c_the_checkpoint_s_message_is_that_of_ctrl_c() -> None:
    interrupt = Interrupt()
    with pytest.raises(KeyboardInterrupt, match="after step 6"), interrupt.until_step_boundary():
        interrupt.handle(signal.SIGINT, None)
        raise TryAgainError("after step 6")
    with pytest.raises(TryAgainError), Interrupt().until_step_boundary():
        raise TryAgainError("another process has the lock")
    interrupt = Interrupt()
    with pytest.raises(KeyboardInterrupt), interrupt.until_step_boundary():
        interrupt.handle(signal.SIGINT, None)  # and nobody looked


def test_in_training_it_waits_for_who_looks_and_is_raised_if_nobody_did() -> None:
    interrupt, seen = Interrupt(), []
    with pytest.raises(TryAgainError), interrupt.until_step_boundary():
        interrupt.handle(signal.SIGTERM, None)
        seen.append(interrupt.requested)
    assert seen == [True]
    interrupt = Interrupt()
    with interrupt.until_step_boundary():
        pass
    with pytest.raises(TryAgainError):  # no longer deferred
        interrupt.handle(signal.SIGTERM, None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    codes: list[int] = []
    monkeypatch.setattr(module.os, "_exit", codes.append)
    interrupt = Interrupt()
    with pytest.raises((TryAgainError, KeyboardInterrupt)), interrupt.until_step_boundary():
        interrupt.handle(signal.SIGTERM, None)
        assert codes == []
        interrupt.handle(number, None)
    assert codes == [EXIT_CODES[number]]


def test_what_lightning_makes_of_ctrl_c_is_ctrl_c_again(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: list[object] = []
    monkeypatch.setattr(module.signal, "signal", lambda number, handler: handlers.append((number, handler)))
    with pytest.raises(KeyboardInterrupt), Interrupt().until_step_boundary():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904
    assert handlers == [(signal.SIGINT, signal.default_int_handler)]
    with pytest.raises(SystemExit), Interrupt().until_step_boundary():
        raise SystemExit(3)  # somebody else's
    interrupt = Interrupt()
    with pytest.raises(TryAgainError), interrupt.until_step_boundary():
        interrupt.handle(signal.SIGTERM, None)
        raise SystemExit(1)  # Lightning's way to stop on the signal


def test_a_process_that_blocks_the_signal_sees_that_it_is_pending() -> None:
    interrupt = PendingInterrupt()
    assert interrupt.deferred and not interrupt.requested
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # no other thread, which does not block it
        assert interrupt.requested
        assert signal.sigwait({signal.SIGTERM}) == signal.SIGTERM
        assert not interrupt.requested
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
