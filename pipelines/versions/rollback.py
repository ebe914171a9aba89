"""`lifelong-moe rollback`: let an earlier version serve again. One pointer is swapped; no stage is touched."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.storage.locks import locked
from lifelong_moe.store.runs import RunRecord, require_head
from lifelong_moe.store.versions import Version, describe
from pipelines.shared.places import ROOT
from pipelines.shared.recorded import follow_champion


def rollback(run: str, to: int | None, console: Console) -> dict[str, Any]:
    """Swap the champion.

    Args:
        run: A run with versions.
        to: The version that shall serve; by default the one that served before the champion.
        console: Where people read.

    Raises:
        ConfigError: If there is no such run or version.
        LockedError: If another process works on the run.
        CorruptError: If a stage of that version is no longer in the store.
    """
    require_head(ROOT, run)  # a mistake is told before a lock is made
    record = RunRecord(ROOT, run)
    with locked(record.lock_path, f"run {run}"):
        head = require_head(ROOT, run)
        was, after = head.champion, head.rolled_back(to)
        now = after.champion
        _require_stages(now)
        if now != was:
            record.log("rollback", champion=now.id, was=was.id, key=now.key)
            record.set_head(after)
        console.print(f"{run}: {'serves' if now != was else 'serves already'}: {describe(now)}", highlight=False)
        follow_champion(after, console)
    return {"run": run, "champion": now.id, "was": was.id, "kind": now.kind, "at": now.at, "key": now.key}


def _require_stages(version: Version) -> None:
    for stage in version.stages:
        if not any((ROOT / "stages").glob(f"*-{stage.key[:SHORT]}/manifest.json")):
            raise CorruptError(f"version {version.id}: stage {stage.name} {stage.key[:SHORT]} is not in the store.")
