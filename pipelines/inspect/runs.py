"""`lifelong-moe runs`: what is there, when it changed, how large and how good it is. Without torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from lifelong_moe.measures import MEASURES
from lifelong_moe.plan.disk import used_space
from lifelong_moe.reports.report import Report
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import RunRecord, require_head, run_names
from pipelines.run.render import millions
from pipelines.shared.places import ROOT
from pipelines.shared.tables import show

EXPLANATION = (
    "bits/byte is the mean over a run's distributions after its last stage, so runs on other text do not compare; "
    "forgetting, in bits/byte too, is that of the distribution which lost most. Stages that runs share count in each."
)


@dataclass(frozen=True)
class RunRow:
    """A run at a glance."""

    run: str
    method: str
    stages_committed: int
    stages: int
    """Planned."""
    version: int | None
    """The version that serves; None before anything was promoted or dropped."""
    changed: str
    """When something was last recorded of it, ISO 8601, UTC."""
    parameters: int | None
    """Of the model after the last stage that the report has; None without a report, as for all that follows."""
    bytes: int
    """Disk space of the stages that the run names, earlier versions included."""
    bits_per_byte: float | None
    """Mean over the distributions after the last stage."""
    forgetting_bits_per_byte: float | None
    """The largest of all old distributions; None too if there is none."""
    forgotten: str | None
    """The distribution that lost so much."""


def show_runs(console: Console) -> Mapping[str, object]:
    """Show all runs, the newest first; returns the same for ``--json``.

    Raises:
        CorruptError: If the head or the report of a run is damaged.
    """
    stages = _stage_sizes()
    rows = sorted((_row(run, stages) for run in run_names(ROOT)), key=lambda row: row.changed, reverse=True)
    result = {"runs": [asdict(row) for row in rows], "stages": len(stages), "bytes": sum(stages.values())}
    if not rows:
        console.print(f"There are no runs under {ROOT / 'runs'} yet. Begin one: lifelong-moe run CONFIG")
        return result
    table = Table(title=f"runs under {ROOT}", title_justify="left")
    headers = ("run", "method", "stages", "serves", "changed (UTC)", "parameters", "MB", "bits/byte", "forgetting")
    for header in headers:
        table.add_column(header, justify="right" if header in headers[5:8] else "left")
    for row in rows:
        table.add_row(*_cells(row))
    show(console, table)
    console.print(EXPLANATION)
    console.print(f"all {len(stages)} stages of this store together: {sum(stages.values()) / 1e6:,.1f} MB")
    return result


def _cells(row: RunRow) -> list[str]:
    measure, value = MEASURES["forgetting_bits_per_byte"], row.forgetting_bits_per_byte
    lost = "–" if value is None else f"{measure.show(value)} {row.forgotten}"
    return [
        row.run,
        row.method,
        f"{row.stages_committed} of {row.stages}",
        "–" if row.version is None else f"version {row.version}",
        row.changed.replace("T", " ").removesuffix("Z"),
        "–" if row.parameters is None else millions(row.parameters),
        f"{row.bytes / 1e6:,.1f}",
        "–" if row.bits_per_byte is None else f"{row.bits_per_byte:.3f}",
        lost,
    ]


def _stage_sizes() -> Mapping[str, int]:
    """Disk space of each stage, by the digits of its key that end its folder's name; nothing in it is verified."""
    folders = (ROOT / "stages").glob("[!.]*/")
    return {folder.name.rpartition("-")[2]: used_space(folder) for folder in folders}


def _row(run: str, sizes: Mapping[str, int]) -> RunRow:
    head, record = require_head(ROOT, run), RunRecord(ROOT, run)
    report = record.report(Report.from_json)
    final = report.bits_per_byte[-1] if report else []
    forgetting = report.forgetting_bits_per_byte if report else {}
    worst = max(forgetting, key=forgetting.__getitem__, default=None)
    return RunRow(
        run=run,
        method=head.method,
        stages_committed=len(head.committed),
        stages=len(head.plan),
        version=head.champion_id,
        changed=record.changed(),
        parameters=report.stages[-1].parameters_total if report else None,
        bytes=sum(sizes.get(key[:SHORT], 0) for key in _keys(head)),
        bits_per_byte=sum(final) / len(final) if final else None,
        forgetting_bits_per_byte=None if worst is None else forgetting[worst],
        forgotten=worst,
    )


def _keys(head: RunHead) -> Collection[str]:
    """Keys of all stages that a run names."""
    return {*head.plan, *(stage.key for version in head.versions for stage in version.stages)}
