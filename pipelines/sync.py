"""`lifelong-moe sync`: deliver to MLflow what was recorded while it was absent."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from lifelong_moe.errors import TryAgainError
from lifelong_moe.tracking.sync import sync as deliver
from pipelines.places import ROOT


def sync(console: Console) -> dict[str, Any]:
    """Deliver all spools; returns how many records were delivered and how many MLflow refused, by store.

    Args:
        console: Where people read.

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
    if left := [f"{synced.address}: {synced.problem}" for synced in outcomes if synced.problem is not None]:
        raise TryAgainError(f"MLflow did not take all records, which stay for later: {'; '.join(left)}")
    return {
        synced.address: {"delivered": s.operations, "refused": s.refused}
        for synced in outcomes
        if (s := synced.delivered)
    }
