"""`lifelong-moe status`: which stages of a run are committed, under way and to do. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from lifelong_moe.storage.keys import SHORT
from lifelong_moe.store.lineage import work_under_way
from lifelong_moe.store.runs import require_head
from lifelong_moe.store.stages import StageStore
from lifelong_moe.store.versions import describe
from pipelines.shared.places import ROOT
from pipelines.shared.tables import show


@dataclass(frozen=True)
class StageStatus:
    """How far a stage of a run is."""

    name: str
    key: str
    state: str
    """``committed``, ``under way`` or ``to do``."""
    checkpoint_step: int | None
    """Optimizer step of the last checkpoint of a stage under way."""


def show_status(run: str, console: Console, *, verify: bool = False) -> Mapping[str, Any]:
    """Show which stages are committed, under way and to do; returns the same for ``--json``.

    Args:
        run: A run.
        console: Where people read.
        verify: Read all files of the stages, also those that were verified before.

    Raises:
        CorruptError: If a stage is damaged.
    """
    head, store = require_head(ROOT, run), StageStore(ROOT, reads_all=verify)
    stages = []
    for name, key in zip(head.names, head.plan, strict=True):
        stage = store.find(key)
        steps = None if stage else work_under_way(ROOT / "work" / key[:SHORT])
        state = "committed" if stage else ("to do" if steps is None else "under way")
        stages.append(StageStatus(name, key, state, steps))
    table = Table(title=f"run {run}", title_justify="left")
    for header in ("stage", "key", "state", "checkpoint"):
        table.add_column(header)
    for row in stages:
        step = "" if row.checkpoint_step is None else f"step {row.checkpoint_step}"
        table.add_row(row.name, row.key[:SHORT], row.state, step)
    show(console, table)
    result: dict[str, Any] = {"run": run, "method": head.method, "stages": list(map(asdict, stages))}
    # Before the first tick, drop or consolidation there are no versions: the run then serves its last stage.
    if head.versions:
        now, tick = head.champion, head.last_tick
        console.print(describe(now))
        result["champion"] = {"version": now.id, "stage": now.stages[-1].name, "key": now.key, "since": now.at}
        result["last_tick_at"] = tick.at if tick else None
        if tick:
            console.print(f"last tick {tick.at}: {tick.outcome}: {tick.reason}")
    return result
