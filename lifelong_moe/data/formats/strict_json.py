"""Parse a user's JSON strictly: reject what Python accepts beyond the standard, and what would take long."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lifelong_moe.errors import DataError
from lifelong_moe.redaction import shortened

_MAX_DIGITS = 1000
"""Longer integers are quadratic to read, and no document needs one."""


class _RefusedError(ValueError):
    """Valid for Python's reader, but not for ours; holds the reason."""


def parse_object(text: str, path: Path, line: int = 1) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        text: The JSON.
        path: File that it stands in, for messages.
        line: Line of the file at which it begins, from 1.

    Raises:
        DataError: ``file:line: reason``.
    """
    where = f"{path}:{line}"
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        raise DataError(f"{place}: malformed JSON at column {error.colno}: {error.msg.removesuffix(' at')}.") from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON is nested too deeply.") from error
    except _RefusedError as error:
        raise DataError(f"{where}: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be one JSON object; got a {type(value).__name__}.")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedError(f"key {shortened(key, 80)!a} occurs twice; the last would silently win.")
            seen.add(key)
    return row


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _RefusedError(f"integer of {len(digits)} digits; at most {_MAX_DIGITS} are read.")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    # 1e999 is valid JSON and reads as infinity, which no canonical JSON can hold.
    if not math.isfinite(value):
        raise _RefusedError(f"number {shortened(digits, 40)} is not finite.")
    return value


def _constant(name: str) -> float:
    raise _RefusedError(f"{name} is not JSON.")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_without_duplicates, parse_int=_integer, parse_float=_number, parse_constant=_constant
)
