"""Operations: what is to be recorded in MLflow, as JSON that can be performed late and more than once.

``do`` is the action, ``run`` the run as its caller knows it, ``time`` the moment at which it was asked for, in
milliseconds since 1970. Each operation is idempotent, and a sequence that is repeated from any point ends in the same
state: a run is created once by its id, a metric keeps its first timestamp and so is the same point, the rest
overwrites.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from lifelong_moe.tracking.spool import Operation

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
