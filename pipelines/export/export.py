"""`lifelong-moe export`: check what is asked for, without torch; write it whole, compare both sides, and sign it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lifelong_moe.errors import ConfigError
from lifelong_moe.interop.adapter import require_adapter, unread_adapter
from lifelong_moe.interop.layout.kept import Kept
from lifelong_moe.interop.layout.writing import unread
from lifelong_moe.interop.single import config_of, single_architecture
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.cost import count_parameters
from lifelong_moe.plan.disk import require_space
from lifelong_moe.store.runs import require_head
from lifelong_moe.store.stages import CommittedStage, StageStore
from pipelines.export.target import require_target
from pipelines.shared.options import ExportFormat, ExportRequest
from pipelines.shared.places import ROOT

FLOAT32 = 4
"""Bytes of a number."""


@dataclass(frozen=True)
class Order:
    """An export that can be carried out."""

    run: str
    store: StageStore
    stage: CommittedStage
    kept: Kept
    target: Path
    generations: Sequence[int | None]
    """Numbers of the generations that go out. None is all of them together, in a model without bundles."""
    asked: ExportRequest
    warnings: Sequence[str]


def export_run(run: str, asked: ExportRequest, console: Console) -> Mapping[str, Any]:
    """Write a model as folders that others read.

    Args:
        run: A run.
        asked: Which of its models, in which form, and where.
        console: Where people read.

    Raises:
        ConfigError: There is no such model, no architecture has it, or something else stands at the place.
        CorruptError: What was written computes something else than the model; it is not left there.
    """
    order = _checked(run, asked)
    for warning in order.warnings:
        console.print(warning, style="yellow")
    # Imported here: what the user named is checked before torch is imported, which takes seconds.
    from pipelines.export.write import write

    return write(order, console)


def _checked(run: str, asked: ExportRequest) -> Order:
    """Everything that can be known before a number is read."""
    store = StageStore(ROOT)
    stage = store.get(require_head(ROOT, run).require_stage(asked.stage))
    kept = Kept(partial(store.kept_text, stage))
    generations = _chosen(stage.architecture, asked)
    if asked.format == ExportFormat.peft:
        for one in generations[asked.every :]:
            require_adapter(stage.architecture, one)
    forms = [one if asked.format == ExportFormat.hf else 0 for one in generations]
    singles = [single_architecture(stage.architecture, one) for one in forms]
    configs = [config_of(single, kept.config) for single in singles]
    target = require_target(asked.to, force=asked.force, signs=store.keys.private is not None)
    needed = sum(count_parameters(single).total for single in singles) * FLOAT32
    require_space(target.parent, needed, f"--to={asked.to}")
    warnings = list(dict.fromkeys(said for config in configs for said in unread(config)))
    if asked.format == ExportFormat.peft:
        warnings += [said for one in generations if one for said in unread_adapter(stage.architecture, one)]
    return Order(run, store, stage, kept, target, generations, asked, warnings)


def _chosen(architecture: Architecture, asked: ExportRequest) -> list[int | None]:
    names = [generation.stage for generation in architecture.generations]
    if not architecture.routing.by_generation or len(names) == 1:
        if asked.every or asked.generation not in (None, *(names if len(names) == 1 else ())):
            given = "--all" if asked.every else f"--generation={asked.generation}"
            raise ConfigError(f"{given}: the model has no generations that go out by themselves; leave it out.")
        return [None]
    if asked.every and asked.generation is not None:
        raise ConfigError("--all and --generation exclude each other; give one.")
    if asked.every:
        return [*range(len(names))]
    if asked.generation not in names:
        given = "" if asked.generation is None else f"--generation={asked.generation} is unknown. "
        raise ConfigError(f"{given}Give --all, or --generation with one of {', '.join(names)}.")
    return [names.index(asked.generation)]
