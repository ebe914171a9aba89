"""Start or continue a run: decide which stages its name refers to, and save its head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lifelong_moe.config.load import written_config
from lifelong_moe.errors import ConfigError
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import OpenRun, RunRecord
from lifelong_moe.store.stages import StageStore
from lifelong_moe.store.versions import describe
from pipelines.shared.places import ROOT
from pipelines.shared.remembering import keep_texts
from pipelines.shared.workspace import Prepared, further_training


def open_run(record: RunRecord, prepared: Prepared, replace: bool) -> OpenRun:
    """Start or continue a run.

    Raises:
        ConfigError: If the name refers to other stages and ``replace`` is not set.
    """
    keys = tuple(planned.key for planned in prepared.plan)
    records = prepared.data.records
    data = {name: records[name].train_hash for planned in prepared.plan for name in planned.spec.uses}
    before = record.head()
    if before is not None and not replace:
        _require_same(before, prepared, data)
    written = written_config(prepared.loaded.raw)
    now: dict[str, Any] = {
        "method": prepared.config.method.value,
        "seed": prepared.config.seed,
        "config": written,
        "plan": keys,
        "names": tuple(planned.spec.name for planned in prepared.plan),
        "data": data,
        "texts": keep_texts(before, written, prepared.data, prepared.config.evaluate.keep_heldout),
        "tokenizer": prepared.data.tokenizer.hash,
    }
    if before is None:
        head = RunHead(run=record.run, **now)
    elif replace:
        # Stages that this run has trained still count as its own if the new plan contains them.
        head = RunHead(run=record.run, trained=before.trained, mlflow=before.mlflow.restarted(), **now)
    else:
        # A stage that was taken out of the plan leaves the run, but stays in the store.
        committed = tuple(key for key in before.stages if key in keys)
        head = dataclasses.replace(before, stages=committed, **now)
    opened = OpenRun(record, head)
    opened.save(head)
    return opened


def _require_same(head: RunHead, prepared: Prepared, data: Mapping[str, str]) -> None:
    """Check that the plan continues the run.

    Raises:
        ConfigError: If ticks have promoted later versions, or a stage of the plan differs from the run's.
    """
    if head.champion_id:
        raise ConfigError(
            f"run={head.run} was moved on at {head.champion.at}: {describe(head.champion)} serves, which this "
            f"configuration does not know. Go on with lifelong-moe retrain, or choose run=NAME; --replace starts over "
            f"and forgets the versions."
        )
    # Only the positions that both plans have: stages may be appended, or taken off the end.
    if any(old != planned.key for old, planned in zip(head.plan, prepared.plan, strict=False)):
        remedy = further_training(head, prepared.plan, StageStore(ROOT))
        raise ConfigError(_changed(prepared, head, data) + remedy)


def _changed(prepared: Prepared, head: RunHead, data: Mapping[str, str]) -> str:
    """Name the training text that has changed, with both hashes; else the first stage that differs."""
    # Text first: a stage's key contains its text's hash, so changed text explains a changed stage.
    run, before = prepared.config.run, head.data
    other = [name for name in data if data[name] != before.get(name, data[name])]
    if other:
        texts = ", ".join(f"{name} was {before[name][:SHORT]} and is {data[name][:SHORT]}" for name in other)
        left = {name: number for name in other if (number := len(prepared.data.records[name].left_out))}
        copies = "".join(f" {left[name]:,} near copies of held-out text are left out of {name}." for name in left)
        return (
            f"run={run} exists with other training text: {texts} (SHA-256).{copies} Choose run=NAME, or --replace to "
            f"let this name refer to the new stages."
        )
    first, old = next((new, old) for old, new in zip(head.plan, prepared.plan, strict=False) if old != new.key)
    return (
        f"run={run} exists with another configuration or other data: stage {first.spec.name} was "
        f"{old[:SHORT]} and would be {first.key[:SHORT]}. Choose run=NAME, or --replace to let this name refer to the "
        f"new stages."
    )
