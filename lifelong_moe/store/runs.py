"""Runs: named references to stages (``head.json``), each with a ledger of events and a report."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from lifelong_moe.config.names import require_name
from lifelong_moe.errors import ConfigError, CorruptError
from lifelong_moe.redaction import redacted
from lifelong_moe.storage.files import append_line, write_atomic
from lifelong_moe.storage.grammars import NAME
from lifelong_moe.storage.keys import canonical_json
from lifelong_moe.storage.opening import read_bounded
from lifelong_moe.storage.plain import require_same
from lifelong_moe.storage.plain_files import corrupt_if_irregular
from lifelong_moe.storage.stored import MOST_BYTES, parse_json, read_stored
from lifelong_moe.storage.temporary import GRACE_SECONDS
from lifelong_moe.store.head import RunHead

T = TypeVar("T")
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)


def timestamp(seconds: float | None = None) -> str:
    """The current time, or a time in seconds since the epoch, as ISO 8601, UTC."""
    # A fixed width in one time zone, so that strings sort by time.
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def latest_timestamp() -> str:
    """The latest plausible timestamp; a later one comes from a clock that ran ahead."""
    # Machines that take turns on a run may disagree on the time, but by less than a day.
    return timestamp(time.time() + GRACE_SECONDS)


class RunRecord:
    """The directory ``mlruns/runs/<run>/``.

    Raises:
        ConfigError: If ``run`` is no name: it could lead out of the store.
    """

    def __init__(self, root: Path, run: str) -> None:
        self.run = require_name(run, "run")
        self.path = root / "runs" / run

    @property
    def lock_path(self) -> Path:
        """The file that a working process locks."""
        return self.path / ".lock"

    def head(self) -> RunHead | None:
        """The run's head; None if the run never started.

        Raises:
            CorruptError: If it is damaged, or of a later version.
        """
        return self._read("head.json", RunHead.from_json)

    def set_head(self, head: RunHead) -> None:
        """Replace the head atomically."""
        self._write("head.json", head.to_json())

    def report(self, build: Callable[[Any], T]) -> T | None:
        """What ``build`` makes of the last report; None before the first stage is evaluated.

        Raises:
            CorruptError: If it is damaged, or of a later version.
        """
        return self._read("report.json", build)

    def set_report(self, report: Mapping[str, Any]) -> None:
        """Replace the report atomically."""
        self._write("report.json", report)

    def log(self, event: str, **fields: Any) -> None:
        """Append a line to the ledger and flush it to disk."""
        # The ledger is history for people; only the head decides what a run refers to.
        line = canonical_json({"time": timestamp(), "event": event, **redacted(fields)})
        append_line(self.path / "ledger.jsonl", line)

    def logged(self, event: str, field: str) -> list[Any]:
        """A field of every ledger entry of an event, oldest first."""
        return [entry.get(field) for entry in self._entries() if entry.get("event") == event]

    def changed(self) -> str:
        """When something was last recorded of the run, ISO 8601, UTC."""
        times = [str(entry.get("time")) for entry in self._entries()]
        # A copy of a store has new file times, so that the ledger knows better; but a crash may have left none.
        return max(filter(TIMESTAMP.fullmatch, times), default="") or timestamp(
            (self.path / "head.json").lstat().st_mtime
        )

    def _entries(self) -> list[Mapping[str, Any]]:
        """All entries of the ledger, oldest first."""
        found: list[Mapping[str, Any]] = []
        path = self.path / "ledger.jsonl"
        # A crash can tear a line, even within a character: such lines are skipped.
        try:
            with corrupt_if_irregular(path):
                data = read_bounded(path, MOST_BYTES, follow=False)
        except FileNotFoundError:
            return []
        for line in data.split(b"\n"):
            with suppress(CorruptError):
                entry = parse_json(line, path)
                if isinstance(entry, dict):
                    found.append(entry)
        return found

    def _write(self, name: str, data: Mapping[str, Any]) -> None:
        path, text = self.path / name, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False).encode()
        # A run that is continued says much again, and each write waits for the disk.
        with suppress(FileNotFoundError), corrupt_if_irregular(path):
            if read_bounded(path, MOST_BYTES, follow=False) == text:
                return
        write_atomic(path, text)

    def _read(self, name: str, build: Callable[[Any], T]) -> T | None:
        def of_this_run(data: Any) -> T:
            built = build(data)
            # What is recorded elsewhere goes by the name within.
            if isinstance(data, Mapping) and isinstance(data.get("run"), str):
                require_same("run", data["run"], self.run)
            return built

        try:
            return read_stored(self.path / name, of_this_run)
        except FileNotFoundError:
            return None


class OpenRun:
    """A run that this process works on, under the run's lock.

    Args:
        record: Where it is kept.
        head: The current head; changes that were not saved are lost if the process is killed.
    """

    def __init__(self, record: RunRecord, head: RunHead) -> None:
        self.record, self.head = record, head

    def save(self, head: RunHead) -> None:
        """Replace the head, in memory and on disk."""
        self.head = head
        self.record.set_head(head)


def require_head(root: Path, run: str) -> RunHead:
    """The head of a run that must exist.

    Raises:
        ConfigError: If there is no such run; the message lists the runs.
        CorruptError: If it is damaged, or of a later version.
    """
    head = RunRecord(root, run).head()
    if head is None:
        there = run_names(root)
        near = get_close_matches(run, there, n=1)
        known = f"There are {', '.join(there)}." if there else "There are none yet."
        known = f"Did you mean {near[0]}? {known}" if near else known
        raise ConfigError(f"run {run} does not exist under {root / 'runs'}. {known}")
    return head


def trained_by(root: Path, stage: str) -> RunHead | None:
    """The head of the run that trained a stage; None if no run that can be read says so.

    Args:
        root: The store.
        stage: Key of the stage.
    """
    for name in run_names(root):
        # What is damaged there is told by commands that name that run.
        with suppress(CorruptError):
            head = RunRecord(root, name).head()
            if head is not None and stage in head.trained:
                return head
    return None


def run_names(root: Path) -> list[str]:
    """Names of all runs of a store, sorted; a folder that no run can be called like is none."""
    there = (path.parent.name for path in (root / "runs").glob("*/head.json"))
    return sorted(name for name in there if NAME.allows(name))
