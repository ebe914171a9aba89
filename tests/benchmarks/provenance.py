"""What a measurement was made with, kept beside its numbers in JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def keep(path: Path, found: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """Write numbers, and under ``run`` where they come from: :func:`made_with`, asked before the work begins."""
    text = json.dumps({"run": origin, **found}, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def made_with() -> dict[str, Any]:
    """Code, command, date and machine of the program that runs."""
    return {**origin(command()), **hardware(), "threads": os.environ.get("OMP_NUM_THREADS")}


def command() -> str:
    """The command line without the folders of absolute paths."""
    script = Path(sys.argv[0])
    name = script.resolve().relative_to(ROOT).as_posix() if script.resolve().is_relative_to(ROOT) else script.name
    return without_paths(shlex.join(["python", name, *sys.argv[1:]]))


def without_paths(text: str) -> str:
    """Leave out the folders of absolute paths: they say something of a machine and nothing of the measurement."""
    return re.sub(r"(?<![\w.:/])(?:/[\w.@+-]+)+/", "…/", text)


def hardware() -> dict[str, Any]:
    """What figures depend on."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
    }


def origin(command: str) -> dict[str, Any]:
    """Which code was measured, how and when."""
    changed = _git("status", "--porcelain", "--", ".", ":!docs", ":!*.md")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8")) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
