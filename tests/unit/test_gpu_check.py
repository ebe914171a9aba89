"""``make gpu-check`` stands ready: its rehearsal on the CPU, where MLflow and ``datasets`` are not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.gpu_check import PARTS, Machine, check

ROOT = Path(__file__).parents[2]
WITHOUT = """
import runpy, sys
sys.modules |= {"mlflow": None, "datasets": None}  # importing one of them raises an error
sys.argv = ["gpu_check", *sys.argv[1:]]
runpy.run_module("tests.benchmarks.gpu_check", run_name="__main__")
"""


def test_the_rehearsal_finds_every_part_sound(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, str(tmp_path), "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in PARTS}
    assert all(one["sound"] and one["seconds"] >= 0 for one in found.values())
    assert found["5-continued"]["found"]["32-true"] == {"same": True, "stages": 2}
    assert json.loads(done.stdout.splitlines()[-1]).keys() == PARTS.keys()


def test_without_time_nothing_is_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = check(Machine("cpu", tmp_path, ends=0.0))
    assert all("left_out" in one and not one["sound"] for one in found.values())
    assert sorted(path.stem for path in tmp_path.iterdir()) == [*PARTS] and "0-ceilings: " in capsys.readouterr().out
