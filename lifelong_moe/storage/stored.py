"""Read stored JSON, whoever wrote it: a regular file, of bounded size and depth, that says what it should.

Every error is a :class:`CorruptError` of one line that names the file and, where there is one, the field.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.opening import read_bounded
from lifelong_moe.storage.plain import PlainError
from lifelong_moe.storage.plain_files import corrupt_if_irregular

T = TypeVar("T")
MOST_BYTES = 256 << 20
"""Far above any file that we write: the manifest of a batch of three million documents."""
MOST_DEEP = 60
"""Levels of lists and objects; our files have at most ten, the settings within them some more."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path, *, finite: bool = True) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        finite: Whether NaN and infinities, which are not JSON, are refused; we write them in measurements under way.

    Raises:
        FileNotFoundError: If there is none.
        CorruptError: If it is no regular file, too long, or not JSON.
    """
    with corrupt_if_irregular(path):
        data = read_bounded(path, MOST_BYTES, follow=False)
    return parse_json(data, path, finite=finite)


def parse_json(data: bytes, path: Path, *, finite: bool = True) -> Any:
    """Parse what was read of a file; see :func:`read_json`."""
    try:
        text = data.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite) if finite else json.loads(text)
        # Half a surrogate pair is a text that can neither be printed nor written again.
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    # Nested more deeply than the parser goes.
    except RecursionError:
        raise CorruptError(f"{path}: not JSON that we write (nested too deeply).") from None
    except ValueError as error:
        raise CorruptError(f"{path}: not JSON ({error}).") from None
    if _deeper(value, MOST_DEEP):
        raise CorruptError(f"{path}: not JSON that we write (nested too deeply).")
    return value


def read_stored(path: Path, build: Callable[[Any], T]) -> T:
    """Read a JSON file and build what it holds, such as by ``RunHead.from_json``.

    Raises:
        FileNotFoundError: If there is none.
        CorruptError: If it is something else.
    """
    data = read_json(path)
    with naming(path):
        return build(data)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file of what is built within: a :class:`PlainError` becomes a :class:`CorruptError`."""
    try:
        yield
    except (PlainError, CorruptError) as error:
        raise CorruptError(f"{path}: {error}{'' if str(error).endswith('.') else '.'}") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number that we write")


def _finite(number: str) -> float:
    value = float(number)
    # Python reads a number beyond the range of floats, such as 1e999, as an infinity.
    return _refuse(number) if math.isinf(value) else value


def _deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are nested more deeply than this."""
    # Level by level, not by recursion, which would end in the error that this is to prevent.
    level = [value]
    for _ in range(most):
        level = [
            inner
            for one in level
            if isinstance(one, (dict, list))
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True
