"""Paths of our folders below the current directory; a separate module, so that quick commands import nothing heavy."""

from __future__ import annotations

from pathlib import Path

from lifelong_moe.storage.temporary import remove_temporary

ROOT = Path("mlruns")
CACHE = Path("data/cache")


def remove_abandoned() -> None:
    """Remove half-written files of killed processes; call it before free disk space is measured."""
    for root in (ROOT, CACHE):
        remove_temporary(root)
