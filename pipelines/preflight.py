"""Checks before torch is imported: a mistake, or a run that another process has locked, ends a command at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from lifelong_moe.config.load import LoadedConfig, as_begun, build_config, read_config
from lifelong_moe.config.names import require_name
from lifelong_moe.config.references import stored_config
from lifelong_moe.config.routing.base import Bundles
from lifelong_moe.config.run import RunConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.interop.layout.complete import with_checkpoint
from lifelong_moe.plan.memory import require_memory
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.plan.retraining import Retraining, load_retraining, read_gate
from lifelong_moe.storage.locks import locked
from lifelong_moe.store.runs import RunRecord, require_head
from pipelines.shared.launcher import require_started_once
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


def begun(config: RunConfig) -> bool | None:
    """Whether the run of that name was begun with these stages, as far as both have some; None if it does not exist."""
    if (head := RunRecord(ROOT, config.run).head()) is None:
        return None
    try:
        stored = _stages(build_config(stored_config(head.config), is_stored=True))
    except ConfigError:
        # It refers to its own machine, say. Whoever began it as today said whether generations are kept apart.
        return head.names_bundles == (config.routing.bundles != Bundles.none)
    return all(old == new for old, new in zip(stored, _stages(config), strict=False))


def _stages(config: RunConfig) -> list[Mapping[str, object]]:
    """What the key of each stage is made of, but for its text, which both readings of a file share."""
    return [spec.effective().to_json() for spec in stage_specs(config)]


def read_run(config: str, overrides: Sequence[str]) -> LoadedConfig:
    """Read a run's file, with the stages that the run was begun with."""
    return read_config(config, overrides, with_checkpoint, begun)


def read_retraining(config: str, overrides: Sequence[str]) -> Retraining:
    """Read a retraining file, with its base as the run was begun; its stages are for one machine to train."""
    found = as_begun(
        lambda is_literal: load_retraining(config, overrides, is_literal=is_literal),
        lambda found: begun(build_config(found.base, is_stored=True)),
    )
    build_config(found.base, is_stored=True).trainer.require_one_machine()
    require_started_once()
    return found
