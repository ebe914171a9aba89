"""Joules that the training device draws, from counters that hardware keeps; where there are none, nothing is said.

It is the device that trains and no other: a GPU's whole board, or all CPU packages of the machine, whoever else uses
them at the time. Memory beside the CPU, the host of a GPU, fans and power supplies are not in it. Nothing is estimated
from a nominal power.
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
"""Between two readings: far less than the minutes in which a busy package's 32 bits begin again at 0."""


@dataclass(frozen=True)
class EnergyCounter:
    """A counter that only rises, or begins again at 0 once it is full."""

    read: Callable[[], int]
    """Its value in units; raises OSError or ValueError where it cannot be read."""
    unit: float
    """Joules."""
    highest: int | None = None
    """Value after which it begins again at 0; None if it does not."""

    def joules(self, before: int, now: int) -> float:
        """Energy between two readings.

        Raises:
            ValueError: If it fell although it never begins again: somebody reset it.
        """
        if now < before and self.highest is None:
            raise ValueError(f"an energy counter fell from {before} to {now}")
        return (now - before + (self.highest or 0) * (now < before)) * self.unit


def energy_counters(device: torch.device) -> list[EnergyCounter]:
    """What measures a device; empty if nothing does."""
    if device.type == "cuda":
        try:
            nvml = importlib.import_module("pynvml")  # package nvidia-ml-py, which nothing of ours requires
        except ImportError:
            return []
        # Not by number: CUDA_VISIBLE_DEVICES renumbers devices for CUDA alone.
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
    """The counters of all CPU packages, Intel's or AMD's, in microjoules.

    Zones within a package (``intel-rapl:0:0``) are part of it or memory, and the platform's (``psys``) holds packages:
    neither is added to them. Most systems let only root read them.

    Args:
        root: ``/sys/class/powercap``.

    Source:
        Linux, Documentation/ABI/testing/sysfs-class-powercap and Documentation/power/powercap/powercap.rst.
    """
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
    """Adds up what counters say, over interruptions too.

    All or nothing: once a counter could not be read, or if a run that goes on from a checkpoint cannot read what the
    one before it could, the energy is not known. A part of it would pass for the whole.
    """

    def __init__(self) -> None:
        self.joules: float | None = 0.0
        """So far; None if it is not known. Goes into checkpoints and is set from them."""
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
        if not self._values:
            self.joules = None

    def advance(self, every_seconds: float = 0.0) -> None:
        """Read again, unless less time has passed since the last reading; nothing before the start."""
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
