"""Where a checkpoint is: a folder, or a commit of a model on the hub, which is a folder of its cache. Torch-free."""

from __future__ import annotations

from pathlib import Path

from lifelong_moe.config.data import COMMIT, HUB_ID, BaseConfig
from lifelong_moe.data.text.snapshot import snapshot
from lifelong_moe.errors import CheckpointError, ConfigError
from lifelong_moe.interop.layout.folder import CONFIG, INDEX, TOKENIZER, WEIGHTS, files_of_index
from lifelong_moe.interop.layout.kept import CARD, OUT

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


def _snapshot(name: str, revision: str, *, asks: bool) -> Path:
    return snapshot(name, revision, _SMALL, _weights, asks=asks)


def _weights(folder: Path) -> list[str]:
    return sorted(set(files_of_index(folder).values())) if (folder / INDEX).exists() else [WEIGHTS]
