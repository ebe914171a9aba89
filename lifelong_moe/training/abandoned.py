"""Work that a stage left behind."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from lifelong_moe.errors import TryAgainError
from lifelong_moe.storage.locks import locked


def clear_abandoned(work: Path) -> None:
    """Remove the work of a process that was killed right after its commit, unless another one is using it."""
    if work.exists():
        with suppress(TryAgainError), locked(work / ".lock", "a stage"):
            shutil.rmtree(work, ignore_errors=True)
