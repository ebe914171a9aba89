"""Whether an optimizer step may be taken: judged by its loss and gradient before anything is updated."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

WINDOW = 128
"""Losses that a new one is compared with: those of the steps last taken."""
MIN_LOSSES = 32
"""With fewer no loss is a spike: a mean and a deviation of a handful say little, and a stage begins with a fall."""
MAX_Z = 6.0
"""Standard deviations above the window's mean beyond which a loss is a spike."""
MIN_STD = 0.05
"""Nats per token that count as the deviation of a window flatter than that: no rise under 0.3 nats is a spike."""
MAX_SPIKES = 3
"""Spikes in a row after which the window begins anew. Batches are drawn at random, so a rise that lasts is the model's
own level by then, and comparing with the old one would skip every step that is left."""


class Verdict(StrEnum):
    """What is to become of a step."""

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


class StepGuard:
    """Judges one phase's steps in turn; its state goes along in every step checkpoint."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=WINDOW)
        """Of the steps last taken; what was skipped never enters."""
        self.nonfinite_steps = 0
        self.nonfinite_in_a_row = 0
        self.skipped_spikes = 0
        self.spikes_in_a_row = 0

    def judge(self, loss: float | None, *others: float) -> Verdict:
        """Say whether a step may be taken, and remember it.

        Args:
            loss: Next-token loss of the whole step, nats per token; None if it had no token to score.
            others: What else must be finite: the sum that is minimized, the gradient's norm.
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
            if self.spikes_in_a_row == MAX_SPIKES:
                self.losses.clear()
                self.spikes_in_a_row = 0
            return Verdict.spike
        self.spikes_in_a_row = 0
        self.losses.append(loss)
        return Verdict.sound

    def state_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        vars(self).update({**state, "losses": deque(state["losses"], maxlen=WINDOW)})
