"""Until a continued phase has taken a step, what fails is the checkpoint that it continues from.

A checkpoint may come with somebody else's store. Its manifest fits it, but what it holds may be of other shapes and
types than Lightning and PyTorch expect, which find that out in many places.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lifelong_moe.errors import CorruptError, memory_is_full, one_line
from lifelong_moe.training.callbacks.checkpoint import step_of
from lifelong_moe.training.callbacks.lost import peer_is_lost

_MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_COUNTS = ("ready", "started", "processed", "completed")
"""Of batches, steps and epochs, in Lightning's loops."""


class Resumption(Callback):
    """Checks that a phase continues where its checkpoint says.

    Args:
        checkpoint: What the phase continues from; None if it begins.
    """

    def __init__(self, checkpoint: Path | None) -> None:
        self.checkpoint = checkpoint
        self._has_stepped = checkpoint is None

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Context in which the checkpoint is read, and steps are taken.

        Raises:
            CorruptError: In place of an error before the first step.
        """
        try:
            yield
        except _MISFITS as error:
            if self._has_stepped or memory_is_full(error) or peer_is_lost(error):
                raise
            raise self._misfit(f"{type(error).__name__}: {error}") from error

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Require numbers where Lightning only counts, some of which it reads at the end of a phase."""
        for part, kinds in (("loops", int), ("lr_schedulers", int | float | None)):
            if not all(isinstance(value, kinds) for value in _leaves(checkpoint[part])):
                raise self._misfit(f"{part} holds something else than numbers")
        # Without an error Lightning would begin them anew.
        for part in ("optimizer_states", "lr_schedulers"):
            if len(checkpoint[part]) != 1:
                raise self._misfit(f"{part} holds {len(checkpoint[part])}, not 1")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Require the step that names the checkpoint, and moments in the shapes of their parameters."""
        if self.checkpoint is None:
            return
        # The position decides when training ends.
        if trainer.global_step != step_of(self.checkpoint):
            raise self._misfit(f"it is of step {trainer.global_step}")
        # PyTorch's fused optimizer reads as many numbers as the parameter has, wherever the moment ends.
        for optimizer in trainer.optimizers:
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    expected = torch.Size() if name == "step" else parameter.shape
                    if getattr(value, "shape", None) != expected:
                        raise self._misfit(f"{name} is not of shape {tuple(expected)}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Nothing of the checkpoint is unread once the optimizer has used its state."""
        self._has_stepped |= (batch_idx + 1) % trainer.accumulate_grad_batches == 0

    def _misfit(self, reason: str) -> CorruptError:
        return CorruptError(
            f"{self.checkpoint}: not a step checkpoint of this stage ({one_line(reason)[:300]}). Remove it to continue "
            f"from the one before it, or the stage's work directory to begin again."
        )


def _leaves(value: Any) -> Iterator[Any]:
    if not isinstance(value, dict | list | tuple):
        yield value
        return
    for name, one in value.items() if isinstance(value, dict) else enumerate(value):
        if name in _COUNTS:
            yield one
        else:
            yield from _leaves(one)
