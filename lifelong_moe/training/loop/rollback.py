"""Roll a stage back to an earlier step, and skip the batches that it has read since.

Steps without a finite loss update nothing, so the steps before them are as suspect as they are. Returning alone would
repeat them bit for bit; therefore all batches read since the step of return are skipped. Skips are kept beside the step
checkpoints and depend on nothing else, so a run that is killed in between arrives at the same bits.

Source:
    PaLM (arXiv:2204.02311), section 5.1: restart before a spike, and skip the batches before and during it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from lifelong_moe.errors import DivergedError
from lifelong_moe.plan.phase import Phase
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.storage.directories import remove_directory
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.plain import from_plain
from lifelong_moe.storage.stored import read_stored
from lifelong_moe.training.callbacks.checkpoint import checkpoint_path, checkpoints

MAX_NONFINITE = 3
"""Steps in a row without a finite loss and gradient after which a stage rolls back."""
MAX_ROLLBACKS = 2
"""Rollbacks of a stage; after these, it has diverged."""
FILE = "rollbacks.json"
log = logging.getLogger(__name__)


class NonfiniteStepsError(DivergedError):
    """``MAX_NONFINITE`` steps in a row had no finite loss and gradient.

    Args:
        spec: Of the stage.
        phase: In which phase of it.
        last: The last of these steps, counted from 0 within the phase.
    """

    def __init__(self, spec: StageSpec, phase: Phase, last: int) -> None:
        self.phase = spec.phases().index(phase)
        self.first, self.last = last - MAX_NONFINITE + 1, last
        super().__init__(
            f"stage {spec.name}: {MAX_NONFINITE} steps in a row without a finite loss and gradient (last: step {last})"
        )


@dataclass(frozen=True)
class Skip:
    """From a step of a phase on, batches are read from a later place in the order."""

    phase: int
    step: int
    batches: int
    """Distance to the place without rollbacks."""


@dataclass(frozen=True)
class Rollbacks:
    """A stage's rollbacks, and the batches that it skips because of them."""

    count: int = 0
    skips: tuple[Skip, ...] = ()
    """In order of phase and step."""

    def shift(self, phase: int, step: int) -> int:
        """Number of batches that a step's batch comes later than without rollbacks."""
        # The largest one: each skip was computed from a place in the order that includes those before it.
        return max((skip.batches for skip in self.skips if skip.phase == phase and skip.step <= step), default=0)

    def batches(self, phase: int, start: int, steps: int) -> list[range]:
        """Batches that a phase of ``steps`` steps reads from step ``start`` on, counted from its first step.

        Without skips they are one range.
        """
        begins = {start, *(skip.step for skip in self.skips if skip.phase == phase and start < skip.step < steps)}
        bounds = [*sorted(begins), steps]
        shifts = [self.shift(phase, begin) for begin in bounds[:-1]]
        return [range(a + s, b + s) for a, b, s in zip(bounds, bounds[1:], shifts, strict=False)]

    def returning(self, phase: int, step: int, last: int) -> Rollbacks:
        """After one more rollback, from step ``last`` of a phase to ``step``, skipping the batches in between."""
        # Skips from ``step`` on belong to steps that are taken again, now with other batches.
        kept = tuple(skip for skip in self.skips if (skip.phase, skip.step) < (phase, step))
        unread = last + self.shift(phase, last) + 1
        return Rollbacks(self.count + 1, (*kept, Skip(phase, step, unread - step)))


def read_rollbacks(work: Path) -> Rollbacks:
    """A stage's rollbacks so far."""
    try:
        return read_stored(work / FILE, partial(from_plain, Rollbacks))
    except FileNotFoundError:
        return Rollbacks()


def return_step(first: int, every_steps: int) -> int:
    """The step to which training returns if step ``first`` is the first without a finite loss."""
    # The newest regular checkpoint with a sound step after it: one taken right before ``first`` may hold the parameters
    # that caused it. A checkpoint that an interruption left does not count, or the result would depend on it.
    return max(0, (first - 1) // every_steps * every_steps)


def roll_back(work: Path, error: NonfiniteStepsError, every_steps: int) -> None:
    """Make the stage continue from an earlier step when it is started again.

    Raises:
        DivergedError: If it rolled back ``MAX_ROLLBACKS`` times before.
    """
    done = read_rollbacks(work)
    if done.count == MAX_ROLLBACKS:
        raise DivergedError(
            f"{error}, after {MAX_ROLLBACKS} rollbacks; nothing was committed. Lower optim.lr or "
            f"set trainer.gradient_clip."
        ) from error
    step = return_step(error.first, every_steps)
    # Checkpoints first, skips second: a process killed in between trains to the same step again and rolls back there.
    # The other way round, a checkpoint of the bad steps would be continued with skips.
    for path in checkpoints(work):
        if path.name > checkpoint_path(work, error.phase, step).name:
            remove_directory(path)
    after = done.returning(error.phase, step, error.last)
    write_atomic(work / FILE, json.dumps(asdict(after)))
    log.warning("%s; rolling back to step %d, skipping the %d batches read since", error, step, error.last + 1 - step)
