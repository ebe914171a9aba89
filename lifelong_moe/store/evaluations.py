"""Stored evaluations, apart from the stages that they measure: a new distribution leaves every stage untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.keys import SHORT, canonical_json


class EvaluationStore:
    """Evaluations under ``mlruns/evaluations/``, keyed by stage and by held-out text with its settings."""

    def __init__(self, root: Path) -> None:
        self.root = root / "evaluations"

    def _path(self, stage_key: str, data_key: str) -> Path:
        return self.root / f"{stage_key[:SHORT]}-{data_key[:SHORT]}.json"

    def find(self, stage_key: str, data_key: str) -> dict[str, Any] | None:
        """A stored evaluation, or None if there is none."""
        try:
            stored = json.loads(self._path(stage_key, data_key).read_text(encoding="utf-8"))
            same = stored["stage"] == stage_key and stored["data"] == data_key
        except (OSError, ValueError, KeyError, TypeError):
            return None  # A damaged file counts as absent: measuring again restores it.
        # File names hold 16 digits of each key, so the full keys inside decide.
        return stored["result"] if same else None

    def add(self, stage_key: str, data_key: str, result: dict[str, Any]) -> None:
        """Store an evaluation atomically."""
        # Two runs that share a stage may measure it at once: both write the same numbers, and the last rename stands.
        stored = {"stage": stage_key, "data": data_key, "result": result}
        write_atomic(self._path(stage_key, data_key), canonical_json(stored))
