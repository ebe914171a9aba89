"""A stage as a folder outside of the store names it: its key, the hashes of all that it needs, and where they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.grammars import Key, Sha256
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.storage.plain import from_plain
from lifelong_moe.storage.plain_files import require_plain_files
from lifelong_moe.storage.stored import read_stored
from lifelong_moe.store.stages import CommittedStage, StageStore

POINTER = "pointer.json"
"""The file that holds a :class:`StagePointer`; ``stages/`` and ``signatures/`` beside it are its own store."""
ARTIFACTS = "artifacts"
"""Folder of a store for the artifacts of MLflow, in which such a folder usually is."""


@dataclass(frozen=True, kw_only=True)
class StagePointer:
    """A stage, and what it is made of."""

    stage: Key
    manifests: Mapping[Key, Sha256]
    """Hash of the manifest of each stage that this one needs, itself included: no other bytes are loaded."""
    store: str | None
    """Absolute path of the store that has them; None if they stand beside the pointer."""


def point_to(store: StageStore, key: str, path: Path | None) -> StagePointer:
    """Make a pointer to a stage.

    Args:
        store: Has the stage, and all that it needs, which is verified.
        key: Of the stage.
        path: Of the store, if the pointer names it.
    """
    manifests = {stage.key: store.manifest_hash(stage.key) for stage in store.needs(key)}
    return StagePointer(stage=key, manifests=manifests, store=None if path is None else str(path.absolute()))


def open_pointer(folder: Path) -> tuple[StageStore, CommittedStage]:
    """The stage that a folder's pointer names, and the store that has it; signatures are verified as everywhere.

    A store that was moved is found if the folder has moved with it.

    Raises:
        CorruptError: The pointer is none, or the stages that it names are not there, or are others by now.
    """
    path = folder.absolute() / POINTER
    try:
        pointer = read_stored(path, partial(from_plain, StagePointer))
    except FileNotFoundError:
        raise CorruptError(f"{path}: missing; this is no model of lifelong-moe.") from None
    root = _root_of(folder.absolute(), pointer)
    for part in ("stages", "signatures"):
        require_plain_files(root / part)
    # No note of the store: the pointer says what bytes it has to have, and may come from elsewhere.
    store = StageStore(root, reads_all=True)
    if store.find(pointer.stage) is None:
        raise CorruptError(
            f"{path}: its stage {pointer.stage[:SHORT]} is not in {root}: it was removed there, or the store is "
            f"elsewhere by now. Bring it back."
        )
    for stage in store.needs(pointer.stage):
        if pointer.manifests.get(stage.key) != (found := store.manifest_hash(stage.key)):
            raise CorruptError(f"{stage.path}: its manifest is {found[:SHORT]}, not the one that {path} names.")
    return store, store.get(pointer.stage)


def _root_of(folder: Path, pointer: StagePointer) -> Path:
    if pointer.store is None:
        return folder
    # First the store that holds the folder: the path that the pointer names may be that of a store that moved.
    above = (parent.parent for parent in folder.parents if parent.name == ARTIFACTS)
    return next((root for root in above if any(_stages(root, pointer.stage))), Path(pointer.store))


def _stages(root: Path, key: str) -> list[Path]:
    return list((root / "stages").glob(f"*-{key[:SHORT]}"))
