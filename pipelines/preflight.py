"""Checks before torch is imported: a mistake, or a run that another process has locked, ends a command at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from lifelong_moe.config.names import require_name
from lifelong_moe.config.run import RunConfig
from lifelong_moe.plan.memory import require_memory
from lifelong_moe.plan.retraining import Retraining, load_retraining, read_gate
from lifelong_moe.storage.locks import locked
from lifelong_moe.store.runs import RunRecord, require_head
from pipelines.shared.places import ROOT


def check_stage(run: str, stage: str, gate: list[str] | None) -> list[str]:
    """Check that run and stage exist and that the gate's settings are valid; returns the settings."""
    # Only for its errors: the command itself reads the settings again.
    read_gate(gate or [])
    require_head(ROOT, run).require_stage(require_name(stage, "STAGE"))
    return gate or []


def check_memory(config: RunConfig) -> None:
    """Check that this machine can hold what a run needs, before text is read, torch imported or a process started."""
    require_memory(config)


def run_lock(run: str) -> AbstractContextManager[None]:
    """The lock of an existing run."""
    # A run that does not exist is refused before a lock file is made for it.
    require_head(ROOT, run)
    return locked(RunRecord(ROOT, run).lock_path, f"run {run}")


def read_retraining(config: str, overrides: Sequence[str]) -> Retraining:
    """Read a retraining file, with its base as the run was begun."""
    found = load_retraining(config, overrides)
    head = RunRecord(ROOT, found.run).head()
    if head is None or head.names_bundles:
        return found
    return load_retraining(config, overrides, is_literal=True)
