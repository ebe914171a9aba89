"""`lifelong-moe rollback`: serve an earlier version again. One pointer changes; no stage does."""

from __future__ import annotations

from rich.console import Console

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.storage.locks import locked
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import RunRecord, require_head
from lifelong_moe.store.stages import StageStore
from lifelong_moe.store.versions import Version, describe
from pipelines.shared.places import ROOT
from pipelines.shared.recorded import follow_champion


def rollback(run: str, to: int | None, console: Console) -> dict[str, str | int]:
    """Make an earlier version the champion.

    Args:
        run: A run with versions.
        to: Id of the version; by default the one that served before the champion.
        console: Output for people.

    Raises:
        ConfigError: If there is no such run or version.
        LockedError: If another process works on the run.
        CorruptError: If a stage of that version is no longer in the store, or not signed by a trusted key.
    """
    # A run that does not exist is refused before a lock file is made for it.
    require_head(ROOT, run)
    record = RunRecord(ROOT, run)
    with locked(record.lock_path, f"run {run}"):
        head = require_head(ROOT, run)
        was, after = head.champion, head.rolled_back(to)
        now = after.champion
        _require_stages(now, after)
        if now != was:
            # Ledger before head: a kill in between leaves a line too many and never a change without a line.
            record.log("rollback", champion=now.id, was=was.id, key=now.key)
            record.set_head(after)
        console.print(f"{run}: {'serves' if now != was else 'serves already'}: {describe(now)}")
        follow_champion(after, console)
    return {"run": run, "champion": now.id, "was": was.id, "kind": now.kind, "at": now.at, "key": now.key}


def _require_stages(version: Version, head: RunHead) -> None:
    """Raise a CorruptError unless every stage of a version is in the store, and trusted; sign it if there is a key."""
    for stage in version.stages:
        if not any((ROOT / "stages").glob(f"*-{stage.key[:SHORT]}/manifest.json")):
            raise CorruptError(f"version {version.id}: stage {stage.name} {stage.key[:SHORT]} is not in the store.")
    store = StageStore(ROOT)
    # Reading gigabytes again takes time that an operator may not have, so only who asks for signatures waits for it.
    if store.keys.public:
        for stage in version.stages:
            store.get(stage.key)
    store.sign(version.key, head.centroids)
