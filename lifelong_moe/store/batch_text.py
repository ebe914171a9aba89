"""Which text of batches a run lets go (``inbox.keep_text``), asked of its head. Torch-free.

A head says how its last tick kept text (``keep_text``), what was decided about batches (``batches``), which may have
left text without a decision (``open``, in the order in which they were looked at), which waits (``waiting``), and what
must be known of text that is gone (``texts``). As the answer is in the head, what a crash kept from being removed goes
at the next tick.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lifelong_moe.config.data import KeepText
from lifelong_moe.data.text.batches import BatchStore
from lifelong_moe.data.tokens.records import TextRecord
from lifelong_moe.storage.directories import remove_directory
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import require_head


def removable(head: RunHead, *, working: bool = False) -> Iterator[str]:
    """Batches whose text a run lets go, there or not.

    Args:
        head: Of the run.
        working: Whether a tick may be at work, which needs the batch that it looked at last.
    """
    keep = head.keep_text
    if keep == KeepText.always:
        return
    for batch, known in head.batches.items():
        if keep == KeepText.never or (known.outcome == "promoted" and known.name in head.texts):
            yield batch
    still_open = [batch for batch in head.open if batch not in head.batches]
    # What waits, or was planned, comes again.
    needed = [*still_open[-1:], head.waiting] if working or keep == KeepText.until_promoted else []
    yield from (batch for batch in still_open if batch not in needed)


def removable_texts(heads: Mapping[str, RunHead], of: Iterable[str], *, working: bool = False) -> dict[str, RunHead]:
    """Batches whose text some runs let go and no other run keeps, each with the head of one that does.

    Args:
        heads: Of all runs, by name.
        of: Names of those whose text may go.
        working: See :func:`removable`; other runs always may be.
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
    """Remove a batch's text, and the tokens of its training text; returns the bytes of text.

    Args:
        root: ``mlruns``.
        cache: ``data/cache``.
        batch: Its hash.
        head: Of the run that lets it go.
    """
    freed = BatchStore(root).remove_text(batch)
    for record in _records(head, batch):
        for path in cache.glob(f"tokens/{record.train_hash[:SHORT]}-*/"):  # whichever tokenizer made them
            remove_directory(path)
    return freed


def _keeps(head: RunHead, batch: str) -> bool:
    """Whether a run looked at a batch and may read its text again."""
    knows = batch in head.batches or batch in head.open or batch == head.waiting
    return knows and batch not in removable(head, working=True)


def _records(head: RunHead, batch: str) -> list[TextRecord]:
    """What a head says of the text of a batch that was learned."""
    names = {stage.data for version in head.versions for stage in version.stages if stage.batch == batch}
    return [head.texts[name] for name in sorted(names) if name in head.texts]
