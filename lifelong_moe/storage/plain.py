"""Build dataclasses from plain JSON data: the inverse of ``dataclasses.asdict``.

Whoever wrote a stored file, its values have the types and the grammars of the fields that they fill, or it is refused.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from lifelong_moe.errors import LifelongError
from lifelong_moe.redaction import redacted
from lifelong_moe.storage.grammars import Grammar

T = TypeVar("T")
MOST = 1 << 63
"""Numbers of 64 bits and below: what we write, and what NumPy and PyTorch can hold."""


class PlainError(ValueError):
    """Plain data is not what it should be. The message begins with the path of the field, once it is known."""

    def __init__(self, reason: str, path: str = "") -> None:
        self.reason, self.path = reason, path
        super().__init__(f"{path.removeprefix('.')}: {reason}" if path else reason)

    def within(self, step: str) -> PlainError:
        """The same error, seen from one level further out; ``step`` is ``.field`` or ``[index]``."""
        return PlainError(self.reason, step + self.path)


def from_plain(kind: type[T], data: object) -> T:
    """Build a dataclass, and the dataclasses, enumerations, tuples and mappings within it.

    Args:
        kind: The dataclass.
        data: Values by field name; absent fields get their defaults.

    Raises:
        PlainError: If ``data`` is no mapping, a field without a default is absent, a name is no field, or a value
            has another type or grammar than its field; names the field, such as ``versions[2].stages[0].key``.
    """
    hints, values = _hints(cast(Hashable, kind)), _mapping(data)
    for name in values:
        if name not in hints:
            raise PlainError("no such field", f".{name}")
    for one in fields(kind):  # type: ignore[arg-type]
        if one.init and one.name not in values and one.default is MISSING and one.default_factory is MISSING:
            raise PlainError("missing", f".{one.name}")
    built = {name: _under(f".{name}", hints[name], value) for name, value in values.items()}
    try:
        return kind(**built)
    # A section's own rules, such as that a number must be positive.
    except LifelongError as error:
        raise PlainError(str(error)) from None


def require_same(field: str, within: str, of_the_file: str) -> None:
    """Require that what a file says of itself is what it, or its folder, is called.

    Raises:
        PlainError: If the two differ.
    """
    if within != of_the_file:
        raise PlainError(f"{reprlib.repr(within)}, but it is stored as {of_the_file}", f".{field}")


@cache
def _hints(kind: Any) -> Mapping[str, Any]:
    """Types of a dataclass's fields, grammars included."""
    hints = get_type_hints(kind, include_extras=True)
    return {one.name: hints[one.name] for one in fields(kind) if one.init}


def _mapping(data: object) -> Mapping[str, Any]:
    if not isinstance(data, Mapping) or not all(isinstance(name, str) for name in data):
        raise _wrong("an object with named fields", data)
    return data


def _under(step: str, hint: Any, value: Any) -> Any:
    """Build a value that stands at ``step`` of what is being built."""
    try:
        return _built(hint, value)
    except PlainError as error:
        raise error.within(step) from None


def _built(hint: Any, value: Any) -> Any:
    origin = get_origin(hint)
    if origin is Annotated:
        return _in_grammar(hint, value)
    if origin in (Union, UnionType):
        return _one_of(get_args(hint), value)
    if origin is Literal:
        if not any(type(value) is type(one) and value == one for one in get_args(hint)):
            raise _wrong(_choice(get_args(hint)), value)
        return value
    if origin is tuple:
        return _tuple(get_args(hint), value)
    if origin in (list, Sequence):
        return [_under(f"[{i}]", get_args(hint)[0], one) for i, one in enumerate(_items(value))]
    if origin in (dict, Mapping):
        key, kind = get_args(hint)
        return _table(key, kind, _mapping(value))
    return _plain(hint, value)


def _in_grammar(hint: Any, value: Any) -> Any:
    kind, *grammars = get_args(hint)
    built = _built(kind, value)
    for grammar in grammars:
        if isinstance(grammar, Grammar) and not grammar.allows(built):
            raise _wrong(grammar.words, value)
    return built


def _one_of(hints: Sequence[Any], value: Any) -> Any:
    """Build the first alternative that the value fits."""
    others = [one for one in hints if one is not NoneType]
    if value is None and len(others) < len(hints):
        return None
    for hint in others[:-1]:
        try:
            return _built(hint, value)
        except PlainError:
            continue
    return _built(others[-1], value)


def _tuple(hints: Sequence[Any], value: Any) -> tuple[Any, ...]:
    values = _items(value)
    if hints[-1] is Ellipsis:
        hints = [hints[0]] * len(values)
    elif len(values) != len(hints):
        raise _wrong(f"a list of {len(hints)}", value)
    return tuple(_under(f"[{i}]", hint, one) for i, (hint, one) in enumerate(zip(hints, values, strict=True)))


def _items(value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise _wrong("a list", value)
    return value


def _table(key: Any, hint: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    return {_under(f".{name}", key, name): _under(f".{name}", hint, one) for name, one in values.items()}


def _plain(hint: Any, value: Any) -> Any:
    """Build what stands for itself: a number, a text, a value of an enumeration, a dataclass."""
    if hint in (Any, object):
        return value
    if hint is float:
        return _number(value)
    # In Python a boolean is an integer; in JSON it is not.
    if isinstance(value, bool) and hint is not bool:
        raise _wrong(_words(hint), value)
    if hint is int and isinstance(value, int) and not -MOST <= value < MOST:
        raise _wrong("a number of at most 64 bits", value)
    if is_typeddict(hint):
        return _typed_dict(hint, _mapping(value))
    # Built before, such as a routing section, whose class depends on its mode.
    if isinstance(value, hint):
        return value
    if issubclass(hint, StrEnum):
        if not isinstance(value, str) or value not in list(hint):
            raise _wrong(_choice(hint), value)
        return hint(value)
    if is_dataclass(hint):
        # A dataclass that earlier versions wrote in another form reads that form itself.
        read = getattr(hint, "from_json", None)
        return from_plain(cast(type, hint), value) if read is None else read(_mapping(value))
    raise _wrong(_words(hint), value)


def _number(value: Any) -> float:
    # An integer stays one: what is read is written again as it was.
    whole = isinstance(value, int) and not isinstance(value, bool) and -MOST <= value < MOST
    if not whole and not (isinstance(value, float) and math.isfinite(value)):
        raise _wrong("a finite number", value)
    return value


def _typed_dict(hint: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(hint, include_extras=True)
    for name in hints.keys() ^ values.keys():
        raise PlainError("missing" if name in hints else "no such field", f".{name}")
    return {name: _under(f".{name}", hints[name], value) for name, value in values.items()}


def _words(hint: Any) -> str:
    words = {int: "a whole number", str: "a text", bool: "true or false", NoneType: "null"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _choice(values: Iterable[Any]) -> str:
    named = [_as_json(one) or str(one) for one in values]
    return named[0] if len(named) == 1 else f"one of {', '.join(named)}"


def _as_json(value: Any) -> str | None:
    """What a file calls otherwise than Python: ``null``, ``true`` and ``false``."""
    return json.dumps(value) if value is None or isinstance(value, bool) else None


def _wrong(words: str, value: Any) -> PlainError:
    # Shortened: a hostile file may hold anything, of any size.
    return PlainError(f"must be {words}, not {_as_json(value) or reprlib.repr(redacted(value))}")
