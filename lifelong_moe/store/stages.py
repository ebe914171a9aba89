"""Committed stages: immutable directories of safetensors and JSON, found by key.

A stage stores only the tensors that it changed. All others, frozen experts above all, it *borrows*: its
``config.json`` names the stage that holds each of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from lifelong_moe.errors import CheckpointError, CorruptError
from lifelong_moe.storage.directories import verify_directory, write_directory
from lifelong_moe.storage.keys import SHORT, canonical_json
from lifelong_moe.store.record import StageRecord

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class CommittedStage(StageRecord):
    """A stage on disk whose manifest was verified on opening."""

    path: Path
    metrics: dict[str, Any]
    """Measured in training: tokens, seconds, final losses."""
    weights_hash: str
    """SHA-256 of ``model.safetensors``."""


class StageStore:
    """The stages under ``mlruns/stages/``."""

    def __init__(self, root: Path) -> None:
        self.root = root / "stages"
        # Stages are immutable, so a process verifies each of them once.
        self._open: dict[str, CommittedStage] = {}

    def find(self, key: str) -> CommittedStage | None:
        """The committed stage with this key, verified; None if there is none.

        Raises:
            CorruptError: If it is there but damaged.
        """
        if key in self._open:
            return self._open[key]
        # Directory names end in 16 digits of the key, so the full key inside decides.
        for path in self.root.glob(f"*-{key[:SHORT]}"):
            manifest = verify_directory(path)
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            if config["key"] == key:
                metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
                weights_hash = manifest["files"][WEIGHTS]["sha256"]
                stage = CommittedStage.from_json(config, path=path, metrics=metrics, weights_hash=weights_hash)
                self._open[key] = stage
                return stage
        return None

    def get(self, key: str) -> CommittedStage:
        """Like :meth:`find`, but the stage must exist."""
        stage = self.find(key)
        if stage is None:
            raise CorruptError(f"stage {key[:SHORT]} is referred to, but is not in {self.root}.")
        return stage

    def commit(
        self,
        record: StageRecord,
        metrics: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        tokenizer: str | None = None,
    ) -> CommittedStage:
        """Write a stage atomically.

        Args:
            record: Describes the stage, borrowed tensors included.
            metrics: Plain JSON data.
            tensors: The stage's own tensors by name.
            tokenizer: Text of ``tokenizer.json``; a first stage keeps it for its whole chain.
        """
        from safetensors.torch import save_file  # imports torch, which commands that only list stages do without

        # safetensors stores contiguous tensors only.
        own = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
        files: dict[str, Callable[[Path], object]] = {
            WEIGHTS: lambda path: save_file(own, path),
            "config.json": lambda path: _write_json(path, record.to_json()),
            "metrics.json": lambda path: _write_json(path, metrics),
        }
        if tokenizer is not None:
            files[TOKENIZER] = lambda path: path.write_text(tokenizer, encoding="utf-8")
        # Written aside and renamed: a killed commit leaves no stage.
        write_directory(self.root / f"{record.name}-{record.key[:SHORT]}", files)
        return self.get(record.key)

    def tensors(self, stage: CommittedStage) -> dict[str, Tensor]:
        """All tensors of a stage's model, borrowed ones included."""
        tensors = load_weights(stage.path / WEIGHTS)
        by_holder: dict[str, list[str]] = {}
        for name, key in stage.borrowed.items():
            by_holder.setdefault(key, []).append(name)
        # Each holder's file is read once, however many tensors it lends.
        for key, names in by_holder.items():
            held = load_weights(self.get(key).path / WEIGHTS)
            missing = [name for name in names if name not in held]
            if missing:
                raise CorruptError(f"{self.get(key).path / WEIGHTS}: tensor {missing[0]} is borrowed but missing.")
            tensors.update({name: held[name] for name in names})
        return tensors

    def chain(self, key: str) -> list[CommittedStage]:
        """The stage's ancestors and the stage itself, oldest first."""
        found = [self.get(key)]
        while (parent := found[-1].parent) is not None:
            found.append(self.get(parent))
        return found[::-1]

    def tokenizer(self, stage: CommittedStage) -> str:
        """Text of the ``tokenizer.json`` that a stage was trained with, kept by its oldest ancestor."""
        return (self.chain(stage.key)[0].path / TOKENIZER).read_text(encoding="utf-8")

    def holder(self, stage: CommittedStage, tensor: str) -> str:
        """Key of the stage that stores a tensor of ``stage``'s model."""
        return stage.borrowed.get(tensor, stage.key)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: If the file is absent, damaged or of another kind, such as a pickle.
    """
    from safetensors.torch import load_file

    # A pickle can execute code on loading, so its suffix is refused before anything is read.
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: only .safetensors files are loaded, never {path.suffix or 'others'}.")
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file.") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error}).") from None


def _write_json(path: Path, value: Any) -> None:
    path.write_text(canonical_json(value), encoding="utf-8")
