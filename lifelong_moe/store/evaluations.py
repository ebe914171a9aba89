"""Stored evaluations, apart from the stages that they measure: a new distribution leaves every stage untouched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.grammars import Key
from lifelong_moe.storage.keys import SHORT, canonical_json
from lifelong_moe.storage.plain import PlainError, from_plain
from lifelong_moe.storage.stored import read_stored

T = TypeVar("T")


@dataclass(frozen=True)
class StoredEvaluation:
    """The content of a file."""

    stage: Key
    data: Key
    """Hash of the held-out text and the settings."""
    result: Any
    """Plain JSON data of whoever measured."""


class EvaluationStore:
    """Evaluations under ``mlruns/evaluations/``, keyed by stage and by held-out text with its settings."""

    def __init__(self, root: Path) -> None:
        self.root = root / "evaluations"

    def _path(self, stage_key: str, data_key: str) -> Path:
        return self.root / f"{stage_key[:SHORT]}-{data_key[:SHORT]}.json"

    def find(self, stage_key: str, data_key: str, build: Callable[[Any], T]) -> T | None:
        """What ``build`` makes of a stored evaluation, or None if there is none."""
        path = self._path(stage_key, data_key)
        try:
            stored = read_stored(path, partial(from_plain, StoredEvaluation))
            # File names hold 16 digits of each key, so the full keys inside decide.
            return build(stored.result) if (stored.stage, stored.data) == (stage_key, data_key) else None
        except (FileNotFoundError, CorruptError, PlainError):
            return None  # A damaged file counts as absent: measuring again restores it.

    def add(self, stage_key: str, data_key: str, result: dict[str, Any]) -> None:
        """Store an evaluation atomically."""
        # Two runs that share a stage may measure it at once: both write the same numbers, and the last rename stands.
        stored = {"stage": stage_key, "data": data_key, "result": result}
        write_atomic(self._path(stage_key, data_key), canonical_json(stored))
