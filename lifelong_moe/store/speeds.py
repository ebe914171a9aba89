"""How fast this machine has trained a model before, from the stages that it committed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lifelong_moe.errors import CorruptError
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.store.runs import RunRecord, run_names
from lifelong_moe.store.stages import CommittedStage, StageStore

ENOUGH, MOST = 8, 100
"""Stages that a speed is measured by, and stages that are looked at for them."""
ON = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda"}
"""The device of an accelerator by its name; of another one, such as ``auto``, any will do."""


@dataclass(frozen=True)
class MeasuredSpeed:
    """Of earlier stages together."""

    flops_per_second: float
    stages: int
    """Their number."""


def measured_speed(
    root: Path, store: StageStore, spec: StageSpec, *, machine: str, accelerator: str
) -> MeasuredSpeed | None:
    """The speed of the newest stages of the same model, precision and number of processes; None if there is none.

    Args:
        root: The store's directory.
        store: Its stages.
        spec: A stage to be trained.
        machine: Where, as stages record it; those of earlier versions do not, and count as trained here.
        accelerator: ``trainer.accelerator``.
    """
    device = ON.get(accelerator)
    flops = seconds = 0.0
    found = 0
    for stage in _newest(root, store):
        metrics, theirs = stage.metrics, stage.spec
        is_same = (theirs.model, theirs.precision, theirs.processes) == (spec.model, spec.precision, spec.processes)
        is_here = metrics.get("machine", machine) == machine and device in (None, metrics.get("device", device))
        cost, spent = metrics.get("active_flops"), metrics.get("seconds")
        if not (is_same and is_here and isinstance(cost, int | float) and isinstance(spent, int | float)):
            continue
        if cost > 0 and spent > 0:
            flops, seconds, found = flops + cost, seconds + spent, found + 1
        if found == ENOUGH:
            break
    return MeasuredSpeed(flops / seconds, found) if found else None


def _newest(root: Path, store: StageStore) -> Iterator[CommittedStage]:
    """Trained stages of all runs, those of the run that changed last first."""
    records = sorted((RunRecord(root, name) for name in run_names(root)), key=RunRecord.changed, reverse=True)
    seen: set[str] = set()
    for record in records:
        # An estimate is no occasion to tell of damage; commands that name that run do.
        with suppress(CorruptError):
            head = record.head()
            for key in reversed(head.stages if head is not None else ()):
                if key in seen or len(seen) == MOST:
                    continue
                seen.add(key)
                if (stage := store.find(key)) is not None and stage.derived is None:
                    yield stage
