"""`lifelong-moe lineage RUN`: which stage created which experts, and from what data. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from lifelong_moe.storage.keys import SHORT
from lifelong_moe.store.lineage import LineageRow, lineage_rows
from lifelong_moe.store.runs import require_head
from lifelong_moe.store.stages import StageStore
from pipelines.shared.places import ROOT
from pipelines.shared.tables import show


def show_lineage(run: str, console: Console) -> Mapping[str, object]:
    """Show which stage created which experts, and from what data, with hashes."""
    rows = lineage_rows(StageStore(ROOT), require_head(ROOT, run).stages)
    table = Table(title=f"lineage of {run}", title_justify="left")
    # Few sign: without a signature the table stays as narrow as it was.
    signed = any(row.signed_by for row in rows)
    headers = ["stage", "parent", "trained on", "created experts", "weights SHA-256"]
    for header in [*headers, *(["signed by"] if signed else [])]:
        table.add_column(header)
    for row in rows:
        data = "\n".join(f"{name} {digest[:12]}" for name, digest in row.data.items())
        if (came := row.checkpoint) is not None:
            data = f"{came['architecture']}\nfiles {came['sha256'][:12]}"
        parent = (row.parent or "–")[:SHORT]
        cells = [f"{row.name}\n{row.key[:SHORT]}", parent, data, row.experts, row.weights_sha256[:SHORT]]
        table.add_row(*cells, *([_signer(row)] if signed else []))
    show(console, table)
    return {"run": run, "stages": [asdict(row) for row in rows]}


def _signer(row: LineageRow) -> str:
    """Who signed a stage, and whether that was verified."""
    if row.signed_by is None:
        return "nobody"
    return f"{row.signed_by[:SHORT]}\n{'verified' if row.signature_verified else 'not verified'}"
