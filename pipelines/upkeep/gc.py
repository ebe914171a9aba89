"""`lifelong-moe gc`: show files that no run refers to any more; with ``--apply``, remove them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from lifelong_moe.storage.temporary import GRACE_SECONDS
from lifelong_moe.store.garbage import Garbage, Stored, collect, find_garbage
from pipelines.shared.places import CACHE, ROOT, remove_abandoned
from pipelines.shared.tables import show


def gc(apply: bool, console: Console) -> Mapping[str, Any]:
    """List the garbage, or remove it.

    Raises:
        LockedError: If a process works on a run or a stage; then nothing is removed.
        CorruptError: If a head or a stage is unreadable: its references are then unknown.
    """
    garbage = collect(ROOT, CACHE, time.time()) if apply else find_garbage(ROOT, CACHE, time.time())
    # After `collect`, which raises LockedError: then nothing at all is removed.
    if apply:
        remove_abandoned()
    _print(console, garbage, apply)
    names = ["stages", "evaluations", "signatures", "work", "heldout", "tokens", "readings", "manifests", "abandoned"]
    names += ["domains", "texts", "young"]
    kinds = {name: getattr(garbage, name) for name in names}
    listed = {kind: [{"path": str(s.path), "bytes": s.bytes} for s in found] for kind, found in kinds.items()}
    return {"removed": apply, "bytes": garbage.bytes, **listed}


def _print(console: Console, garbage: Garbage, applied: bool) -> None:
    kinds = [("stage", garbage.stages), ("evaluation", garbage.evaluations), ("signature", garbage.signatures)]
    kinds += [("work", garbage.work)]
    kinds += [("held-out set", garbage.heldout), ("token cache", garbage.tokens)]
    kinds += [("domain file", garbage.domains)]
    kinds += [("reading", garbage.readings), ("manifest", garbage.manifests), ("half-written", garbage.abandoned)]
    kinds += [("batch text", garbage.texts)]
    table = Table(title="removed" if applied else "nothing refers to", title_justify="left")
    for header in ("", "path", "MB"):
        table.add_column(header, justify="right" if header == "MB" else "left")
    for kind, found in kinds:
        for stored in found:
            table.add_row(kind, str(stored.path), _megabytes(stored))
    if table.row_count:
        show(console, table)
    counts = ", ".join(f"{len(found)} {kind}{'' if kind in ('work', 'half-written') else 's'}" for kind, found in kinds)
    done = "removed" if applied else "nothing removed; --apply removes"
    console.print(f"{done}: {counts}, {garbage.bytes / 1e6:.1f} MB")
    # A process may have written them for a run whose head it has not saved yet.
    if garbage.young:
        console.print(f"kept because less than a day old: {len(garbage.young)}")
    if ahead := sum(stored.changed > time.time() + GRACE_SECONDS for stored in garbage.young):
        console.print(f"{ahead} of them are dated in the future, because a clock was ahead; touch them")


def _megabytes(stored: Stored) -> str:
    return f"{stored.bytes / 1e6:.1f}"
