"""Build dataclasses from plain JSON data: the inverse of ``dataclasses.asdict``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from enum import StrEnum
from functools import partial
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_plain(kind: type[T], data: Mapping[str, Any]) -> T:
    """Build a dataclass, and the dataclasses, enumerations, tuples and mappings within it.

    Args:
        kind: The dataclass.
        data: Values by field name; absent fields get their defaults.

    Raises:
        TypeError: If a field without a default is absent, or a name is no field.
    """
    hints = get_type_hints(kind)
    # Names without a hint pass through, so that the dataclass itself rejects them.
    return kind(**{name: _built(hints.get(name, Any), value) for name, value in data.items()})


def _built(hint: Any, value: Any) -> Any:
    if isinstance(hint, UnionType):
        if value is None:
            return None
        # The first alternative decides; in `int | list[int]` either value is plain data and passes unchanged.
        hint = next(one for one in get_args(hint) if one is not NoneType)
    if get_origin(hint) is tuple:
        *items, last = get_args(hint)
        items = items * len(value) if last is Ellipsis else [*items, last]
        return tuple(map(_built, items, value))
    if get_origin(hint) in (dict, Mapping):
        return {name: _built(get_args(hint)[1], one) for name, one in value.items()}
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return hint(value)
    if isinstance(hint, type) and is_dataclass(hint) and not is_dataclass(value):
        # A dataclass that earlier versions wrote in another form reads that form itself.
        read = getattr(hint, "from_json", partial(from_plain, hint))
        return read(value)
    return value
