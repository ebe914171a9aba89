"""`lifelong-moe sync`: send to MLflow what was recorded while it was unreachable, and correct its aliases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from lifelong_moe.errors import TryAgainError
from lifelong_moe.tracking.sync import sync as deliver
from pipelines.shared.places import ROOT
from pipelines.shared.recorded import follow_champions


def sync(console: Console) -> Mapping[str, Any]:
    """Deliver all spools, then set each run's alias to its serving stage.

    Args:
        console: Where people read.

    Returns:
        How many records were delivered and how many MLflow refused, by store.

    Raises:
        TryAgainError: If an MLflow store does not answer; its records are kept.
    """
    outcomes = deliver(ROOT)
    for synced in outcomes:
        done = synced.delivered
        if synced.problem is None:
            console.print(f"{synced.address}: {done.operations} records delivered.")
        # Refused for good, such as a name that MLflow does not allow: kept in a file, but not sent again.
        if done.refused:
            where = f"{ROOT}/spool/*/refused.jsonl"
            console.print(
                f"{synced.address}: MLflow refused {done.refused} of the records; see {where}.", style="yellow"
            )
    if not outcomes:
        console.print("Nothing to deliver.")
    # After the deliveries, which may hold the very stages that the aliases point to.
    for run, problem in follow_champions().items():
        console.print(f"alias champion of run {run}: {problem}", style="yellow")
    # Only now: one store that is down keeps nothing from the others.
    if left := [f"{synced.address}: {synced.problem}" for synced in outcomes if synced.problem is not None]:
        raise TryAgainError(f"MLflow did not take all records; they are kept for the next sync: {'; '.join(left)}")
    return {
        synced.address: {"delivered": s.operations, "refused": s.refused}
        for synced in outcomes
        if (s := synced.delivered)
    }
