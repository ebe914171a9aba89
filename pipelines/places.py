"""Where things are: all output is under the current directory. Apart, so that quick commands import nothing heavy."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("mlruns")
CACHE = Path("data/cache")
