"""Records and held-out documents that replace the text of batches once it is removed."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from lifelong_moe.data.tokens.prepare import PreparedData
from lifelong_moe.data.tokens.records import Remembered
from lifelong_moe.errors import TryAgainError
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.stages import StageStore
from lifelong_moe.store.versions import Version
from pipelines.shared.remembering import keep_texts, remembered


def remembered_by(head: RunHead, written: Mapping[str, Any] | None, version: Version, store: StageStore) -> Remembered:
    """Records of text that may be gone, including that of a version's batches.

    Args:
        head: The run's head.
        written: The run's configuration now; see :func:`pipelines.shared.remembering.remembered`.
        version: The version whose batches are included.
        store: Tells which text the stages read.
    """
    base = remembered(head, written)
    # A batch may have been split anew since the stage read it; then its record describes other text.
    records = {
        stage.data: record
        for stage in version.stages
        if stage.batch is not None
        and (record := head.texts.get(stage.data)) is not None
        and record.split_hash == store.get(stage.key).split.get(stage.data)
    }
    return dataclasses.replace(base, records={**base.records, **records})


def with_texts(head: RunHead, written: Mapping[str, Any], data: PreparedData, keep: bool) -> RunHead:
    """Add records of all text to a head; arguments as for :func:`pipelines.shared.remembering.keep_texts`."""
    # Records of batches that do not serve stay: a rollback may need them.
    return dataclasses.replace(head, texts={**head.texts, **keep_texts(head, written, data, keep)})


def wait_for_text(data: PreparedData, uses: Collection[str] = ()) -> None:
    """Stop if text is unreachable only for now, such as that of a hub which is down.

    Args:
        data: What was read for a run.
        uses: Distributions whose training text is needed.

    Raises:
        TryAgainError: If needed training text, or held-out text, is temporarily unreachable.
    """
    for name, error in data.gone.items():
        if isinstance(error, TryAgainError) and (name in uses or name not in data.heldout):
            raise error
