"""Where a checkpoint is: a folder, or a commit of a model on the hub, which is a folder of its cache. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lifelong_moe.config.data import COMMIT, HUB_ID, BaseConfig
from lifelong_moe.data.text.snapshot import snapshot
from lifelong_moe.data.text.sources import lies_within
from lifelong_moe.errors import CheckpointError, ConfigError
from lifelong_moe.interop.layout.folder import CONFIG, INDEX, TOKENIZER, WEIGHTS, files_of_index
from lifelong_moe.interop.layout.kept import CARD, OUT

FOLDERS = "LIFELONG_MOE_CHECKPOINTS"
"""Environment variable: folders of checkpoints that stages may refer to, separated as in ``PATH``."""
# Of the process and not of a call: stages are opened in many places.
_named: dict[str, Path] = {}
_SMALL = (CONFIG, INDEX, TOKENIZER, CARD, *OUT)


def named_folder(name: str, revision: str | None) -> Path:
    """The folder that ``model.from`` names, fetched from the hub if it is a model there.

    Args:
        name: A folder, or ``OWNER/NAME``.
        revision: ``model.revision``: a commit of the hub's model.

    Raises:
        ConfigError: Both are there, or neither can be meant.
        CheckpointError: There is no such folder.
        LifelongError: The hub's model cannot be had; see :func:`~lifelong_moe.data.text.snapshot.snapshot`.
    """
    path = Path(name)
    if path.exists():
        if revision is not None:
            raise ConfigError(
                f"model.from={name} is a folder here, and model.revision={revision} is of a model on the hub. Leave "
                f"model.revision out for the folder; elsewhere, or once it is moved away, the name is the hub's."
            )
        return path
    if not HUB_ID.fullmatch(name):
        if revision is not None:
            raise ConfigError(f"model.from={name} is not OWNER/NAME of a model on the hub; leave model.revision out.")
        return path  # whoever reads it says that there is none
    if revision is None:
        raise CheckpointError(
            f"model.from={name}: no such folder; a model of the hub needs model.revision=<commit, 40 hex digits>."
        )
    if not COMMIT.fullmatch(revision):
        # A branch or a tag may move, and the model that a run begins with must not.
        raise ConfigError(f"model.revision={revision} must be a commit of {name}: 40 hexadecimal digits.")
    return _snapshot(name, revision, asks=True)


def folder_of(base: BaseConfig) -> Path:
    """The folder of a run's checkpoint; of the hub only what its cache holds, whoever wrote the configuration.

    Raises:
        DataError: The hub's model is not in the cache.
    """
    assert base.path is not None
    return Path(base.path) if base.revision is None else _snapshot(base.path, base.revision, asks=False)


def note_folder(sha256: str, folder: Path) -> None:
    """Remember where a checkpoint is that the user of this command has named in a configuration."""
    _named[sha256] = folder


def referred_folder(sha256: str, base: BaseConfig, sizes: Mapping[str, int]) -> Path:
    """The folder of a checkpoint to whose files a stage refers, whoever made the stage.

    One that the user names, by the configuration of this command or by :data:`FOLDERS`; else the one that the stage
    names, if it lies below the working directory or in the hub's cache.

    Args:
        sha256: Of the checkpoint, as ``base.sha256``.
        base: What the stage says of its place.
        sizes: Bytes of its files by name.

    Raises:
        CheckpointError: There is none; says how to name it.
        DataError: It is of the hub, and not in its cache.
    """
    given = [Path(one) for one in os.environ.get(FOLDERS, "").split(os.pathsep) if one]
    for folder in [*filter(None, [_named.get(sha256)]), *given]:
        if all(_size(folder / name) == size for name, size in sizes.items()):
            return folder
    if base.revision is None and not lies_within(Path(str(base.path)), [Path.cwd()]):
        problem = f"lies outside of {Path.cwd()}, and what a store names elsewhere is not opened"
    elif (folder := folder_of(base)).is_dir():
        return folder
    else:
        problem = "is not there any more"
    raise CheckpointError(
        f"model.from={base.path}, to whose files the model refers (model.store=reference), {problem}. Name the folder "
        f"that holds them now: {FOLDERS}=FOLDER."
    )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _snapshot(name: str, revision: str, *, asks: bool) -> Path:
    return snapshot(name, revision, _SMALL, _weights, asks=asks)


def _weights(folder: Path) -> list[str]:
    return sorted(set(files_of_index(folder).values())) if (folder / INDEX).exists() else [WEIGHTS]
