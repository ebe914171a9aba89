"""Decide from loss and gradient whether an optimizer step is taken, before anything is updated."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from enum import StrEnum
from typing import TypedDict

WINDOW = 128
"""Losses of the last steps taken, with which a new one is compared."""
MIN_LOSSES = 32
"""With fewer losses none is a spike: their deviation says little, and a stage begins with a fall."""
MAX_Z = 6.0
"""Standard deviations above the window's mean from which on a loss is a spike."""
MIN_STD = 0.05
"""Least standard deviation of a window, nats per token: no rise under 0.3 nats is a spike."""
MAX_SPIKES = 3
"""Spikes in a row after which the window is cleared."""


class Verdict(StrEnum):
    """Judgement of a step; all but sound ones are skipped."""

    sound = "sound"
    nonfinite = "nonfinite"
    """Loss or gradient is NaN or infinite."""
    spike = "spike"
    """The loss jumped."""


def spike_score(loss: float, losses: Sequence[float]) -> float:
    """Standard deviations by which a loss lies above the mean of earlier ones; below it the score is negative.

    Args:
        loss: Nats per token.
        losses: Earlier losses, all finite. With fewer than ``MIN_LOSSES`` the score is 0.

    Source:
        OLMo-core's ``SkipStepOptimizer``: 6 deviations over the last 128 steps; the floor is ours.
    """
    if len(losses) < MIN_LOSSES:
        return 0.0
    mean = math.fsum(losses) / len(losses)
    std = math.sqrt(math.fsum((one - mean) ** 2 for one in losses) / len(losses))
    return (loss - mean) / max(std, MIN_STD)


class GuardState(TypedDict):
    """The state of a :class:`StepGuard` in a step checkpoint."""

    losses: list[float]
    nonfinite_steps: int
    nonfinite_in_a_row: int
    skipped_spikes: int
    spikes_in_a_row: int


class StepGuard:
    """Judges the steps of one phase in turn."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=WINDOW)
        """Of the last steps taken; those of skipped steps never enter."""
        self.nonfinite_steps = 0
        self.nonfinite_in_a_row = 0
        self.skipped_spikes = 0
        self.spikes_in_a_row = 0

    def judge(self, loss: float | None, *others: float) -> Verdict:
        """Judge a step, and count it.

        Args:
            loss: Next-token loss of the whole step, nats per token; None if it had no token to score.
            others: Other numbers that must be finite: the objective, the gradient's norm.
        """
        if not all(math.isfinite(value) for value in (loss or 0.0, *others)):
            self.nonfinite_steps += 1
            self.nonfinite_in_a_row += 1
            return Verdict.nonfinite
        self.nonfinite_in_a_row = 0
        if loss is None:
            return Verdict.sound
        if spike_score(loss, self.losses) > MAX_Z:
            self.skipped_spikes += 1
            self.spikes_in_a_row += 1
            # Batches are drawn at random, so a rise that lasts is the model's new level. Compared with the old one,
            # every step that is left would be skipped.
            if self.spikes_in_a_row == MAX_SPIKES:
                self.losses.clear()
                self.spikes_in_a_row = 0
            return Verdict.spike
        self.spikes_in_a_row = 0
        self.losses.append(loss)
        return Verdict.sound

    def state_dict(self) -> GuardState:
        """As plain data."""
        return {**vars(self), "losses": list(self.losses)}  # type: ignore[typeddict-item]

    def load_state_dict(self, state: GuardState) -> None:
        """Restore the state."""
        counts = {name: int(state[name]) for name in vars(self) if name != "losses"}  # type: ignore[literal-required]
        vars(self).update(counts, losses=deque(map(float, state["losses"]), maxlen=WINDOW))
