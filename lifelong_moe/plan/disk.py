"""Room on the disk, estimated before anything is written. Torch-free."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lifelong_moe.config.training import CheckpointConfig, TrainerConfig
from lifelong_moe.errors import ResourceError
from lifelong_moe.plan.spec import StageSpec

BYTES = {"32-true": 4, "bf16-mixed": 4, "bf16-true": 2}
"""Of a number that is trained, and of each of its two moments."""
TOKEN_BYTES = 8
"""Of a token that the parent's model wrote."""
RECORD_BYTES = 2_000_000
"""Of a stage whatever its size: configuration, tokenizer, evaluations, and what MLflow keeps. Measured with a local
store: the first stage 1.4 MB, of which MLflow's empty database is 1.1 MB, each further one 0.2 MB."""
POINT_BYTES = 5_000
"""Of a logged point of a stage's curves in MLflow's database: some twenty values of 150 bytes, and their index."""


@dataclass(frozen=True)
class DiskNeed:
    """What a stage writes at most, in bytes."""

    stays: int
    """Weights, and records of them."""
    work: int
    """Is removed once the stage is committed: step checkpoints, one of them being written, the best weights of
    fine-tuning that may stop early, generated text, and what the teacher said."""

    @property
    def total(self) -> int:
        """When the stage is committed."""
        return self.stays + self.work


def disk_need(spec: StageSpec, trainable: int, checkpoint: CheckpointConfig, trainer: TrainerConfig) -> DiskNeed:
    """Estimate what a stage writes.

    Args:
        spec: The stage.
        trainable: Parameters that it trains.
        checkpoint: How many step checkpoints there are.
        trainer: How often curves are logged, and whether what the teacher says is kept: counted as if no block came
            twice.
    """
    weights = trainable * BYTES[spec.precision]
    taken = sum(phase.steps // checkpoint.every_steps for phase in spec.phases())
    written = TOKEN_BYTES * (spec.teacher_tokens - spec.distilled_tokens)
    cached = 4 * spec.model.width * spec.distilled_tokens if trainer.cache_teacher else 0
    best = weights if spec.finetune is not None and spec.finetune.patience is not None else 0
    records = RECORD_BYTES + POINT_BYTES * (spec.steps // trainer.log_every_n_steps)
    work = 3 * weights * min(taken, checkpoint.keep + 1) + best + written + cached
    return DiskNeed(weights + records, work)


def run_need(needs: Sequence[DiskNeed]) -> int:
    """Bytes of several stages, one after the other: all that stays, and the largest work."""
    return sum(need.stays for need in needs) + max((need.work for need in needs), default=0)


def require_space(root: Path, needed: int, what: str) -> None:
    """Refuse to begin what cannot end.

    Args:
        root: Directory that is written to; it need not be there yet.
        needed: Bytes.
        what: That needs them, for the message.

    Raises:
        ResourceError: If the file system has less than that.
    """
    there = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ResourceError(
            f"{what} needs up to {_megabytes(needed)} of disk, but {root} has {_megabytes(free)} free; nothing was "
            f"written. Free some, or set checkpoint.keep lower."
        )


def used_space(directory: Path) -> int:
    """Bytes that all files under a directory take, holes in them aside; 0 if it is not there."""
    stats = (path.stat() for path in directory.rglob("*") if path.is_file())
    return sum(min(stat.st_size, 512 * stat.st_blocks) for stat in stats)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
