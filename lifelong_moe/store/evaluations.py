"""Stored evaluations, apart from the stages that they measure: a new distribution leaves every stage untouched.

What is measured together is kept together, so that a stage costs one file however many distributions there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.grammars import Key
from lifelong_moe.storage.keys import SHORT, canonical_json, content_key
from lifelong_moe.storage.plain import PlainError, from_plain
from lifelong_moe.storage.stored import read_stored

T = TypeVar("T")
TOGETHER = "together"
"""Stands in the names of files that hold several results."""


@dataclass(frozen=True)
class StoredEvaluation:
    """The content of a file with one result."""

    stage: Key
    data: Key
    """Hash of the held-out text and the settings."""
    result: Any
    """Plain JSON data of whoever measured."""

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return f"{self.stage[:SHORT]}-{self.data[:SHORT]}"


@dataclass(frozen=True)
class StoredTogether:
    """The content of a file with several results of one stage."""

    stage: Key
    results: Mapping[Key, Any]
    """By the hash of the held-out text and the settings."""

    @property
    def name(self) -> str:
        """The file's name without its suffix: files with other results have other names, so none replaces another."""
        return f"{self.stage[:SHORT]}-{TOGETHER}-{content_key(sorted(self.results))[:SHORT]}"


Stored = StoredEvaluation | StoredTogether


def read_evaluations(path: Path) -> Stored:
    """Read a file of either kind.

    Raises:
        FileNotFoundError: If there is none.
        CorruptError: If it is damaged.
    """
    kind: type[Stored] = StoredTogether if f"-{TOGETHER}-" in path.name else StoredEvaluation
    return read_stored(path, partial(from_plain, kind))


class EvaluationStore:
    """Evaluations under ``mlruns/evaluations/``, keyed by stage and by held-out text with its settings."""

    def __init__(self, root: Path) -> None:
        self.root = root / "evaluations"
        # One file has many results, which are asked for one after the other.
        self._together: dict[Path, StoredTogether] = {}

    def find(self, stage_key: str, data_key: str, build: Callable[[Any], T]) -> T | None:
        """What ``build`` makes of a stored evaluation, or None if there is none."""
        # File names hold 16 digits of each key, so the full keys inside decide.
        for stored in self._of(stage_key, data_key):
            try:
                return build(stored)
            except (CorruptError, PlainError):
                continue  # A damaged result counts as absent: measuring again restores it.
        return None

    def _of(self, stage_key: str, data_key: str) -> Iterator[Any]:
        """Results of this stage on this text, of which one would do."""
        for together in self._together.values():
            if together.stage == stage_key and data_key in together.results:
                yield together.results[data_key]
        several = sorted(self.root.glob(f"{stage_key[:SHORT]}-{TOGETHER}-*.json"))
        for path in (self._path(StoredEvaluation(stage_key, data_key, None)), *several):
            if path in self._together:
                continue
            try:
                stored = read_evaluations(path)
            except (FileNotFoundError, CorruptError):
                continue
            if isinstance(stored, StoredTogether):
                self._together[path] = stored
            results = stored.results if isinstance(stored, StoredTogether) else {stored.data: stored.result}
            if stored.stage == stage_key and data_key in results:
                yield results[data_key]

    def add(self, stage_key: str, data_key: str, result: Mapping[str, Any]) -> None:
        """Store an evaluation atomically."""
        self._write(StoredEvaluation(stage_key, data_key, result))

    def add_together(self, stage_key: str, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Store several evaluations of a stage, by their text, atomically and in one file."""
        self._write(StoredTogether(stage_key, results))

    def _write(self, stored: Stored) -> None:
        # Two runs that share a stage may measure it at once: both write the same numbers, and the last rename stands.
        path = self._path(stored)
        write_atomic(path, canonical_json(vars(stored)))
        if isinstance(stored, StoredTogether):
            self._together[path] = stored

    def _path(self, stored: Stored) -> Path:
        return self.root / f"{stored.name}.json"
