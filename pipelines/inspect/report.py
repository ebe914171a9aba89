"""`lifelong-moe report`: the tables of runs side by side. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from lifelong_moe.errors import ConfigError
from lifelong_moe.reports.report import Report, as_written
from lifelong_moe.store.runs import RunRecord, require_head
from pipelines.run import render
from pipelines.shared.places import ROOT


def show_report(runs: list[str], console: Console) -> Mapping[str, object]:
    """Show the tables of runs side by side; returns their ``report.json`` as ``reports``."""
    reports: list[Mapping[str, Any]] = []
    for run in runs:
        require_head(ROOT, run)
        found = RunRecord(ROOT, run).report(as_written)
        if found is None:
            raise ConfigError(f"run {run} has no report yet: no stage is committed and evaluated.")
        reports.append(found)
    # Printed through the type, returned as written: scripts get every key of an earlier version's report.
    read = [Report.from_json(one) for one in reports]
    render.report(console, read)
    render.verdict(console, read)
    return {"reports": reports}
