"""How many threads libraries start, and how they wait. OpenMP reads both when torch loads it, so this comes first.

Torch's wheels for Linux carry GNU's OpenMP (libgomp); it counts the processors that this process may be scheduled on,
but not the share of their time that a container was given.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

SPINS = "2000"
"""How often a thread that waits looks before it sleeps. With libgomp's own 300,000, longer than most parallel regions
are apart, waiting threads hold processors that other work needs. Fewer looks cost speed on an idle machine, more cost
it beside other work; measured in ``docs/performance.md``."""
HOW_TO_WAIT = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
HOW_MANY = ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "OMP_DYNAMIC", "MKL_NUM_THREADS")


_lowered: list[str] = []
"""What is still to be said of fewer threads."""


def configure(environ: MutableMapping[str, str] = os.environ, root: Path = Path("/")) -> None:
    """Set what the environment does not say about threads; children take it over. No effect once torch is imported.

    Args:
        environ: Changed in place. A user's own setting of a kind (how many, how to wait) is left alone.
        root: Of the file system in which the kernel tells a container's limits.
    """
    if "torch" in sys.modules:  # its threads are another program's, which imports us
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
    """Tell a person once, before anything long begins, that there are fewer threads than processors."""
    while _lowered:
        print(_lowered.pop(), file=sys.stderr)


def thread_settings(environ: Mapping[str, str], processors: int, quota: float | None) -> dict[str, str]:
    """The variables to set.

    Args:
        environ: What is set already.
        processors: That this process may be scheduled on.
        quota: Processors' worth of time that it is given; None without a limit.
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
    """Processors' worth of time that this process's control groups leave it; None if they set no limit.

    A group has at most what those above it have. In a container its own group may be mounted in the root's place, so
    that the path in ``/proc/self/cgroup`` is not there, and the mounted root is what counts.

    Source:
        Linux's ``admin-guide/cgroup-v2.rst`` (``cpu.max``) and ``scheduler/sched-bwc.rst`` (``cpu.cfs_quota_us``).
    """
    quotas = [quota for folder in _groups(root) if (quota := _quota_in(folder)) is not None]
    return min(quotas, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the groups that limit this process's processor time: each hierarchy's, from its own upwards."""
    mounted = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            base = mounted
        elif "cpu" in controllers.split(","):
            base = next((folder for name in (controllers, "cpu") if (folder := mounted / name).is_dir()), mounted)
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        yield from (base.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1))


def _quota_in(folder: Path) -> float | None:
    """What one group sets: ``cpu.max`` holds ``QUOTA PERIOD``, and ``max`` for no limit; the older files a file each,
    and -1."""
    told = _read(folder / "cpu.max").split()
    told = told or _read(folder / "cpu.cfs_quota_us").split() + _read(folder / "cpu.cfs_period_us").split()
    try:
        quota, period = (int(number) for number in told)
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None


def _read(path: Path) -> str:
    """A file of the kernel's; nothing if there is none, or it is not for us."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
