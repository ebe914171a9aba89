"""Run the quickstart and its naive baseline in an empty folder, and keep what README's table is made from.

    OMP_NUM_THREADS=1 PYTHONPATH=$PWD python -m tests.benchmarks.quickstart
    PYTHONPATH=$PWD python docs/make_tables.py

Writes ``docs/results/quickstart.json``: both reports, what is shown of them, and code, threads and machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lifelong_moe.reports.report import Report
from pipelines.run.render import summary_lines
from tests.benchmarks.provenance import ROOT, keep, made_with

NAMES = ("quickstart", "quickstart-naive")
CONFIG = str(ROOT / "configs/quickstart.yaml")


def side_by_side(reports: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of the table that ``lifelong-moe report`` shows."""
    columns = [dict(summary_lines(Report.from_json(report))) for report in reports]
    names = dict.fromkeys(name for column in columns for name in column)
    return [[name, *(column.get(name, "–") for column in columns)] for name in names]


def main() -> None:
    """Train both, report, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/quickstart.json")
    parser.add_argument("overrides", nargs="*", help="key=value, of both runs")
    options, origin = parser.parse_args(), made_with()
    out, command = options.out.absolute(), [sys.executable, "-m", "pipelines.cli"]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        for more in ([], [f"run={NAMES[1]}", "method=sequential"]):
            arguments = [*command, "run", CONFIG, *more, *options.overrides]
            subprocess.run(arguments, cwd=folder, env=environment, check=True)
        shown = subprocess.run(
            [*command, "report", *NAMES, "--json"], cwd=folder, env=environment, check=True, stdout=subprocess.PIPE
        )
    reports = json.loads(shown.stdout)["reports"]
    keep(out, {"runs": NAMES, "side_by_side": side_by_side(reports), "reports": reports}, origin)


if __name__ == "__main__":
    main()
