"""Where things are: all output is under the current directory. Apart, so that quick commands import nothing heavy."""

from __future__ import annotations

from pathlib import Path

from lifelong_moe.storage.temporary import remove_temporary

ROOT = Path("mlruns")
CACHE = Path("data/cache")


def remove_abandoned() -> None:
    """Remove what killed processes left half written: before anybody asks how much room there is."""
    for root in (ROOT, CACHE):
        remove_temporary(root)
