"""Records of a run's text in its head, which let the run continue when the text is gone. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lifelong_moe.data.tokens.records import HeldoutStore, Remembered, TextRecord
from lifelong_moe.data.tokens.tokenizer import Tokenizer
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.stages import StageStore
from pipelines.shared.places import CACHE, ROOT

if TYPE_CHECKING:
    from lifelong_moe.data.tokens.prepare import PreparedData


def remembered(head: RunHead | None, written: Mapping[str, Any] | None) -> Remembered:
    """What a run knows about its text without reading it.

    Args:
        head: The run's head; None before the first start.
        written: The configuration now, as written. A record counts only if its distribution is still configured alike.
            None for the head's own, which may be somebody else's: it chooses files below this directory only.
    """
    before: Mapping[str, Any] = head.config if head is not None else {}
    # `mlruns`, where batches are, and the cache may be links.
    within = None if written is not None else (Path(), ROOT, CACHE)
    written = before if written is None else written
    now, then = (config.get("distributions") for config in (written, before))
    if head is None or not isinstance(now, Mapping) or not isinstance(then, Mapping):
        # An interpolation of the whole section: what it meant then cannot be compared.
        return Remembered(within=within)
    records = {name: record for name, record in head.texts.items() if name in now and now[name] == then.get(name)}

    def tokenizer() -> Tokenizer | None:
        # The first stage stores the former file's tokenizer, and the new file may hold another.
        if _tokenizer_file(written) != _tokenizer_file(before):
            return None
        store = StageStore(ROOT)
        first = store.find(head.plan[0]) if head.plan else None
        return None if first is None else store.tokenizer(first)

    def added(index: int) -> Tokenizer | None:
        store = StageStore(ROOT)
        stage = store.find(head.plan[index]) if index < len(head.plan) else None
        return None if stage is None else store.tokenizers(stage)[-1]

    return Remembered(records, HeldoutStore(ROOT), tokenizer, added, within)


def _tokenizer_file(config: Mapping[str, Any]) -> Any:
    section = config.get("tokenizer")
    return section.get("file") if isinstance(section, Mapping) else section


def keep_texts(
    head: RunHead | None, written: Mapping[str, Any], data: PreparedData, keep: bool
) -> dict[str, TextRecord]:
    """Store the held-out documents, if they are kept, and return the text records for the head.

    Args:
        head: The head so far; None before the first start.
        written: The configuration now, as written.
        data: What was read for it.
        keep: See ``evaluate.keep_heldout``.
    """
    store, before = HeldoutStore(ROOT), remembered(head, written).records
    now = dict(data.records)
    for name, record in now.items():
        is_kept = keep and name in data.heldout_documents
        now[name] = replace(record, kept=store.add(data.heldout_documents[name], data.mode(name)) if is_kept else None)
    # Distributions that are not read now keep their records: a later plan may name them again.
    return {**before, **now}
