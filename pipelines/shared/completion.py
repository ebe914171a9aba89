"""Names that a shell completes: runs, their stages and distributions, as the store has them. Without torch.

A shell asks while somebody types, so whatever is wrong with a store completes nothing and says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import typer

from lifelong_moe.errors import LifelongError
from lifelong_moe.storage.grammars import NAME
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import RunRecord, run_names
from pipelines.shared.places import ROOT, require_plain_store


def runs(incomplete: str) -> list[str]:
    """Names of runs."""
    try:
        require_plain_store()
        return _beginning(run_names(ROOT), incomplete)
    except (LifelongError, OSError):
        return []


def stages(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of committed stages of the run that was typed before."""
    head = _head(ctx)
    return [] if head is None else _beginning(head.committed, incomplete)


def distributions(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of the distributions of the run that was typed before."""
    head = _head(ctx)
    known = {} if head is None else head.config.get("distributions")
    return _beginning(known, incomplete) if isinstance(known, dict) else []


def _head(ctx: typer.Context) -> RunHead | None:
    # After an option without its value the parser has not come to arguments yet; the run is the first of them.
    run = ctx.params.get("run") or next(iter(ctx.args), None)
    try:
        require_plain_store()
        return RunRecord(ROOT, run).head() if isinstance(run, str) else None
    except (LifelongError, OSError):
        return None


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    # A shell would read other characters than a name's.
    return sorted(name for name in names if str(name).startswith(incomplete) and NAME.allows(str(name)))
