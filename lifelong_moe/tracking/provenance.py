"""Who ran which code on what machine: tags of each run. Torch-free, and starts no program."""

from __future__ import annotations

import getpass
import os
import platform
import re
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("lifelong-moe", "torch", "lightning", "mlflow")
MOST_CHARACTERS = 1 << 24
"""Of a file of git's that is read; `packed-refs` is the largest."""


@cache
def provenance() -> dict[str, str]:
    """Tags by name, MLflow's own where it has one; what is not known is absent."""
    found = {"lifelong.python": platform.python_version(), "lifelong.machine": machine()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[f"lifelong.version.{name}"] = version(name)
    # Without a name in the environment or the password database, as in some containers.
    with suppress(KeyError, OSError):
        found["mlflow.user"] = getpass.getuser()
    # In a working directory that is gone.
    with suppress(FileNotFoundError):
        if (commit := commit_of(Path.cwd())) is not None:
            found["mlflow.source.git.commit"] = commit
    return found


def commit_of(folder: Path) -> str | None:
    """The commit that is checked out around a folder, from git's files; None if there is none.

    Of the working directory it is the commit of the configuration; the code has its own version.
    """
    for place in (folder, *folder.parents):
        git = place / ".git"
        # A worktree has a file that names its folder.
        if git.is_file() and (named := re.fullmatch(r"gitdir: (.+)", _read(git))) is not None:
            git = place / named[1]
        if git.is_dir():
            return _head(git)
    return None


def _head(git: Path) -> str | None:
    text = _read(git / "HEAD")
    if (reference := re.fullmatch(r"ref: (refs(?:/(?!\.)[\w.-]+)+)", text)) is not None:
        # Branches of a worktree lie in the repository's own folder.
        shared = git / (_read(git / "commondir") or ".")
        packed = re.search(rf"^(\w+) {re.escape(reference[1])}$", _read(shared / "packed-refs"), re.MULTILINE)
        text = _read(shared / reference[1]) or (packed[1] if packed else "")
    return text if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text) else None


@cache
def machine() -> str:
    """Processor, cores, memory and GPUs, such as ``AMD EPYC, 2 cores, 25 GB``."""
    processor = re.search(r"^model name\s*: (.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    parts = [processor[1] if processor else platform.processor() or platform.machine(), f"{os.cpu_count()} cores"]
    with suppress(ValueError, OSError, AttributeError):
        parts.append(f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB")
    for information in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        if (model := re.search(r"^Model:\s*(.+)$", _read(information), re.MULTILINE)) is not None:
            parts.append(model[1])
    return ", ".join(parts)


def _read(path: Path) -> str:
    """The beginning of a text file; empty if there is none."""
    if not path.is_file():  # a FIFO would be waited for
        return ""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(MOST_CHARACTERS).strip()
    except OSError:
        return ""
