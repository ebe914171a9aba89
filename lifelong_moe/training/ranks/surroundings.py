"""What training reaches outside of its model and text, in the main process and in a rank alike."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from lifelong_moe.training.callbacks.interrupt import Interrupt
from lifelong_moe.training.callbacks.points import Send


@dataclass(frozen=True)
class Surroundings:
    """Whom training listens to, and who hears of it."""

    interrupt: Interrupt
    """Requests to stop."""
    send: Send
    """Receives training curves."""
    console: Console
    """Where people read."""
