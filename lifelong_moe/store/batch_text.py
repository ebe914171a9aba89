"""Decide from a run's head which batches may lose their text (``inbox.keep_text``), and remove it. Torch-free.

The head records the policy of the last tick (``keep_text``), the settled batches (``batches``), the unsettled ones that
may have left text, oldest first (``open``), the one that waits (``waiting``), and the metadata that outlives a text
(``texts``). Since the head alone decides, text that a crash left behind is removed by the next tick.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lifelong_moe.config.data import KeepText
from lifelong_moe.data.arrivals.batches import BatchStore
from lifelong_moe.data.tokens.records import TextRecord
from lifelong_moe.storage.directories import remove_directory
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import require_head

_OF_ANY_TOKENIZER = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}")


def removable(head: RunHead, *, working: bool = False) -> Iterator[str]:
    """Batches whose text this run no longer needs, whether or not it is still on disk.

    Args:
        head: The run's head.
        working: Whether a tick may be running; it needs the batch that it opened last.
    """
    keep = head.keep_text
    if keep == KeepText.always:
        return
    for batch, known in head.batches.items():
        # Without its metadata in the head, a promoted text could be neither identified nor measured once it is gone.
        if keep == KeepText.never or (known.outcome == "promoted" and known.name in head.texts):
            yield batch
    still_open = [batch for batch in head.open if batch not in head.batches]
    # The next tick reopens the waiting batch, and the last open one may be part of a plan: both need their text.
    needed = [*still_open[-1:], head.waiting] if working or keep == KeepText.until_promoted else []
    yield from (batch for batch in still_open if batch not in needed)


def removable_texts(heads: Mapping[str, RunHead], of: Iterable[str], *, working: bool = False) -> dict[str, RunHead]:
    """Batches whose text the named runs no longer need and no other run keeps.

    Args:
        heads: The heads of all runs, by name.
        of: Names of the runs whose text may go.
        working: See :func:`removable`, for the named runs; a tick may be running on any other.

    Returns:
        Each batch with the head of one of the named runs, which holds the metadata of its text.
    """
    return {
        batch: heads[name]
        for name in of
        for batch in removable(heads[name], working=working)
        if not any(_keeps(head, batch) for other, head in heads.items() if other != name)
    }


def read_heads(root: Path) -> dict[str, RunHead]:
    """The heads of all runs under ``mlruns``."""
    names = sorted(path.parent.name for path in root.glob("runs/*/head.json"))
    return {name: require_head(root, name) for name in names}


def remove_batch_text(root: Path, cache: Path, batch: str, head: RunHead) -> int:
    """Remove a batch's text and the token shards of its training text; return the bytes of text freed.

    Args:
        root: The ``mlruns/`` directory.
        cache: The ``data/cache/`` directory.
        batch: Hash of the batch.
        head: A head from :func:`removable_texts`.
    """
    # Shards are found by the hash of the text, which the head still knows.
    freed = BatchStore(root).remove_text(batch)
    for record in _records(head, batch):
        for path in cache.glob(f"tokens/{record.train_hash[:SHORT]}-*/"):
            if _OF_ANY_TOKENIZER.fullmatch(path.name):
                remove_directory(path)
    return freed


def _keeps(head: RunHead, batch: str) -> bool:
    """Whether a run has opened a batch and may read its text again."""
    # Other runs hold locks of their own, so a tick of theirs may be running: assume that one is.
    knows = batch in head.batches or batch in head.open or batch == head.waiting
    return knows and batch not in removable(head, working=True)


def _records(head: RunHead, batch: str) -> list[TextRecord]:
    """Metadata of the texts that stages of this run learned from a batch."""
    names = {stage.data for version in head.versions for stage in version.stages if stage.batch == batch}
    return [head.texts[name] for name in sorted(names) if name in head.texts]
