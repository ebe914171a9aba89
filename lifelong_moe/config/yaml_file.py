"""Read a YAML file and apply ``key=value`` overrides; interpolations stay unresolved. Torch-free."""

from __future__ import annotations

import difflib
import errno
import glob
import io
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lifelong_moe.config.references import require_bounded
from lifelong_moe.errors import ConfigError
from lifelong_moe.storage.opening import read_bounded, read_given

# Ten times our largest; a file that is longer was given by mistake, such as one of text.
MAX_CONFIG_BYTES = 1 << 16
MAX_YAML_DEPTH = 32
"""Deepest nesting of a configuration, its keys and its interpolations; ours has five levels."""
KINDS = {
    "run": {"run", "stages", "distributions"},
    "compare": {"compare", "arms"},
    "retrain": {"inbox", "trigger", "drift", "probe", "decision", "gate", "limits", "hooks", "when_growing"},
}
"""By command that a file is for, keys that no other kind of file has."""
MAX_BITS = 63
"""Of a whole number. Python writes longer ones slowly, or not at all."""
DATA = re.compile(r"(stages(\[-?\d+\]|\.-?\d+)|stage_defaults)(\.data|\[data\])")
"""Keys of overrides that say what a stage learns."""


def read_yaml(path: Path, *, is_base: bool = False) -> DictConfig:
    """Read a mapping from a YAML file; a mistake is reported on one line with file and line number.

    Args:
        path: The file, or a pipe; ``-`` is standard input.
        is_base: Whether another file names it, which may come from anybody; then it must be a regular file.
    """
    path = Path("/dev/stdin") if str(path) == "-" else path
    # Not `is_file`, which a pipe such as <(sed …) is not.
    if path.is_dir() or not path.exists():
        names = [p.name for p in path.parent.glob("*.yaml")]
        own = f"{path.name}.yaml"
        near = [own] if own in names else difflib.get_close_matches(path.name, names, n=1)
        # Where ours stand; who types the name of a run means its file.
        there = [path.parent / near[0]] if near else [*Path("configs").glob(f"{glob.escape(path.stem)}.yaml")]
        hint = f" Did you mean {there[0]}?" if there else ""
        raise ConfigError(f"{path}: no such file.{hint}")
    try:
        most = MAX_CONFIG_BYTES
        data = read_bounded(path, most, follow=True) if is_base else read_given(path, most)[0]
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise ConfigError(f"{path}: over {MAX_CONFIG_BYTES:,} bytes; is this a configuration file?") from None
        if error.errno == errno.EINVAL:
            raise ConfigError(f"{path}: is {error.strerror}.") from None
        raise
    try:
        # Some editors begin a file with a byte order mark.
        text = data.decode("utf-8-sig")
        _require_shallow(text)
        loaded = OmegaConf.load(io.StringIO(text))
        _require_short_numbers(OmegaConf.to_container(loaded, resolve=False))
        require_bounded(loaded)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: invalid UTF-8 at byte {error.start}.") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: {error.reason}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        # libyaml itself says only that a character cannot start any token.
        if mark and "\t" in re.match(r"\s*", text.split("\n")[mark.line])[0]:  # type: ignore[index]
            raise ConfigError(f"{where}: indented with a tab; YAML takes spaces only.") from None
        raise ConfigError(f"{where}: {(getattr(error, 'problem', None) or 'not YAML').rstrip('.')}.") from None
    except RecursionError:
        raise ConfigError(f"{path}: too deeply nested.") from None
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded, DictConfig) or not loaded:
        raise ConfigError(f"{path}: must hold a mapping such as run: NAME; it is empty or a list.")
    return loaded


def _require_shallow(text: str) -> None:
    """Reject deep nesting before the tree is built: libyaml's composer overflows the stack and kills the process."""
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        # OmegaConf parses interpolations recursively.
        inner = _depth(event.value) if isinstance(event, yaml.ScalarEvent) and "${" in event.value else 0
        if depth + inner > MAX_YAML_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested over {MAX_YAML_DEPTH} deep", problem_mark=event.start_mark)


def _depth(text: str) -> int:
    """The most brackets that are open at once."""
    levels = accumulate((char in "{[(") - (char in "}])") for char in text)
    return max(levels, default=0)


def _require_short_numbers(value: Any) -> None:
    """Reject whole numbers of more than 63 bits: hexadecimal ones may have any number of digits."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for one in value:
            _require_short_numbers(one)
    elif isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError(f"a whole number of {value.bit_length():,} bits; at most {MAX_BITS} are read")


def require_kind(file: DictConfig, kind: str, path: str) -> None:
    """Refuse a file that is for another command, and name that command.

    Args:
        file: As from :func:`read_yaml`.
        kind: One of :data:`KINDS`.
        path: What messages call the file.

    Raises:
        ConfigError: If its keys are those of another kind alone.
    """
    content: Any = OmegaConf.to_container(file, resolve=False)
    found = {name: sorted(keys & {*content}) for name, keys in KINDS.items() if keys & {*content}}
    if kind in found or not found:
        return
    other, keys = next(iter(found.items()))
    base = content.get("base")
    # The files of both other commands name a run's own file, which may be what was meant.
    names_one = kind == "run" and isinstance(base, str)
    hint = f" A run's own file is its base, {Path(path).parent / base}." if names_one else ""
    raise ConfigError(f"{path}: has {', '.join(keys[:3])}, so it is a file for lifelong-moe {other}.{hint}")


def require_short(overrides: Sequence[str]) -> None:
    """Reject overrides that are together longer than a file may be.

    Raises:
        ConfigError: With both lengths.
    """
    if (length := sum(map(len, overrides))) > MAX_CONFIG_BYTES:
        raise ConfigError(f"overrides have {length:,} characters; at most {MAX_CONFIG_BYTES:,} are read.")


def apply_override(raw: DictConfig, override: str) -> None:
    """Apply an override ``key=value``, whose value is YAML."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} must have the form key=value.")
    if key.count(".") + key.count("[") >= MAX_YAML_DEPTH:
        raise ConfigError(f"override {override!r}: its key is over {MAX_YAML_DEPTH} deep.")
    try:
        # Read by the same composer as a file.
        _require_shallow(value)
        # The node and not its value, so that an interpolation stays unresolved.
        read = OmegaConf.from_dotlist([f"value={value}"])
        _require_short_numbers(OmegaConf.to_container(read, resolve=False))
        parsed = read._get_node("value")
        if (mixture := _mixture_in(key, parsed)) is not None:
            OmegaConf.update(raw, mixture, None, force_add=True)
        # Keys that the file lacks are added; the section rejects those that do not exist.
        OmegaConf.update(raw, key, parsed, force_add=True)
        # Now, since the next override may name what lies behind a reference.
        require_bounded(raw)
    except (OmegaConfBaseException, yaml.YAMLError, AttributeError, IndexError, TypeError, ValueError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"override {override!r} cannot be applied: {text}") from None


def _mixture_in(key: str, value: object) -> str | None:
    """Key of a stage's ``data`` that an override sets: a mixture is one value, of which no old name may remain."""
    if DATA.fullmatch(key):
        return key
    is_stage = DATA.fullmatch(f"{key}.data") is not None
    return f"{key}.data" if is_stage and isinstance(value, DictConfig) and "data" in value else None


def first_key(override: str) -> str:
    """The first part of an override's key: ``stages`` of ``stages[1].tokens=5``."""
    return re.split(r"[.\[=]", override)[0]
