"""Operations: what is to be recorded in MLflow, as JSON that can be performed late and more than once.

``do`` is the action, ``run`` the run as its caller knows it, ``time`` the moment at which it was asked for, in
milliseconds since 1970. Each operation is idempotent, and a sequence that is repeated from any point ends in the same
state: a run is created once by its id, a metric keeps its first timestamp and so is the same point, the rest
overwrites.

A spool may come with somebody else's store, so what is read from one is checked: :func:`require_ours`.
"""

from __future__ import annotations

import math
import re
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from lifelong_moe.storage.grammars import NAME
from lifelong_moe.tracking.pages.views import FILTERS
from lifelong_moe.tracking.spool import Operation, RefusedError

MODEL_PREFIX = "lifelong-moe."
"""Begins the names of our registered models; that of the run follows."""
ALIASES = ("champion", "candidate")
"""Aliases of registered versions that we move."""
LOCAL_PREFIX = "local-"
"""Begins the ids that we give to runs; MLflow's own are plain hexadecimal."""


def local_id() -> str:
    """Make an id for a run before MLflow has one; :class:`lifelong_moe.tracking.store.Store` finds the run by it."""
    return LOCAL_PREFIX + uuid.uuid4().hex


def operation(do: str, run: str, **fields: Any) -> Operation:
    """Make an operation with the current time.

    Args:
        do: Action of :meth:`lifelong_moe.tracking.store.Store.perform`.
        run: MLflow's id of the run, or a local one.
        **fields: Arguments of the action; must be JSON.
    """
    # Delivered late or twice, a metric must keep the time of its measurement: then it is the same point.
    return {"do": do, "run": run, "time": time.time_ns() // 1_000_000, **fields}


def require_ours(asked: Any) -> None:
    """Require that an operation is one that we make: its fields, and what they may name.

    Args:
        asked: Any JSON data.

    Raises:
        RefusedError: Naming the field that is not.
    """
    fields = _FIELDS.get(str(asked.get("do"))) if isinstance(asked, dict) else None
    if fields is None:
        raise RefusedError("the record is no operation that is known.")
    for name, is_fit in (_OF_ALL | fields).items():
        if name not in asked or not is_fit(asked[name]):
            raise RefusedError(f"the record's {name} is none that lifelong-moe writes.")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_text, value.values()))


def _is_run(value: Any) -> bool:
    """Whether it is an id of MLflow's or of ours."""
    return isinstance(value, str) and re.fullmatch(rf"(?:{LOCAL_PREFIX})?[0-9a-f]{{32}}", value) is not None


def _are_rows(value: Any) -> bool:
    """Whether they are points of metrics: name, value, step."""

    def is_row(row: Any) -> bool:
        if not isinstance(row, list) or [type(one) for one in row] not in ([str, float, int], [str, int, int]):
            return False
        return math.isfinite(row[1]) and abs(row[2]) < 1 << 63

    return isinstance(value, list) and all(map(is_row, value))


def _is_path(value: Any) -> bool:
    """Whether it is a path below a run's artifacts."""
    if not isinstance(value, str) or not value or not value.isprintable() or "\\" in value:
        return False
    path = PurePosixPath(value)
    return not path.is_absolute() and ".." not in path.parts and bool(path.name)


def _is_model(value: Any) -> bool:
    # Another one of the user's models must not get a version, nor an alias move to it.
    return isinstance(value, str) and value.startswith(MODEL_PREFIX) and NAME.allows(value.removeprefix(MODEL_PREFIX))


def _are_tags_of_version(value: Any) -> bool:
    # The key becomes part of a filter expression, where a quote would end it.
    return _are_texts(value) and re.fullmatch(r"[\w-]{1,64}", value.get("stage_key", "")) is not None


Check = Callable[[Any], bool]
_OF_ALL: dict[str, Check] = {"run": _is_run, "time": lambda value: type(value) is int and 0 <= value < 1 << 53}
_FIELDS: dict[str, dict[str, Check]] = {
    "start": {
        "experiment": _is_text,
        "name": _is_text,
        "parent": lambda value: value is None or _is_run(value),
        "params": _are_texts,
        "tags": _are_texts,
    },
    "metrics": {"rows": _are_rows},
    "dataset": {
        "name": _is_text,
        "digest": _is_text,
        "context": _is_text,
        "source": lambda value: True,
        "profile": lambda value: isinstance(value, Mapping),
    },
    "artifact": {"path": _is_path},
    "tag": {"key": _is_text, "value": _is_text},
    "view": {"tag": lambda value: value in FILTERS, "name": lambda value: _is_text(value) and NAME.allows(value)},
    "version": {
        "name": _is_model,
        "alias": lambda value: value is None or value in ALIASES,
        "tags": _are_tags_of_version,
        "description": _is_text,
    },
    "unalias": {"name": _is_model, "alias": lambda value: value in ALIASES, "tags": _are_tags_of_version},
    "finish": {"status": lambda value: value in ("FINISHED", "FAILED", "KILLED")},
    "replaced": {"by": _is_run},
}
"""By action, the fields that it needs, each with what it may be."""
