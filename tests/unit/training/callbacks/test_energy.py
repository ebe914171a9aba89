"""Joules from counters that go up, wrap, fall, and cannot be read; and what a stage says of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lifelong_moe.training.callbacks import energy
from lifelong_moe.training.callbacks import progress as callbacks
from lifelong_moe.training.callbacks.energy import (
    EnergyCounter,
    EnergyMeter,
    energy_counters,
    nvml_counters,
    rapl_counters,
)
from lifelong_moe.training.callbacks.progress import Meter
from lifelong_moe.training.loop.measure import _total_joules

HIGHEST = 262_143_328_850  # of a real package: 2**32 - 1 units of 61 µJ
ZONES = {
    "intel-rapl": None,
    "intel-rapl:0": "package-0",
    "intel-rapl:0:0": "core",
    "intel-rapl:0:1": "dram",
    "intel-rapl:1": "package-1-die-0",
    "intel-rapl:2": "psys",
    "intel-rapl-mmio:0": "package-0",
}


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two packages, and everything beside them that must not be added."""
    for zone, name in ZONES.items():
        (tmp_path / zone).mkdir()
        if name is not None:
            (tmp_path / zone / "name").write_text(f"{name}\n")
            (tmp_path / zone / "max_energy_range_uj").write_text(f"{HIGHEST}\n")
            (tmp_path / zone / "energy_uj").write_text("1000000\n")
    return tmp_path


def draw(powercap: Path, zone: str, microjoules: int) -> None:
    (powercap / zone / "energy_uj").write_text(f"{microjoules}\n")


def counter(*readings: int | Exception, highest: int | None = None) -> EnergyCounter:
    """One in joules that says one after the other."""
    left: Iterator[int | Exception] = iter(readings)

    def read() -> int:
        found = next(left)
        if isinstance(found, Exception):
            raise found
        return found

    return EnergyCounter(read, 1.0, highest)


def started(*counters: EnergyCounter) -> EnergyMeter:
    meter = EnergyMeter()
    meter.start(counters)
    return meter


def test_packages_alone_are_added_up(powercap: Path) -> None:
    meter = started(*rapl_counters(powercap))
    for zone, name in ZONES.items():
        if name is not None:
            draw(powercap, zone, {"intel-rapl:0": 3_500_000, "intel-rapl:1": 1_250_000}.get(zone, 99_000_000))
    meter.advance()
    assert meter.joules == pytest.approx(2.5 + 0.25)
    meter.advance()
    assert meter.joules == pytest.approx(2.75)


def test_a_package_that_wraps(powercap: Path) -> None:
    draw(powercap, "intel-rapl:1", HIGHEST - 2_000_000)
    meter = started(*rapl_counters(powercap))
    draw(powercap, "intel-rapl:0", 2_000_000)
    draw(powercap, "intel-rapl:1", 500_000)
    meter.advance()
    assert meter.joules == pytest.approx(1.0 + 2.5)


def test_without_powercap_there_are_no_counters(tmp_path: Path) -> None:
    assert rapl_counters(tmp_path / "absent") == rapl_counters(tmp_path) == []
    meter = started()
    meter.advance()
    assert meter.joules is None


def test_packages_that_only_root_may_read(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_text = Path.read_text

    def refuse(self: Path, *args: Any, **kwargs: Any) -> str:
        if self == powercap / "intel-rapl:1" / "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    counters = rapl_counters(powercap)
    assert [len(counters), counters[0].read()] == [2, 1_000_000]
    assert started(*counters).joules is None  # the other package alone would be a part


@pytest.mark.parametrize("name", ["name", "max_energy_range_uj"])
def test_a_zone_that_says_too_little(powercap: Path, name: str) -> None:
    (powercap / "intel-rapl:1" / name).unlink()
    assert rapl_counters(powercap) == []


class NVMLError(Exception):
    pass


class Board:
    """What we use of ``pynvml``, with one GPU."""

    NVMLError = NVMLError

    def __init__(self, *millijoules: int | None, driver: bool = True) -> None:
        self.left, self.driver = iter(millijoules), driver

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.driver:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != "GPU-12":
            raise NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        assert handle == "handle"
        found = next(self.left)
        if found is None:
            raise NVMLError("Not Supported")
        return found


def test_a_gpu_counts_in_millijoules() -> None:
    meter = started(*nvml_counters("GPU-12", Board(7_000_000, 7_001_500, 7_004_000)))
    meter.advance()
    assert meter.joules == pytest.approx(1.5)
    meter.advance()
    assert meter.joules == pytest.approx(4.0)


def test_a_gpu_without_driver_or_counter_or_of_another_name() -> None:
    assert nvml_counters("GPU-12", Board(driver=False)) == nvml_counters("GPU-13", Board(1)) == []
    assert started(*nvml_counters("GPU-12", Board(None))).joules is None  # older than Volta


def test_the_device_that_trains_is_measured(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", powercap)
    assert [c.unit for c in energy_counters(torch.device("cpu"))] == [1e-6, 1e-6]
    assert energy_counters(torch.device("mps")) == []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=device.index))
    monkeypatch.setitem(sys.modules, "pynvml", Board(5))  # type: ignore[arg-type]
    assert [c.read() for c in energy_counters(torch.device("cuda", 12))] == [5]
    assert energy_counters(torch.device("cuda", 1)) == []
    monkeypatch.setitem(sys.modules, "pynvml", None)  # what makes an import fail
    assert energy_counters(torch.device("cuda", 12)) == []


@pytest.mark.parametrize("last", [OSError("gone"), ValueError("torn"), 9])
def test_a_counter_that_fails_or_falls_on_the_way_leaves_nothing(last: int | Exception) -> None:
    meter = started(counter(10, 12, last, 20))
    meter.advance()
    assert meter.joules == 2.0
    for _ in range(2):
        meter.advance()
        assert meter.joules is None


def test_it_is_not_read_more_often_than_asked() -> None:
    meter = started(counter(10, 14))
    meter.advance(every_seconds=3600.0)
    assert meter.joules == 0.0
    meter.advance()
    assert meter.joules == 4.0


@pytest.fixture
def make_meter(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Meter]:
    """A meter in a run that goes on from a checkpoint, if there is one, and whose device is measured so."""

    def make(*counters: EnergyCounter, checkpoint: dict[str, Any] | None = None) -> Meter:
        monkeypatch.setattr(callbacks, "energy_counters", lambda device: counters)
        meter = Meter(step_tokens=8, step_flops=1.0, every_steps=1)
        if checkpoint is not None:
            meter.load_state_dict(checkpoint)
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        meter.on_train_start(SimpleNamespace(global_step=0, strategy=strategy), None)  # type: ignore[arg-type]
        return meter

    return make


def test_interruptions_do_not_lose_energy(make_meter: Callable[..., Meter]) -> None:
    state = make_meter(counter(100, 103)).state_dict()
    assert state["joules"] == 3.0
    meter = make_meter(counter(7, 12), checkpoint=state)  # another machine, perhaps
    meter.on_train_end(None, None)  # type: ignore[arg-type]
    assert meter.energy.joules == 8.0


def test_a_part_of_the_energy_is_not_reported(make_meter: Callable[..., Meter]) -> None:
    measured, blind = make_meter(counter(100, 103)).state_dict(), make_meter().state_dict()
    assert make_meter(checkpoint=measured).energy.joules is None
    assert make_meter(counter(7, 12), checkpoint=blind).state_dict()["joules"] is None
    del measured["joules"]  # of an earlier version
    assert make_meter(counter(7, 12), checkpoint=measured).state_dict()["joules"] is None


def test_a_stage_says_all_of_its_phases_energy_or_nothing() -> None:
    assert _total_joules([6.0, 2.0]) == 8.0 and _total_joules([0.0, 2.0]) == 2.0
    assert _total_joules([6.0, None]) is _total_joules([None]) is _total_joules([0.0, 0.0]) is None
