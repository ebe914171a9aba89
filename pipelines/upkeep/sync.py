"""`lifelong-moe sync`: deliver to MLflow what was recorded while it was absent, and set its aliases right."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from lifelong_moe.errors import TryAgainError
from lifelong_moe.tracking.sync import sync as deliver
from pipelines.shared.places import ROOT
from pipelines.shared.recorded import follow_champions


def sync(console: Console) -> dict[str, Any]:
    """Deliver all spools, then let each run's alias show who serves.

    Args:
        console: Where people read.

    Returns:
        How many records were delivered and how many MLflow refused, by store.

    Raises:
        TryAgainError: If a store does not answer; its records stay.
    """
    outcomes = deliver(ROOT)
    for synced in outcomes:
        done = synced.delivered
        if synced.problem is None:
            console.print(f"{synced.address}: {done.operations} records delivered.", highlight=False)
        if done.refused:
            where = f"{ROOT}/spool/*/refused.jsonl"
            console.print(
                f"[yellow]{synced.address}: MLflow refused {done.refused} of the records; see {where}.[/yellow]"
            )
    if not outcomes:
        console.print("Nothing to deliver.")
    for run, problem in follow_champions().items():
        console.print(f"[yellow]alias champion of run {run}: {problem}[/yellow]", highlight=False)
    if left := [f"{synced.address}: {synced.problem}" for synced in outcomes if synced.problem is not None]:
        raise TryAgainError(f"MLflow did not take all records, which stay for later: {'; '.join(left)}")
    return {
        synced.address: {"delivered": s.operations, "refused": s.refused}
        for synced in outcomes
        if (s := synced.delivered)
    }
