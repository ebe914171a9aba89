"""Merge a YAML node over a section's dataclass; every error names the full path of its key. Torch-free."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.config.names import require_known
from lifelong_moe.config.routing.modes import ROUTERS, keys_of
from lifelong_moe.config.routing.switching import structured
from lifelong_moe.config.run import RunConfig, StageConfig
from lifelong_moe.errors import ConfigError

T = TypeVar("T")
_WORDS = (
    (re.compile(r"Key (.+) not in '\w+'"), r"there is no key \1"),
    (re.compile(r"[\w ]+: \w+ is not a subclass of \w+\. value: (.*)"), r"must be a mapping; got \1"),
    (re.compile(r"Incompatible value 'None' for field of type '.+'|field '.+' is not Optional"), "must not be null"),
    (re.compile(r"'ListConfig'"), "'list'"),
    (re.compile(r"'DictConfig'"), "'mapping'"),
)
"""What OmegaConf says in the names of classes, and how we say it."""
MOST_REMEMBERED, MOST_SUGGESTED = 1_000, 3
_REMEMBERED: dict[tuple[Callable[[DictConfig], object], type, str], Any] = {}


def sections_of(cls: type) -> dict[str, type]:
    """The optional sections of a configuration, by name: fields whose default is a dataclass."""
    return {f.name: f.default_factory for f in dataclasses.fields(cls) if dataclasses.is_dataclass(f.default_factory)}  # type: ignore[misc]


def keys_below(cls: type, prefix: str = "") -> Iterator[str]:
    """Full names of all keys of a dataclass and of the sections within it."""
    inner = sections_of(cls)
    for field in dataclasses.fields(cls):
        yield f"{prefix}{field.name}"
        if field.name in inner:
            yield from keys_below(inner[field.name], f"{prefix}{field.name}.")


@functools.cache
def run_keys() -> frozenset[str]:
    """Full names of all keys that a run's file can have; those of a stage stand under ``stage_defaults``."""
    # `base` is filled in by us.
    own = {key for key in keys_below(RunConfig) if not key.startswith("base")} | {"stage_defaults"}
    routing = {f"routing.{key}" for mode in ROUTERS for key in keys_of(mode)}
    stage, source = keys_below(StageConfig, "stage_defaults."), keys_below(SourceConfig, "distributions.NAME.")
    return frozenset({*own, *routing, *stage, *source})


ELSEWHERE = {
    "learning_rate": "lr",
    "batch_size": "batch_tokens",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "num_local_experts": "experts",
    "num_experts_per_tok": "top_k",
    "max_position_embeddings": "context",
}
"""Our word for what the configurations of transformers and Lightning call otherwise."""


def suggestion(key: str, more: Collection[str] = (), *, whole: bool = False) -> str:
    """A question that names keys in other sections which end as an unknown one does; empty if there are none.

    Args:
        key: Its full name, such as ``optim.lr`` or ``stages[0].lr``.
        more: Keys that the file can have besides those of a run.
        whole: Whether all of it must be such an end, and not just its last parts.
    """
    stage = re.match(r"(stages\[\d+\]|stage_defaults)\.", key)
    where = stage[1] if stage else "stage_defaults"
    parts = key[stage.end() :].split(".") if stage else key.split(".")
    parts[-1] = ELSEWHERE.get(parts[-1], parts[-1])
    for start in range(1 if whole else len(parts)):
        end = ".".join(parts[start:])
        found = [known for known in (*run_keys(), *more) if f".{known}".endswith(f".{end}")]
        # Who writes in a stage means the stage.
        found = [known for known in found if stage and known.startswith("stage_defaults.")] or found
        if found:
            near = sorted(found, key=lambda known: (known.count("."), known))[:MOST_SUGGESTED]
            *others, last = [known.replace("stage_defaults", where) for known in near]
            return f" Did you mean {', '.join(others)}{' or ' if others else ''}{last}?"
    return ""


def require_key(key: str, known: Collection[str], more: Collection[str] = ()) -> None:
    """Require that a file can have the section in which a key stands.

    Args:
        key: Its full name, as far as it is known.
        known: Names of the file's sections.
        more: See :func:`suggestion`.

    Raises:
        ConfigError: With the key's place in another section if there is one, else with the nearest section.
    """
    first = re.split(r"[.\[]", key)[0]
    if first in known:
        return
    if hint := suggestion(key, more, whole=True):
        raise ConfigError(f"key {first} is unknown.{hint}")
    try:
        require_known(first, known, "key")
    except ConfigError as error:
        hint = suggestion(key, more)
        # A section that is spelt alike is likelier than a key elsewhere that has the same name.
        if not hint or "Did you mean" in str(error):
            raise
        raise ConfigError(f"key {first} is unknown.{hint}") from None


def section(cls: type[T], node: Any, path: str, under: DictConfig | None = None) -> T:
    """Merge a node over its dataclass and build it; every error carries the full path."""
    if node is None:
        node = OmegaConf.create({})
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{path} must be a mapping; got {node!r}.")
    with errors_under(path):
        parts = [under, node] if under else [node]
        return _merged(OmegaConf.to_object, cls, *parts)


def require_fit(cls: type, node: DictConfig, path: str) -> None:
    """Require that a node could be merged over a dataclass, which may still need other keys.

    Raises:
        ConfigError: With the full key.
    """
    with errors_under(path):
        _merged(bool, cls, node)


def _merged(make: Callable[[DictConfig], object], cls: type, *parts: DictConfig) -> Any:
    """Merge nodes over a dataclass, later ones over earlier ones, and make something of the result."""
    # A merge takes milliseconds, and a tick of retraining reads the same sections dozens of times. What is written
    # decides the result, unless it refers to something else; the caller gets a copy, which it may change.
    text = repr([OmegaConf.to_container(part, resolve=False) for part in parts])
    key = (make, cls, text)
    if key in _REMEMBERED:
        return copy.deepcopy(_REMEMBERED[key])
    # The dataclass comes first, so that OmegaConf rejects keys that it lacks.
    made = make(OmegaConf.merge(structured(cls), *parts))  # type: ignore[arg-type]
    if "${" not in text and "???" not in text:
        if len(_REMEMBERED) >= MOST_REMEMBERED:
            _REMEMBERED.clear()
        _REMEMBERED[key] = copy.deepcopy(made)
    return made


def require_finite(value: Any, path: str) -> None:
    """Reject numbers that are not finite, anywhere in a configuration.

    Raises:
        ConfigError: With the full key.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}={value} must be finite.")
    for key, child in _children(value):
        require_finite(child, f"{path}{key}" if key.startswith("[") or not path else f"{path}.{key}")


def _children(value: Any) -> list[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, dict):
        return [(str(k), v) for k, v in value.items()]
    if isinstance(value, list):
        return [(f"[{i}]", v) for i, v in enumerate(value)]
    return []


class errors_under:  # noqa: N801 - a context manager, named like the statement it forms
    """Turn OmegaConf's errors, and ours without a full path, into a one-line ConfigError under ``path``."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OmegaConfBaseException):
            key = getattr(error, "full_key", None) or ""
            missing = isinstance(error, MissingMandatoryValue)
            # OmegaConf's first line says what is wrong; the next ones name its own types.
            lines = ["is required."] if missing else str(getattr(error, "msg", None) or error).splitlines()
            extra = re.compile(r"\s*(full_key|object_type|reference_type)")
            text = " ".join(line.strip() for line in lines if not extra.match(line))
            for theirs, ours in _WORDS:
                text = theirs.sub(ours, text)
            dot = "." if self.path and key and not str(key).startswith("[") else ""
            where = f"{self.path}{dot}{key}" or "config"
            # OmegaConf asks for a key of the same section that is spelt alike.
            if isinstance(error, ConfigKeyError) and "Did you mean" not in text:
                text += "." + hint if (hint := suggestion(where)) else ""
            raise ConfigError(f"{where}: {text}") from None
        if isinstance(error, ConfigError):
            text = str(error)
            # A message that begins with its section's name has the whole path already.
            last = self.path.split(".")[-1]
            if not self.path or text.startswith(f"{last}."):
                raise error
            # `key=value …` continues the path; any other sentence follows it.
            joint = "." if re.match(r"[a-z_0-9.]+=", text) else ": "
            raise ConfigError(f"{self.path}{joint}{text}") from None
