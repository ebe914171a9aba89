"""Import Lightning only when something is trained, and change nothing of how this process logs by that."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing_lightning() -> Iterator[None]:
    """Context for its first import, after a command has set up logging."""
    root, ours = logging.getLogger(), [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    handlers, levels = root.handlers[:], [log.level for log in ours]
    # Where the root logger has a handler, Lightning sets up none of its own and hands its messages on to two others.
    root.handlers = []
    try:
        yield
    finally:
        root.handlers = handlers
        for log, level in zip(ours, levels, strict=True):
            # Its import asks for every message; a level that a command has set before stays.
            log.setLevel(level or log.level)
