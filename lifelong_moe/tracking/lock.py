"""Hold a file's lock, waiting for whoever has it."""

from __future__ import annotations

import fcntl
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOOK_SECONDS = 0.01
"""Between two looks at a lock that another process holds."""


@contextmanager
def waiting_for(path: Path, deadline: float = math.inf) -> Iterator[None]:
    """Hold a lock of the system's, which ends with the process.

    Args:
        path: Lock file; made if absent, never removed. Its directory must exist.
        deadline: Until when to wait for another process, by ``time.monotonic()``.

    Raises:
        TimeoutError: If another process holds it all the while.
    """
    with path.open("a") as file:
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process holds {file.name}") from None
                time.sleep(LOOK_SECONDS)
        yield
