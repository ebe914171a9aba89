"""Callbacks of the training loop: curves and costs, progress, step checkpoints."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from lifelong_moe.errors import TryAgainError, both_ends, visible
from lifelong_moe.measures import MEASURES, duration
from lifelong_moe.training.callbacks.checkpoint import checkpoint_path
from lifelong_moe.training.callbacks.energy import READ_SECONDS, EnergyMeter, energy_counters
from lifelong_moe.training.callbacks.interrupt import Interrupt

LOG_SECONDS, BAR_SECONDS = 15.0, 1.0
"""Between two lines, and between two updates of the bar."""
IN_NATS = ("train/loss", "train/old_loss", "train/distill_loss")
"""Curves whose names get their unit in MLflow; stages keep their last points under these names. Others have none."""
WORDS = 72
"""Columns of the terminal for the text beside a bar."""
LEAST_TITLE = 16
"""Columns of it for the name of the stage, at least: a longer one would break the line."""


def peak_megabytes(device: torch.device) -> float:
    """Most memory that tensors have taken on a GPU so far, or this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    # In kilobytes, but on macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


class Meter(Callback):
    """Training curves, speed, energy, and the share of time spent waiting for data.

    Args:
        step_tokens: Tokens per step.
        step_flops: FLOPs per step, on average over the stage.
        every_steps: Between two points of a curve.
        rollbacks: Of the stage so far.
    """

    def __init__(self, step_tokens: int, step_flops: float, every_steps: int, rollbacks: int = 0) -> None:
        self.step_tokens, self.step_flops = step_tokens, step_flops
        self.every_steps, self.rollbacks = every_steps, rollbacks
        self.seconds = 0.0
        self.data_seconds = 0.0
        self.energy = EnergyMeter()
        self.last: dict[str, float] = {}
        self._stepped = 0
        self._mark = self._step_began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and the device's energy counters."""
        self.energy.start(energy_counters(trainer.strategy.root_device))
        self._mark = time.perf_counter()
        self._stepped = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the time since the last batch's end as waiting for data."""
        # It includes the overhead of the loop itself, which is small beside a micro-batch.
        self._step_began = time.perf_counter()
        self.data_seconds += self._step_began - self._mark

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the clock; every ``every_steps`` log a point of each curve, over the whole step and all processes."""
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now
        self.energy.advance(READ_SECONDS)
        step = trainer.global_step
        # By quotients, not remainders: with accumulation this runs several times a step, and logs once.
        due = step // self.every_steps > self._stepped // self.every_steps
        self._stepped = step
        if not (due or step == trainer.max_steps) or not trainer.loggers:
            return
        module: Any = pl_module
        self.last = {f"train/{name}": value for name, value in module.means.values.items()}
        extra = {
            # The last parameter group; the first may be a trunk with a smaller rate.
            "train/learning_rate": trainer.optimizers[0].param_groups[-1]["lr"],
            "train/tokens": float(step * self.step_tokens),
            "train/grad_norm": module.grad_norm,
            "train/nonfinite_steps": float(module.guard.nonfinite_steps),
            "train/skipped_spikes": float(module.guard.skipped_spikes),
            "train/rollbacks": float(self.rollbacks),
            # Since the beginning of the phase, also over interruptions.
            MEASURES["tokens_per_second"].metric: step * self.step_tokens / self.seconds,
            MEASURES["tflops_per_second"].metric: step * self.step_flops / self.seconds / 1e12,
            MEASURES["data_fraction"].metric: self.data_seconds / self.seconds,
            MEASURES["memory"].metric: peak_megabytes(trainer.strategy.root_device),
        }
        curves = {f"{key}_nats_per_token" if key in IN_NATS else key: value for key, value in self.last.items()}
        for logger in trainer.loggers:
            logger.log_metrics({**curves, **extra}, step=step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the energy counters a last time."""
        self.energy.advance()

    def state_dict(self) -> dict[str, Any]:
        """Time, energy and the last point so far."""
        self.energy.advance()
        spent = {"seconds": self.seconds, "data_seconds": self.data_seconds, "joules": self.energy.joules}
        return {**spent, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the clock."""
        self.seconds, self.data_seconds = float(state_dict["seconds"]), float(state_dict["data_seconds"])
        joules = state_dict.get("joules")  # a checkpoint of an earlier version did not measure it
        self.energy.joules = None if joules is None else float(joules)
        self.last = {str(name): float(value) for name, value in state_dict["last"].items()}


class ProgressReport(Callback):
    """A bar on a terminal; a plain line every 15 seconds elsewhere.

    Args:
        title: What is trained.
        console: Where people read.
        enabled: Whether anything is shown.
        meter: Of the same training.
        later_flops: Of what the run trains afterwards; None where nobody knows.
    """

    def __init__(
        self, title: str, console: Console, enabled: bool, meter: Meter, later_flops: float | None = None
    ) -> None:
        self.title, self.console, self.enabled, self.meter = title, console, enabled, meter
        self.later_flops = later_flops
        self._bar: Progress | None = None
        self._task: Any = None
        self._said = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar."""
        self._said = time.monotonic()
        if not (self.enabled and self.console.is_terminal):
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=max(4, min(40, self.console.width - WORDS))),
            MofNCompleteColumn(),
            TextColumn("steps · {task.fields[text]}", markup=False, table_column=Column(overflow="fold")),
        )
        self._bar = Progress(*columns, console=self.console, transient=True)
        self._bar.start()
        title = both_ends(self.title, max(LEAST_TITLE, self.console.width - WORDS))
        # rich drops some control characters instead of showing them.
        self._task = self._bar.add_task(
            visible(title, keep=""), total=trainer.max_steps, completed=trainer.global_step, text="starting"
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the bar, or print a line."""
        if not self.enabled:
            return
        if time.monotonic() - self._said < (LOG_SECONDS if self._bar is None else BAR_SECONDS):
            return
        self._said = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, text=self._text(trainer, pl_module))
        else:
            self.console.print(
                f"{self.title}: step {trainer.global_step}/{trainer.max_steps}, {self._text(trainer, pl_module)}"
            )

    def _text(self, trainer: Trainer, pl_module: Any) -> str:
        step_seconds = max(self.meter.seconds, 1e-9) / max(1, trainer.global_step)
        text = f"loss {pl_module.means.values.get('loss', math.nan):.3f}"
        text += f", {self.meter.step_tokens / step_seconds:,.0f} tokens/s"
        left = (trainer.max_steps - trainer.global_step) * step_seconds
        text += f", {duration(left)} left"
        if self.later_flops:
            # At this stage's speed; evaluation comes on top, as it does after this stage.
            later = self.later_flops / self.meter.step_flops * step_seconds
            text += f", {duration(left + later)} for all stages"
        return text

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the bar."""
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the bar, and show the cursor again: after an error Lightning calls no ``teardown``."""
        self._remove()

    def _remove(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class StepCheckpoint(Callback):
    """Saves a checkpoint every ``every_steps`` steps, and on a request to stop.

    Args:
        work: The stage's folder.
        phase: Number of the phase.
        every_steps: Steps between checkpoints.
        interrupt: The request.
        finish: Waits until all is written.
    """

    def __init__(
        self, work: Path, phase: int, every_steps: int, interrupt: Interrupt, finish: Callable[[], object]
    ) -> None:
        self.work, self.phase, self.every_steps = work, phase, every_steps
        self.interrupt, self.finish = interrupt, finish
        self._saved = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take SIGTERM back from Lightning, which has just installed its own handler."""
        self.interrupt.take_over()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at a step boundary.

        Raises:
            TryAgainError: If a stop was requested; the checkpoint is committed by then.
        """
        step = trainer.global_step
        at_boundary = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not at_boundary or step == self._saved:
            return
        # All ranks must take the same decision, or one would wait in the next all-reduce for ranks that have stopped.
        requested = trainer.strategy.reduce_boolean_decision(self.interrupt.requested, all=False)
        # The result of ranks reaches the main process through a checkpoint.
        ends_rank = step == trainer.max_steps and trainer.world_size > 1
        if requested or ends_rank or step % self.every_steps == 0:
            # Sent before it is written: a run that continues from the checkpoint does not log these points again.
            for logger in trainer.loggers:
                logger.save()
            trainer.save_checkpoint(checkpoint_path(self.work, self.phase, step))
            self._saved = step
        if requested or ends_rank:
            self.finish()
            # One that ends while another still writes would end it, too.
            trainer.strategy.barrier()
        if requested:
            raise TryAgainError(
                f"stopped after step {step}, which is checkpointed; run the same command again to continue."
            )
