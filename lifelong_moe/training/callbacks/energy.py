"""Energy drawn by the training device, from hardware counters; absent on devices without one.

Measured is a GPU's whole board, or all CPU packages of the machine, other processes on them included; memory beside the
CPU, the host of a GPU, fans and power supplies are not. Nothing is estimated from a nominal power.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
READ_SECONDS = 1.0
"""Between two readings; a busy package's 32-bit counter overflows within minutes."""


@dataclass(frozen=True)
class EnergyCounter:
    """A counter that rises, and may overflow to 0."""

    read: Callable[[], int]
    """Its value in units; raises OSError or ValueError where it cannot be read."""
    unit: float
    """Joules."""
    highest: int | None = None
    """Value after which it overflows to 0; None if it never does."""

    def joules(self, before: int, now: int) -> float:
        """Energy between two readings.

        Raises:
            ValueError: If it fell although it never overflows: somebody reset it.
        """
        if now < before and self.highest is None:
            raise ValueError(f"an energy counter fell from {before} to {now}")
        return (now - before + (self.highest or 0) * (now < before)) * self.unit


def energy_counters(device: torch.device) -> list[EnergyCounter]:
    """The counters of a device; empty if it has none."""
    if device.type == "cuda":
        try:
            nvml = importlib.import_module("pynvml")  # package nvidia-ml-py, which nothing of ours requires
        except ImportError:
            return []
        # By UUID, not by number: CUDA_VISIBLE_DEVICES renumbers devices for CUDA, but not for NVML.
        return nvml_counters(f"GPU-{torch.cuda.get_device_properties(device).uuid}", nvml)
    return rapl_counters(POWERCAP) if device.type == "cpu" else []


def nvml_counters(uuid: str, nvml: Any) -> list[EnergyCounter]:
    """The counter of an NVIDIA GPU, in millijoules since its driver was loaded.

    Args:
        uuid: As NVML writes it, ``GPU-…``. A part of a GPU (MIG) has no counter.
        nvml: The module ``pynvml``.

    Source:
        NVML, ``nvmlDeviceGetTotalEnergyConsumption``: Volta and newer. It moves every 20 to 100 ms.
    """
    try:
        nvml.nvmlInit()  # counts its callers, and ends with the process
        device = nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError:
        return []

    def read() -> int:
        try:
            return int(nvml.nvmlDeviceGetTotalEnergyConsumption(device))
        except nvml.NVMLError as error:
            raise OSError(str(error)) from error

    return [EnergyCounter(read, 1e-3)]


def rapl_counters(root: Path) -> list[EnergyCounter]:
    """The counters of all CPU packages, Intel's or AMD's, in microjoules; most systems let only root read them.

    Args:
        root: ``/sys/class/powercap``.

    Source:
        Linux, Documentation/ABI/testing/sysfs-class-powercap and Documentation/power/powercap/powercap.rst.
    """
    # Packages alone: a zone within one (intel-rapl:0:0) is part of it or memory, and the platform's (psys) holds them.
    zones = [path for path in sorted(root.glob("intel-rapl:*")) if path.name.count(":") == 1]
    try:
        packages = [path for path in zones if (path / "name").read_text(encoding="ascii").startswith("package-")]
        ranges = [_number(path / "max_energy_range_uj") for path in packages]
    except (OSError, ValueError):
        return []
    return [
        EnergyCounter(partial(_number, path / "energy_uj"), 1e-6, highest)
        for path, highest in zip(packages, ranges, strict=True)
    ]


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


class EnergyMeter:
    """Adds up counters, also over interruptions."""

    def __init__(self) -> None:
        self.joules: float | None = 0.0
        """So far; None if unknown. Saved in checkpoints and set from them."""
        self._counters: Sequence[EnergyCounter] = ()
        self._values: list[int] = []
        self._read_at = 0.0

    def start(self, counters: Sequence[EnergyCounter]) -> None:
        """Count from now on."""
        self._counters, self._read_at = counters, time.monotonic()
        try:
            self._values = [counter.read() for counter in counters]
        except (OSError, ValueError):
            self._values = []
        # All or nothing, also if an earlier part of the run could be measured: a part would pass for the whole.
        if not self._values:
            self.joules = None

    def advance(self, every_seconds: float = 0.0) -> None:
        """Read the counters, unless the last reading is less than ``every_seconds`` ago."""
        now = time.monotonic()
        if self.joules is None or not self._values or now - self._read_at < every_seconds:
            return
        try:
            values = [counter.read() for counter in self._counters]
            pairs = zip(self._counters, self._values, values, strict=True)
            self.joules += sum(counter.joules(before, after) for counter, before, after in pairs)
        except (OSError, ValueError):
            self.joules = None
            return
        self._values, self._read_at = values, now
