"""What stands in place of batches' text once it is removed."""

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


def remembered_by(head: RunHead, written: Mapping[str, Any], version: Version, store: StageStore) -> Remembered:
    """What stands in place of text that is gone, of a version's batches too.

    Args:
        head: Of the run.
        written: The run's configuration now; see :func:`pipelines.shared.remembering.remembered`.
        version: Whose batches count.
        store: Says which text its stages read: a batch may have been split otherwise since.
    """
    base = remembered(head, written)
    records = {
        stage.data: record
        for stage in version.stages
        if stage.batch is not None
        and (record := head.texts.get(stage.data)) is not None
        and record.split_hash == store.get(stage.key).split.get(stage.data)
    }
    return dataclasses.replace(base, records={**base.records, **records})


def with_texts(head: RunHead, written: Mapping[str, Any], data: PreparedData, keep: bool) -> RunHead:
    """A head that says of all text what must be known once it is gone; arguments as for
    :func:`pipelines.shared.remembering.keep_texts`. What it says of batches that do not serve stays."""
    return dataclasses.replace(head, texts={**head.texts, **keep_texts(head, written, data, keep)})


def wait_for_text(data: PreparedData, uses: Collection[str] = ()) -> None:
    """Let nothing be trained or judged without text that only cannot be had now, as of a hub that is down.

    Args:
        data: Of a run.
        uses: Distributions whose training text is needed.

    Raises:
        TryAgainError: If training text that is needed, or held-out text, will be there another time.
    """
    for name, error in data.gone.items():
        if isinstance(error, TryAgainError) and (name in uses or name not in data.heldout):
            raise error
