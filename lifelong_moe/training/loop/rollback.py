"""Rolling back: a stage goes on from an earlier step, and past the text that it has met since.

Steps without a finite loss update nothing, so the steps before them are to blame as much as they are. Going back
alone would repeat them bit for bit. Therefore all batches read since the step that training returns to are passed
over, those of the steps without a finite loss included. What is passed over is kept beside the step checkpoints and
depends on nothing else, so a run that is killed on the way comes to the same bits.

Source:
    PaLM (arXiv:2204.02311), section 5.1: restart before a spike, and skip the batches before and during it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from lifelong_moe.errors import DivergedError
from lifelong_moe.plan.phase import Phase
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.storage.directories import remove_directory
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.training.callbacks.checkpoint import checkpoint_path, checkpoints

MAX_NONFINITE = 3
"""Steps in a row without a finite loss and gradient after which a stage rolls back."""
MAX_ROLLBACKS = 2
"""Times that a stage may; the next one would be divergence."""
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
    """From a step of a phase on, batches lie so many further on than they would."""

    phase: int
    step: int
    batches: int


@dataclass(frozen=True)
class Rollbacks:
    """How often a stage rolled back, and what it passes over since."""

    count: int = 0
    skips: tuple[Skip, ...] = ()
    """In order of phase and step."""

    def shift(self, phase: int, step: int) -> int:
        """Batches by which a step's batch lies further on."""
        return max((skip.batches for skip in self.skips if skip.phase == phase and skip.step <= step), default=0)

    def batches(self, phase: int, start: int, steps: int) -> list[range]:
        """Numbers of the batches that a phase of so many steps reads from step ``start`` on; one range without skips.

        Numbers count from the phase's first step.
        """
        begins = {start, *(skip.step for skip in self.skips if skip.phase == phase and start < skip.step < steps)}
        bounds = [*sorted(begins), steps]
        shifts = [self.shift(phase, begin) for begin in bounds[:-1]]
        return [range(a + s, b + s) for a, b, s in zip(bounds, bounds[1:], shifts, strict=False)]

    def returning(self, phase: int, step: int, last: int) -> Rollbacks:
        """After one more rollback, from step ``last`` of a phase to ``step``: what came in between is passed over."""
        kept = tuple(skip for skip in self.skips if (skip.phase, skip.step) < (phase, step))
        unread = last + self.shift(phase, last) + 1
        return Rollbacks(self.count + 1, (*kept, Skip(phase, step, unread - step)))


def read_rollbacks(work: Path) -> Rollbacks:
    """What a stage has been through so far."""
    if not (work / FILE).exists():
        return Rollbacks()
    state = json.loads((work / FILE).read_text(encoding="utf-8"))
    return Rollbacks(state["count"], tuple(Skip(**skip) for skip in state["skips"]))


def return_step(first: int, every_steps: int) -> int:
    """Where training returns to if step ``first`` is the first without a finite loss.

    The newest regular checkpoint that a sound step came after: one taken right before ``first`` may hold the very
    parameters that made it. A checkpoint that an interruption left does not count, or the result would depend on it.
    """
    return max(0, (first - 1) // every_steps * every_steps)


def roll_back(work: Path, error: NonfiniteStepsError, every_steps: int) -> None:
    """Make the stage go on from an earlier step when it is started again.

    Raises:
        DivergedError: If it did so ``MAX_ROLLBACKS`` times before.
    """
    done = read_rollbacks(work)
    if done.count == MAX_ROLLBACKS:
        raise DivergedError(
            f"{error}, after {MAX_ROLLBACKS} rollbacks; nothing was committed. Lower optim.lr or "
            f"set trainer.gradient_clip."
        ) from error
    step = return_step(error.first, every_steps)
    # In this order: killed in between, the stage comes to the same point again and rolls back then.
    for path in checkpoints(work):
        if path.name > checkpoint_path(work, error.phase, step).name:
            remove_directory(path)
    after = done.returning(error.phase, step, error.last)
    write_atomic(work / FILE, json.dumps(asdict(after)))
    log.warning("%s; rolling back to step %d, past the %d batches read since", error, step, error.last + 1 - step)
