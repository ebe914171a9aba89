"""``model.from``: a configuration that names a checkpoint, completed with what the checkpoint says. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.sections import section
from lifelong_moe.errors import ConfigError
from lifelong_moe.interop.layout.folder import CONFIG, TOKENIZER, Checkpoint, file_entry, read_checkpoint
from lifelong_moe.interop.layout.place import named_folder, note_folder
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
    if "base" in raw:
        raise ConfigError("base stands beside model.from, which fills it in; leave it out.")
    raw = raw.copy()
    written = raw.model._get_node("from")
    path, revision, kept = (raw.model.pop(key, None) for key in ("from", "revision", "store"))
    if not isinstance(path, str):
        raise ConfigError(f"model.from={path} must be the folder of a checkpoint, or its OWNER/NAME on the hub.")
    found = read_checkpoint(named_folder(path, None if revision is None else str(revision)))
    # A reference to the environment stays one: what is stored may hold no secret.
    name = written._value() if written._is_interpolation() else path
    _merge(raw, "model", found.model.to_json(), OWN)
    if (context := section(ModelConfig, raw.model, "model").context) > found.model.context:
        raise ConfigError(f"model.context={context} is above the {found.model.context} of {path}.")
    if found.family.is_mixture:
        routing = found.family.routing()
        _merge(raw, "routing", {"mode": "learned", "top_k": routing.top_k, "renormalize": routing.renormalize}, ())
    raw.tokenizer = _tokenizer(_written(raw, "tokenizer"), found, name if revision is None else None)
    family = found.family
    sha256 = checkpoint_hash(found)
    note_folder(sha256, found.path)
    base: dict[str, Any] = {"path": name} | ({} if revision is None else {"revision": str(revision)})
    base |= {"sha256": sha256} | ({} if kept is None else {"store": kept})
    base |= {"ends": family.ends} if family.ends else {}
    raw.base = base | {"vocab_size": family.vocab_size, "bos_id": family.separator}
    return raw


def _written(raw: DictConfig, name: str) -> Mapping[str, object]:
    """The keys of a section as it is written, what it refers to put in."""
    node = raw.get(name)
    if node is None:
        return {}
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{name} must be a mapping; got {node!r}.")
    plain: Any = OmegaConf.to_container(node, resolve=True)
    return {str(key): value for key, value in plain.items()}


def _merge(raw: DictConfig, name: str, found: Mapping[str, Any], own: tuple[str, ...]) -> None:
    """Fill a section with a checkpoint's values; other values than those are refused, but for the run's own keys."""
    given = _written(raw, name)
    for key, value in given.items():
        if key in found and key not in own and value != found[key]:
            raise ConfigError(f"{name}.{key}={value} differs from model.from, which has {found[key]}; leave it out.")
        if name == "model" and key not in found:
            raise ConfigError(f"model.{key}={value} is nothing that the checkpoint of model.from has; leave it out.")
    raw[name] = {**found, **given}


def _tokenizer(given: Mapping[str, object], found: Checkpoint, name: str | None) -> dict[str, Any]:
    """The tokenizer's section: the checkpoint's own file, unless another one is named.

    Args:
        given: The section as it is written.
        found: The checkpoint.
        name: Its folder as it is written; None if it is in the hub's cache.
    """
    rest = {key: value for key, value in given.items() if key != "from"}
    if given.get("from", "model") != "model":
        raise ConfigError(f"tokenizer.from={given['from']} must be model.")
    if rest.get("file") is not None:
        return rest
    if found.vocabulary is None:
        raise ConfigError(f"model.from={found.path} has no {TOKENIZER}; name one by tokenizer.file.")
    # A token that is not special could stand in a text; `plan` says so.
    begins = found.vocabulary.special.get(found.family.separator)
    bos = {"bos": begins} if begins is not None and rest.get("bos") is None else {}
    return rest | bos | {"file": str(found.path / TOKENIZER if name is None else Path(name) / TOKENIZER)}


def checkpoint_hash(found: Checkpoint) -> str:
    """SHA-256 of a checkpoint: of its configuration and its files of weights, by name; not of where they lie."""
    weights = {name: entry.sha256 for name, entry in found.files().items()}
    return content_key({CONFIG: file_entry(found.path / CONFIG).sha256, **weights})
