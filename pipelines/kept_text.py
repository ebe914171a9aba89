"""What stands in place of batches' text once it is removed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lifelong_moe.data.prepare import PreparedData
from lifelong_moe.data.records import Remembered, TextRecord
from lifelong_moe.stages.store import StageStore
from lifelong_moe.stages.versions import Head, Version
from pipelines.remembering import keep_texts, remembered


def remembered_by(head: Head, written: Mapping[str, Any], version: Version, store: StageStore) -> Remembered:
    """What stands in place of text that is gone, of a version's batches too.

    Args:
        head: Of the run.
        written: The run's configuration now; see :func:`pipelines.remembering.remembered`.
        version: Whose batches count.
        store: Says which text its stages read: a batch may have been split otherwise since.
    """
    base, texts = remembered(head, written), head.get("texts", {})
    records = {
        stage.data: record
        for stage in version.stages
        if stage.batch is not None and stage.data in texts
        for record in [TextRecord.from_json(texts[stage.data])]
        if record.split_hash == store.get(stage.key).split.get(stage.data)
    }
    return dataclasses.replace(base, records={**base.records, **records})


def note_texts(head: Head, written: Mapping[str, Any], data: PreparedData, keep: bool) -> None:
    """Let a head say of all text what must be known once it is gone; arguments as for
    :func:`pipelines.remembering.keep_texts`. What it says of batches that do not serve stays."""
    head["texts"] = {**head.get("texts", {}), **keep_texts(head, written, data, keep)}
