"""Paths of our folders below the current directory; a separate module, so that quick commands import nothing heavy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from lifelong_moe.storage.plain_files import require_plain_files
from lifelong_moe.storage.temporary import remove_temporary

ROOT = Path("mlruns")
CACHE = Path("data/cache")


def require_plain_store() -> None:
    """Refuse a store or a cache that holds links, FIFOs or devices, before anything in it is opened.

    Raises:
        CorruptError: Naming the first one.
    """
    for root in (ROOT, CACHE):
        require_plain_files(root)


def opens_store(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command begin with :func:`require_plain_store`."""

    @functools.wraps(command)
    def checked(*args: object, **given: object) -> None:
        require_plain_store()
        command(*args, **given)

    return checked


def remove_abandoned() -> None:
    """Remove half-written files of killed processes; call it before free disk space is measured."""
    for root in (ROOT, CACHE):
        remove_temporary(root)
