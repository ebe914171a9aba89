"""Disk space, estimated before anything is written. Torch-free."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lifelong_moe.config.training import CheckpointConfig, TrainerConfig
from lifelong_moe.errors import ResourceError
from lifelong_moe.plan.spec import StageSpec

BYTES = {"32-true": 4, "auto": 4, "bf16-mixed": 4, "bf16-true": 2}
"""Of a trainable parameter, and of each of its two moments."""
TOKEN_BYTES = 8
"""Of a token that the parent's model wrote; int64."""
RECORD_BYTES = 2_000_000
"""Of a stage of any size: configuration, tokenizer, evaluations, and MLflow's records."""
# Measured with a local store: the first stage 1.4 MB, 1.1 MB of it MLflow's empty database; each further one 0.2 MB.
POINT_BYTES = 5_000
"""Of a logged point of a stage's curves in MLflow's database."""
# Some twenty values of 150 bytes, and their index.


@dataclass(frozen=True)
class DiskNeed:
    """Upper bound of the bytes that a stage writes."""

    stays: int
    """Weights and records."""
    work: int
    """Removed once the stage is committed: step checkpoints, best weights, generated text, the teacher's cache."""

    @property
    def total(self) -> int:
        """At the time of the commit."""
        return self.stays + self.work


def disk_need(spec: StageSpec, trainable: int, checkpoint: CheckpointConfig, trainer: TrainerConfig) -> DiskNeed:
    """Estimate what a stage writes.

    Args:
        spec: The stage.
        trainable: Parameters that it trains.
        checkpoint: How many step checkpoints there are.
        trainer: Interval of curves, and whether the teacher's outputs are cached.
    """
    weights = trainable * BYTES[spec.precision]
    taken = sum(phase.steps // checkpoint.every_steps for phase in spec.phases())
    written = TOKEN_BYTES * (spec.teacher_tokens - spec.distilled_tokens)
    # float32, and as if no block came twice, so at most this.
    cached = 4 * spec.model.width * spec.distilled_tokens if trainer.cache_teacher else 0
    best = weights if spec.finetune is not None and spec.finetune.patience is not None else 0
    records = RECORD_BYTES + POINT_BYTES * (spec.steps // trainer.log_every_n_steps)
    # A checkpoint holds weights and two moments; the oldest one is removed after the newest is written, hence + 1.
    work = 3 * weights * min(taken, checkpoint.keep + 1) + best + written + cached
    return DiskNeed(weights + records, work)


def run_need(needs: Sequence[DiskNeed]) -> int:
    """Bytes of several stages, one after the other: the sum of what stays, and the largest work."""
    return sum(need.stays for need in needs) + max((need.work for need in needs), default=0)


def require_space(root: Path, needed: int, what: str) -> None:
    """Refuse to begin without enough free space.

    Args:
        root: Directory that is written to; it need not be there yet.
        needed: Bytes.
        what: Subject of the message.

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
    """Disk space of all files under a directory; 0 if it does not exist."""
    # A sparse file takes fewer blocks than its size says; st_blocks counts 512 bytes whatever the file system uses.
    stats = (path.stat() for path in directory.rglob("*") if path.is_file())
    return sum(min(stat.st_size, 512 * stat.st_blocks) for stat in stats)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
