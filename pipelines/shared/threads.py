"""Number of threads that libraries start, and how these wait. OpenMP reads both when torch is imported.

Torch's wheels for Linux carry GNU OpenMP (libgomp), which counts the processors that this process may be scheduled on,
but ignores a container's limit of processor time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

from pipelines.shared import output

# libgomp's default of 300,000 outlasts most gaps between parallel regions, so waiting threads would keep processors
# from other work. Fewer spins are slower on an idle machine, more are slower beside other work.
SPINS = "2000"
"""Spins of a waiting thread before it sleeps; measured in ``docs/performance.md``."""
HOW_TO_WAIT = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
HOW_MANY = ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "OMP_DYNAMIC", "MKL_NUM_THREADS")


_lowered: list[str] = []
"""Messages about lowered thread counts that were not printed yet."""


def configure(environ: MutableMapping[str, str] = os.environ, root: Path = Path("/")) -> None:
    """Set the environment variables about threads that the user did not set; child processes inherit them.

    Args:
        environ: Changed in place.
        root: Root of the file system in which the kernel shows a container's limits.
    """
    # Too late, and a program that imports us decides about its threads itself.
    if "torch" in sys.modules:
        return
    processors, quota = schedulable(), processor_quota(root)
    settings = thread_settings(environ, processors, quota)
    environ.update(settings)
    if number := settings.get("OMP_NUM_THREADS"):
        _lowered.append(
            f"threads: {number}, as this container may use {quota:.3g} of {processors} processors; "
            f"OMP_NUM_THREADS sets another number."
        )


def say() -> None:
    """Print once, before anything long begins, that there are fewer threads than processors."""
    while _lowered:
        output.tell(_lowered.pop())


def thread_settings(environ: Mapping[str, str], processors: int, quota: float | None) -> dict[str, str]:
    """The variables to set.

    Args:
        environ: Variables that are set already; either kind (how many, how to wait) is left alone if the user set it.
        processors: Processors that this process may be scheduled on.
        quota: Limit of processor time, in processors; None without a limit.
    """
    settings = {}
    if not any(name in environ for name in HOW_TO_WAIT):
        settings["GOMP_SPINCOUNT"] = SPINS
    if quota is not None and quota < processors and not any(name in environ for name in HOW_MANY):
        settings["OMP_NUM_THREADS"] = str(max(1, int(quota)))
    return settings


def schedulable() -> int:
    """Processors that this process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_quota(root: Path = Path("/")) -> float | None:
    """Limit of processor time that this process's control groups set, in processors; None without a limit.

    Source:
        Linux's ``admin-guide/cgroup-v2.rst`` (``cpu.max``) and ``scheduler/sched-bwc.rst`` (``cpu.cfs_quota_us``).
    """
    # A group cannot use more than the groups above it.
    quotas = [quota for folder in _groups(root) if (quota := _quota_in(folder)) is not None]
    return min(quotas, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the groups that limit this process's processor time, per hierarchy from its own group upwards."""
    mounted = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:  # version 2: one hierarchy for all controllers
            base = mounted
        elif "cpu" in controllers.split(","):
            base = next((folder for name in (controllers, "cpu") if (folder := mounted / name).is_dir()), mounted)
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        # A container may see its own group mounted as the root: then the path does not exist below it, and only the
        # last of these folders does.
        yield from (base.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1))


def _quota_in(folder: Path) -> float | None:
    """The limit of one group, in processors; None if it sets none."""
    # Version 2 holds "QUOTA PERIOD" in one file, "max" for no limit; version 1 a file for each, -1 for no limit.
    told = _read(folder / "cpu.max").split()
    told = told or _read(folder / "cpu.cfs_quota_us").split() + _read(folder / "cpu.cfs_period_us").split()
    try:
        quota, period = (int(number) for number in told)
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None


def _read(path: Path) -> str:
    """The text of a kernel file; empty if it does not exist or is not readable."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
