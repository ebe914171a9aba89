"""Stages that tests of what comes after training would train and measure again and again.

A stage's key names all that its weights depend on, and an evaluation's all that its numbers do. Not for tests of
training itself, of resuming and of equal bits: they would compare a stage with its own copy.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest

import pipelines.run.run
import pipelines.versions.candidates
import pipelines.versions.gate_derived
from lifelong_moe.data.tokens.prepare import PreparedData
from lifelong_moe.plan.planned import PlannedStage
from lifelong_moe.storage.keys import SHORT, content_key
from lifelong_moe.storage.signing import SigningKeys
from lifelong_moe.store.evaluations import EvaluationStore, StoredEvaluation
from lifelong_moe.store.stages import CommittedStage
from lifelong_moe.training.loop.context import StageEnvironment
from lifelong_moe.training.stage import train_stage
from tests.pictures import draw_once

T = TypeVar("T")
USERS = (pipelines.run.run, pipelines.versions.candidates)
MEASURING = (*USERS, pipelines.versions.gate_derived)
_sent: dict[str, list[Any]] = {}
"""What stages that this process trained sent to MLflow, by what they are kept as."""


class KnownStages:
    """Stages of all tests, in a folder that the suite's processes share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def train(
        self, planned: PlannedStage, parent: CommittedStage | None, data: PreparedData, environment: StageEnvironment
    ) -> CommittedStage:
        """As ``train_stage``, but of equal stages the first alone is trained, and the others are copies of it.

        Trained all the same: what goes on from a checkpoint, what is signed, and all that happens while a test has
        replaced something that trains.
        """
        store = environment.store
        is_begun = (environment.work / planned.key[:SHORT]).exists() or store.find(planned.key) is not None
        if is_begun or store.keys != SigningKeys(None, {}) or _is_changed():
            return train_stage(planned, parent, data, environment)
        around = [asdict(one) for one in (environment.trainer, environment.checkpoint, environment.frozen)]
        name = content_key([planned.key, planned.spec.name, repr(around)])
        is_told = environment.run_id is not None
        if (self.folder / name).exists() and (name in _sent or not is_told):
            with _copied(self.folder / name, store.root) as copy:
                copy.rename(store.root / f"{planned.spec.name}-{planned.key[:SHORT]}")
            for points in _sent[name] if is_told else []:
                environment.send(points)
            return store.get(planned.key)
        sent: list[Any] = []

        def send(points: Any) -> None:
            sent.append(points)
            environment.send(points)

        stage = train_stage(planned, parent, data, replace(environment, send=send))
        _sent[name] = sent
        # Another process may have been faster.
        with _copied(stage.path, self.folder) as copy, contextlib.suppress(OSError):
            copy.rename(self.folder / name)
        return stage


class KnownEvaluations(EvaluationStore):
    """Evaluations that are copied from those of other tests, unless a file is there, if only a damaged one."""

    folder: Path

    def find(self, stage_key: str, data_key: str, build: Callable[[Any], T]) -> T | None:
        """As for any store."""
        path = self._path(StoredEvaluation(stage_key, data_key, None))
        if (self.folder / path.name).exists() and not path.exists() and not _is_changed():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / path.name, path)
        return super().find(stage_key, data_key, build)

    def add_together(self, stage_key: str, results: Mapping[str, Mapping[str, Any]]) -> None:
        """One by one, since other tests may ask for some of them only."""
        for data_key, result in results.items():
            self.add(stage_key, data_key, result)

    def add(self, stage_key: str, data_key: str, result: Mapping[str, Any]) -> None:
        """As for any store."""
        super().add(stage_key, data_key, result)
        path = self._path(StoredEvaluation(stage_key, data_key, None))
        if not _is_changed():
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                Path(shutil.copy(path, folder)).replace(self.folder / path.name)


@contextlib.contextmanager
def _copied(directory: Path, into: Path) -> Iterator[Path]:
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into, prefix=".tmp-") as folder:
        yield Path(shutil.copytree(directory, Path(folder, "copy")))


ROOMS = (
    "evaluation",
    "training",
    "model",
    "retention",
    "growth",
    "ops",
    "routing",
    "data",
    "store",
    "storage",
    "clustering",
)
PACKAGES = tuple(f"lifelong_moe.{room}" for room in ROOMS)
_seen: dict[str, list[tuple[Mapping[str, Any], str, Any]]] = {}
"""By module: where a name stands, the name, and what it was when it was first seen."""


def _is_changed() -> bool:
    """Whether a function, method or constant of what trains is another one than when it was first seen."""
    for name in [name for name in sys.modules if name.startswith(PACKAGES) and name not in _seen]:
        _seen[name] = [*_values(sys.modules[name])]
    return any(
        (now := place.get(key)) is not value and not _is_hooked(now, value)
        for values in _seen.values()
        for place, key, value in values
    )


def _is_hooked(now: Any, before: Any) -> bool:
    """Whether torch has wrapped an optimizer's step, as it does for each class once the first of it is made."""
    return getattr(now, "hooked", False) and now.__wrapped__ is before


def _values(module: ModuleType) -> Iterator[tuple[Mapping[str, Any], str, Any]]:
    for key, value in vars(module).items():
        if not key.startswith("__") and (callable(value) or isinstance(value, str | int | float | tuple)):
            yield vars(module), key, value
        if isinstance(value, type) and value.__module__ == module.__name__:
            yield from ((vars(value), k, v) for k, v in vars(value).items() if callable(v))


_is_changed()


def use_known_stages(patch: pytest.MonkeyPatch, factory: pytest.TempPathFactory) -> None:
    """From now on commands train equal stages once, and draw each kind of picture once."""
    draw_once(patch)
    base = factory.getbasetemp()
    known = KnownStages((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "known-stages")
    for module in USERS:
        patch.setattr(module, "train_stage", known.train)
    store = type("KnownEvaluationStore", (KnownEvaluations,), {"folder": known.folder})
    for module in MEASURING:
        patch.setattr(module, "EvaluationStore", store)


def train_all_stages(patch: pytest.MonkeyPatch) -> None:
    """Train again, for tests that compare what was trained twice."""
    for module in USERS:
        patch.setattr(module, "train_stage", train_stage)
    for module in MEASURING:
        patch.setattr(module, "EvaluationStore", EvaluationStore)


@pytest.fixture
def known_stages(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Equal stages are trained once for all tests."""
    use_known_stages(monkeypatch, tmp_path_factory)
