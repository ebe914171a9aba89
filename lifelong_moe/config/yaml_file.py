"""A YAML file and ``key=value`` overrides, as unresolved nodes. Torch-free."""

from __future__ import annotations

import difflib
import io
import re
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lifelong_moe.errors import ConfigError

MAX_CONFIG_BYTES = 1 << 16
MAX_YAML_DEPTH = 32
"""Deepest nesting of a configuration; ours has five levels."""


def read_yaml(path: Path) -> DictConfig:
    """Read a YAML file, or a pipe, that holds a mapping; a mistake costs one line with file and line number."""
    path = Path("/dev/stdin") if str(path) == "-" else path
    if path.is_dir() or not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such file.{hint}")
    with path.open("rb") as file:
        data = file.read(MAX_CONFIG_BYTES + 1)  # one more tells that it is too long; a file may be endless
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: over {MAX_CONFIG_BYTES:,} bytes; is this a configuration file?")
    try:
        text = data.decode("utf-8-sig")
        _require_shallow(text)
        loaded = OmegaConf.load(io.StringIO(text))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: invalid UTF-8 at byte {error.start}.") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: {error.reason}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        if mark and "\t" in re.match(r"\s*", text.split("\n")[mark.line])[0]:  # type: ignore[index]
            raise ConfigError(f"{where}: indented with a tab; YAML takes spaces only.") from None
        raise ConfigError(f"{where}: {(getattr(error, 'problem', None) or 'not YAML').rstrip('.')}.") from None
    except (OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0] if str(error) else 'too deeply nested'}") from None
    if not isinstance(loaded, DictConfig) or not loaded:
        raise ConfigError(f"{path}: must hold a mapping such as run: NAME; it is empty or a list.")
    return loaded


def _require_shallow(text: str) -> None:
    """Refuse deep nesting before the tree is built: libyaml's composer overflows the stack and kills the process."""
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested over {MAX_YAML_DEPTH} deep", problem_mark=event.start_mark)


def apply_override(raw: DictConfig, override: str) -> None:
    """Set what ``key=value`` says, the value being YAML."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} must have the form key=value.")
    try:
        _require_shallow(value)
        parsed = OmegaConf.from_dotlist([f"value={value}"])._get_node("value")
        OmegaConf.update(raw, key, parsed, force_add=True)
    except (OmegaConfBaseException, yaml.YAMLError, AttributeError, IndexError, TypeError, ValueError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"override {override!r} cannot be applied: {text}") from None


def first_key(override: str) -> str:
    """``stages`` of ``stages[1].tokens=5``."""
    return re.split(r"[.\[=]", override)[0]
