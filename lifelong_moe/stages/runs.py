"""Runs: named references to stages, with a ledger of what happened.

``head.json`` holds ``run``, ``method``, ``seed``, ``config`` (unresolved), ``plan`` and ``names`` (keys and names of
all stages), ``stages`` (keys of the committed ones), ``trained`` (keys of those that this run itself trains),
``data`` (hash of each distribution's training documents), ``tokenizer`` (its hash), ``centroids`` (with bundles: key of
those that were fitted on the first stage's text) and ``mlflow`` (what has been recorded there); once retraining,
``drop`` or ``rollback`` has been at it, ``versions`` and ``champion`` too, see :mod:`lifelong_moe.stages.versions`, and
``waiting``, the hash of a batch that a tick had no answer about.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lifelong_moe.errors import ConfigError, CorruptError
from lifelong_moe.storage.files import append_line, write_atomic
from lifelong_moe.storage.keys import SHORT, canonical_json
from lifelong_moe.storage.temporary import GRACE_SECONDS


def timestamp(seconds: float | None = None) -> str:
    """Now, or so many seconds after the epoch; ISO 8601, UTC, in whole seconds, so that later is greater."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def latest_timestamp() -> str:
    """The latest time that is believed: clocks of machines that take turns may differ, but by less than a day."""
    return timestamp(time.time() + GRACE_SECONDS)


class RunRecord:
    """The directory ``mlruns/runs/<run>/``."""

    def __init__(self, root: Path, run: str) -> None:
        self.run = run
        self.path = root / "runs" / run

    @property
    def lock_path(self) -> Path:
        """File that a working process locks."""
        return self.path / ".lock"

    def head(self) -> dict[str, Any] | None:
        """What the run refers to; None if it never started."""
        return self._read("head.json")

    def set_head(self, head: dict[str, Any]) -> None:
        """Replace the head atomically."""
        write_atomic(self.path / "head.json", json.dumps(head, indent=1, ensure_ascii=False, allow_nan=False))

    def report(self) -> dict[str, Any] | None:
        """The machine-readable result; None before the first stage is evaluated."""
        return self._read("report.json")

    def set_report(self, report: dict[str, Any]) -> None:
        """Replace the report atomically."""
        write_atomic(self.path / "report.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False))

    def log(self, event: str, **fields: Any) -> None:
        """Append a line to the ledger and flush it to disk."""
        append_line(self.path / "ledger.jsonl", canonical_json({"time": timestamp(), "event": event, **fields}))

    def logged(self, event: str, field: str) -> list[Any]:
        """A field of all the ledger's lines of an event, in order; a line that a crash left torn is passed over."""
        path, found = self.path / "ledger.jsonl", []
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("event") == event:
                    found.append(entry.get(field))
        return found

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CorruptError(f"{path}: not JSON ({error}).") from None


def require_head(root: Path, run: str) -> dict[str, Any]:
    """The head of a run that must exist.

    Raises:
        ConfigError: Naming the runs there are.
    """
    record = RunRecord(root, run)
    head = record.head()
    if head is not None and not {"plan", "stages", "names", "config"} <= set(head):
        raise CorruptError(f"{record.path / 'head.json'}: not the head of a run.")
    if head is None:
        there = sorted(p.parent.name for p in (root / "runs").glob("*/head.json"))
        known = f"There are {', '.join(there)}." if there else "There are none yet."
        raise ConfigError(f"run {run} does not exist under {root / 'runs'}. {known}")
    return head


def committed_stages(head: Mapping[str, Any]) -> dict[str, str]:
    """Keys of a run's committed stages by name, oldest first."""
    there = set(head["stages"])
    return {name: key for name, key in zip(head["names"], head["plan"], strict=True) if key in there}


def require_stage(head: Mapping[str, Any], name: str | None = None) -> str:
    """The key of a run's committed stage; of the last one by default.

    Raises:
        ConfigError: If there is none, naming those there are.
    """
    committed = committed_stages(head)
    if not committed:
        raise ConfigError(f"run {head['run']} has no committed stage yet.")
    if name is not None and name not in committed:
        raise ConfigError(f"run {head['run']} has no committed stage {name}; there are {', '.join(committed)}.")
    return committed[name] if name is not None else head["stages"][-1]


class EvaluationStore:
    """Evaluations under ``mlruns/evaluations/``, by stage and by held-out text with its settings."""

    def __init__(self, root: Path) -> None:
        self.root = root / "evaluations"

    def _path(self, stage_key: str, data_key: str) -> Path:
        return self.root / f"{stage_key[:SHORT]}-{data_key[:SHORT]}.json"

    def find(self, stage_key: str, data_key: str) -> dict[str, Any] | None:
        """A stored evaluation; None if it was never made, or if its file is damaged: it can be made again."""
        try:
            stored = json.loads(self._path(stage_key, data_key).read_text(encoding="utf-8"))
            same = stored["stage"] == stage_key and stored["data"] == data_key
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return stored["result"] if same else None

    def add(self, stage_key: str, data_key: str, result: dict[str, Any]) -> None:
        """Store an evaluation atomically."""
        stored = {"stage": stage_key, "data": data_key, "result": result}
        write_atomic(self._path(stage_key, data_key), canonical_json(stored))
