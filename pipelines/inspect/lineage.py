"""`lifelong-moe lineage RUN`: which stage created which experts, and from what data. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from lifelong_moe.storage.keys import SHORT
from lifelong_moe.store.lineage import lineage_rows
from lifelong_moe.store.runs import require_head
from lifelong_moe.store.stages import StageStore
from pipelines.shared.places import ROOT
from pipelines.shared.tables import show


def show_lineage(run: str, console: Console) -> list[Mapping[str, Any]]:
    """Show which stage created which experts, and from what data, with hashes."""
    rows = lineage_rows(StageStore(ROOT), require_head(ROOT, run).stages)
    table = Table(title=f"lineage of {run}", title_justify="left")
    for header in ("stage", "parent", "trained on", "created experts", "weights SHA-256"):
        table.add_column(header)
    for row in rows:
        data = "\n".join(f"{name} {digest[:12]}" for name, digest in row.data.items())
        parent = (row.parent or "–")[:SHORT]
        table.add_row(f"{row.name}\n{row.key[:SHORT]}", parent, data, row.experts, row.weights_sha256[:SHORT])
    show(console, table)
    return [asdict(row) for row in rows]
