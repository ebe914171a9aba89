"""How much new text the inbox holds, and whether that is enough: without reading it where nothing has touched it since.

A timer asks every night, and mostly nothing is new, or too little. Reading the inbox then means to read all that the
model has ever learned as well, since what is new is what has no copy there.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial

from lifelong_moe.data.arrivals.inbox import Arrived
from lifelong_moe.errors import CorruptError
from lifelong_moe.retraining.bounds import LEAST_SOURCES
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.grammars import Prefix, Sha256
from lifelong_moe.storage.keys import canonical_json, content_key
from lifelong_moe.storage.plain import from_plain
from lifelong_moe.storage.remembered import SETTLED_SECONDS
from lifelong_moe.storage.stored import read_stored
from lifelong_moe.store.runs import latest_timestamp, timestamp
from pipelines.retrain.tick import Tick
from pipelines.shared.novelty import NewDocuments


@dataclass(frozen=True)
class Counts:
    """What is new in the inbox."""

    documents: int = 0
    sources: int = 0
    """Sources of these documents."""
    tokens: int = 0
    """By the champion's tokenizer."""
    near_copies: int = 0
    """Documents that are left out as near copies of what was seen before."""

    @classmethod
    def of(cls, tick: Tick, new: NewDocuments) -> Counts:
        """Count new documents, their sources and tokens."""
        sources = {document.source for document in new.documents}
        return cls(len(new.documents), len(sources), sum(tick.tokens_of(new.documents)), new.near_copies)


@dataclass(frozen=True)
class Found:
    """What a tick found in the inbox."""

    counts: Counts
    batch: Sha256 | None = None
    """The batch that these documents are; None if there are none."""
    sources: Prefix | None = None
    """Which copy of it; see :attr:`pipelines.shared.novelty.NewDocuments.sources`."""
    bad_lines: int | None = None
    """Lines that were left out."""


@dataclass(frozen=True)
class _Note:
    files: Sha256
    """Of the names, sizes, times and inodes of the inbox's files."""
    compared_with: Sha256
    found: Found


def found_before(tick: Tick, files: Arrived | None) -> Found | None:
    """What an earlier tick found, if the inbox's files and all that they are compared with are as they were.

    The text of the distributions themselves is taken to be as it was: a stage that is trained checks it.

    Args:
        tick: The present one.
        files: What lies in the inbox now; None if that is not known.
    """
    if files is None:
        return None
    if not files.number:
        return Found(Counts())
    # It comes with the store, which may be somebody else's; but no copy of a file has this one's inode and times.
    with suppress(OSError, CorruptError):
        note = read_stored(tick.record.path / "inbox.json", partial(from_plain, _Note))
        if (note.files, note.compared_with) == (files.state, compared_with(tick)):
            return note.found
    return None


def remember_found(tick: Tick, files: Arrived | None, found: Found) -> None:
    """Keep what was found for the next tick; a store that cannot be written to is looked through again."""
    # A file that is written to while its time of change does not move on would be taken for the one that was read,
    # also if that happened while others were read.
    if files is not None and files.changed_ns < settled_before(files):
        note = _Note(files.state, compared_with(tick), found)
        with suppress(OSError):
            write_atomic(tick.record.path / "inbox.json", canonical_json(asdict(note)))


def settled_before(files: Arrived) -> float:
    """Time in nanoseconds since the epoch; a file that changed before it has another time once it changes again."""
    return files.looked_ns - SETTLED_SECONDS * 1e9


def too_little(tick: Tick, new: Counts) -> str | None:
    """Why the new documents are not enough yet; None if they are."""
    if not new.documents:
        copies = f"; {near_copies_of(new.near_copies)}" if new.near_copies else ""
        return f"nothing new has arrived{copies}"
    trigger = tick.retraining.settings.trigger
    if new.documents < trigger.least_documents:
        return f"{new.documents} new documents are waiting; trigger.least_documents={trigger.least_documents}"
    # At most half of the sources are held out, and the gate needs LEAST_SOURCES of them.
    if new.sources < 2 * LEAST_SOURCES:
        return f"{new.documents} new documents are of {new.sources} source(s); {2 * LEAST_SOURCES} are needed"
    # Timestamps are ISO 8601 in UTC, so they compare as strings; "" is earlier than all.
    oldest = timestamp(time.time() - 86400 * trigger.max_days) if trigger.max_days is not None else ""
    newest = max((version.at for version in tick.head.versions_until(latest_timestamp())), default="")
    if new.tokens >= trigger.min_tokens or newest < oldest:
        return None
    return f"{new.tokens:,} new tokens are waiting; trigger.min_tokens={trigger.min_tokens:,}"


def near_copies_of(number: int) -> str:
    """Words for documents that are left out."""
    return f"{number:,} documents in the inbox are near copies of text seen before"


def compared_with(tick: Tick) -> str:
    """A hash of what decides which documents are new, and how many tokens they have."""
    head, config = tick.head, tick.config
    distributions = {name: asdict(config.distributions[name]) for name in config.evaluated}
    return content_key(
        {
            "champion": head.champion.key,
            "settled": sorted(head.batches),
            "distributions": distributions,
            "inbox": asdict(tick.retraining.settings.inbox),
        }
    )
