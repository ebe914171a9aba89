"""``model.from``: a configuration that names a checkpoint, completed with what the checkpoint says. Torch-free."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lifelong_moe.errors import ConfigError
from lifelong_moe.interop.layout.folder import CONFIG, TOKENIZER, Checkpoint, opened, read_checkpoint
from lifelong_moe.interop.layout.place import named_folder
from lifelong_moe.storage.keys import content_key

OWN = ("context", "document_mask")
"""Keys of ``model`` that are the run's own also beside a checkpoint."""


def with_checkpoint(raw: DictConfig) -> DictConfig:
    """Replace ``model.from`` by the keys of ``model``, ``routing``, ``tokenizer`` and ``base`` that it stands for.

    Args:
        raw: A configuration that is not validated yet; left unchanged.

    Raises:
        ConfigError: A key says something else than the checkpoint.
        CheckpointError: The folder holds no checkpoint that we can read.
    """
    model = raw.get("model")
    if not isinstance(model, DictConfig) or "from" not in model:
        return raw
    raw = raw.copy()
    path, revision = raw.model.pop("from"), raw.model.pop("revision", None)
    if not isinstance(path, str):
        raise ConfigError(f"model.from={path} must be the folder of a checkpoint, or its OWNER/NAME on the hub.")
    found = read_checkpoint(named_folder(path, None if revision is None else str(revision)))
    _merge(raw, "model", found.model.to_json(), OWN)
    if raw.model.context > found.model.context:
        raise ConfigError(f"model.context={raw.model.context} is above the {found.model.context} of {path}.")
    if found.family.is_mixture:
        routing = found.family.routing()
        _merge(raw, "routing", {"mode": "learned", "top_k": routing.top_k, "renormalize": routing.renormalize}, ())
    raw.tokenizer = _tokenizer(raw.get("tokenizer") or {}, found)
    family = found.family
    raw.base = {"path": path} | ({} if revision is None else {"revision": str(revision)})
    raw.base |= {"sha256": checkpoint_hash(found)}
    raw.base |= {"vocab_size": family.vocab_size, "bos_id": family.separator}
    return raw


def _merge(raw: DictConfig, section: str, found: Mapping[str, Any], own: tuple[str, ...]) -> None:
    """Fill a section with a checkpoint's values; other values than those are refused, but for the run's own keys."""
    plain: Any = OmegaConf.to_container(raw.get(section) or OmegaConf.create({}), resolve=True)
    given = {str(key): value for key, value in plain.items()}
    for key, value in given.items():
        if key in found and key not in own and value != found[key]:
            raise ConfigError(f"{section}.{key}={value} differs from model.from, which has {found[key]}; leave it out.")
        if section == "model" and key not in found:
            raise ConfigError(f"model.{key}={value} is nothing that the checkpoint of model.from has; leave it out.")
    raw[section] = {**found, **given}


def _tokenizer(given: Any, found: Checkpoint) -> dict[str, Any]:
    """The tokenizer's section: the checkpoint's own file, unless another one is named."""
    rest = {str(key): value for key, value in given.items() if key != "from"}
    if given.get("from", "model") != "model":
        raise ConfigError(f"tokenizer.from={given['from']} must be model.")
    if rest.get("file") is not None:
        return rest
    if found.vocabulary is None:
        raise ConfigError(f"model.from={found.path} has no {TOKENIZER}; name one by tokenizer.file.")
    return rest | {"file": str(found.path / TOKENIZER)}


def checkpoint_hash(found: Checkpoint) -> str:
    """SHA-256 of a checkpoint: of its configuration and its files of weights, by name; not of where they lie."""
    weights = sorted({extent.path for _, extent in found.tensors})
    return content_key({path.name: _sha256(path) for path in (found.path / CONFIG, *weights)})


def _sha256(path: Path) -> str:
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
