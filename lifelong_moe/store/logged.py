"""Summary metrics that MLflow holds of each stage of a run: a file a stage, so that a stage rewrites no other's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.grammars import Key, RunId
from lifelong_moe.storage.keys import SHORT, canonical_json
from lifelong_moe.storage.plain import from_plain
from lifelong_moe.storage.stored import read_stored


@dataclass(frozen=True)
class LoggedMetrics:
    """The content of a file."""

    run: RunId
    """Id of the run's own MLflow run, to which, as to the stage's, they were logged; another one has none of them."""
    stage: Key
    metrics: Mapping[str, float]

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.stage[:SHORT]}.json"


def read_logged(folder: Path, run: str, stage: str) -> Mapping[str, float]:
    """What an MLflow run holds of a stage; empty if nothing was logged.

    Args:
        folder: Of the files.
        run: Id of the MLflow run.
        stage: Key of the stage.

    Raises:
        CorruptError: If the file is damaged.
    """
    asked = LoggedMetrics(run, stage, {})
    try:
        found = read_stored(folder / asked.name, partial(from_plain, LoggedMetrics))
    except FileNotFoundError:
        return {}
    return found.metrics if (found.run, found.stage) == (run, stage) else {}


def write_logged(folder: Path, logged: LoggedMetrics) -> None:
    """Replace what is noted of a stage."""
    write_atomic(folder / logged.name, canonical_json(vars(logged)))
