"""Find the new documents of the inbox.

New is what has no copy and no near copy in the champion's distributions or in a batch that was decided about.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from lifelong_moe.config.data import BadLinesRule, SourceConfig
from lifelong_moe.config.retraining.operation import InboxConfig
from lifelong_moe.config.retraining.policy import HELDOUT_SOURCES
from lifelong_moe.config.run import RunConfig
from lifelong_moe.data.arrivals.batches import BatchStore
from lifelong_moe.data.arrivals.inbox import Arrived, FileRead, Glance, glance_at_inbox, look_at_inbox
from lifelong_moe.data.arrivals.inbox_rows import ReadFile
from lifelong_moe.data.formats.bad_lines import BadLines
from lifelong_moe.data.formats.limits import MAX_INBOX_BYTES, Quota
from lifelong_moe.data.text.documents import Document, documents_hash, normalized_hash
from lifelong_moe.data.text.known_hashes import WIDTH, HashIndex, KnownText
from lifelong_moe.data.text.near_copies import near_copies
from lifelong_moe.data.tokens import texts as documents
from lifelong_moe.data.tokens.records import Remembered
from lifelong_moe.data.tokens.texts import Texts
from lifelong_moe.storage.keys import content_key
from lifelong_moe.storage.modes import SHARED
from pipelines.shared.places import CACHE


@dataclass(frozen=True)
class NewDocuments:
    """New documents, about which a tick decides."""

    documents: list[Document]
    """Never seen before, without duplicates; empty if nothing new has arrived."""
    hash: str
    """Identity of the batch: of its documents and their sources, whatever the names and the order of the files."""
    name: str
    """Name of the distribution that they would form."""
    files: list[dict[str, Any]]
    """Name, size and hash of each file read."""
    known: int
    """Documents of these files that were seen before, or repeat a new one."""
    copies: frozenset[str]
    """Hashes of documents of these files that are near copies of what was seen before, held-out text included."""
    sources: str | None = None
    """Identifies this copy of the batch if the same documents arrived before with other sources; otherwise None."""
    mode: int = SHARED
    """Permissions of the batch's files: as private as the files read."""
    bad_lines: BadLines | None = None
    """Lines that were left out because they hold no document, if that is allowed."""

    @property
    def near_copies(self) -> int:
        """Number of these near copies."""
        return len(self.copies)


@dataclass(frozen=True)
class Known:
    """All text that the inbox's documents are compared with."""

    texts: list[KnownText]
    """Each text once: of the champion's distributions, and of batches that a tick has decided about."""
    heldout: list[Sequence[Document]]
    """Held-out documents, which are among these."""
    removed: frozenset[bytes]
    """Of documents whose text was removed, the hashes that equal ones share, which find no near copies."""
    learned: list[str]
    """Batches that are distributions of the champion, as the one their text is read for."""

    def require_undamaged(self, batches: BatchStore) -> None:
        """Verify what is read as a distribution's file, and so without the hash that a batch has.

        Raises:
            CorruptError: If a batch is absent or damaged.
        """
        for batch in self.learned:
            batches.manifest(batch)


def read_texts(config: RunConfig, known: Remembered | None = None) -> Texts:
    """Read the documents of a run's distributions; near copies of held-out text are left out of the training text."""
    sources = {name: config.distributions[name] for name in config.evaluated}
    return documents.read_texts(sources, config.trained, CACHE, known or Remembered())


def known_text(config: RunConfig, texts: Texts, settled: Iterable[str], batches: BatchStore) -> Known:
    """What documents are compared with; none of it is read yet.

    Args:
        config: The champion's.
        texts: Texts of its distributions.
        settled: Hashes of batches that a tick has decided about.
        batches: The store of these batches.
    """
    found = [KnownText.of(split) for split in texts.splits.values()]
    kept = [documents for name, documents in texts.heldout.items() if name not in texts.splits]
    found += map(KnownText.there, kept)
    # A batch that was learned is a distribution, too, whose documents are all of it: it is not read twice.
    files = {_whole_file(config.distributions[name]) for name, split in texts.splits.items() if not split.duplicates}
    removed, learned = set[bytes](), list[str]()
    for batch in settled:
        path = batches.path(batch)
        if not batches.has_text(batch):
            removed |= {bytes.fromhex(digest)[:WIDTH] for digest in batches.normalized(batch)}
        elif str(path) in files:
            learned.append(batch)
        else:
            found.append(KnownText.of_file(path, batch, partial(batches.documents, batch)))
    return Known(found, list(texts.heldout.values()), frozenset(removed), learned)


def new_documents(inbox: InboxConfig, known: Known, batches: BatchStore, read: Glance | None = None) -> NewDocuments:
    """Read the inbox and leave out documents that were seen before, and near copies of them.

    All that is known is read, as a stream. No index is believed: this decides what is learned.

    Args:
        inbox: The inbox's settings.
        known: What documents are compared with.
        batches: The store of batches.
        read: What was read of the inbox a moment ago; what it lacks is read again.

    Raises:
        DataError: ``file:line: reason``.
    """
    # Of files that nothing has touched a glance has no text.
    glance = glance_at(inbox, {}) if read is None or read.is_partial else read
    found, bad = glance.inbox(), glance.bad_lines
    if found is None:
        return NewDocuments([], documents_hash([]), "", [], 0, frozenset(), bad_lines=bad)
    known.require_undamaged(batches)
    # A text that stands in several files gets the source which the last of them names.
    new = {normalized_hash(document.text): document for document in found.documents}
    by_same = {bytes.fromhex(digest)[:WIDTH]: document for digest, document in new.items()}
    seen = HashIndex(CACHE).read(by_same, known.texts) | known.removed
    left = [document for same, document in by_same.items() if same not in seen]
    # A near copy in the training text would teach what the gate measures on; one in the held-out text would measure
    # what was trained on.
    held = chain.from_iterable(known.heldout)
    stream = chain.from_iterable(text.documents() for text in known.texts)
    either = zip(near_copies(left, stream, may_contain=True), near_copies(left, held, may_contain=False), strict=True)
    copies = [one or other for one, other in either]
    documents = [document for document, is_copy in zip(left, copies, strict=True) if not is_copy]
    digest = documents_hash(documents)
    return NewDocuments(
        documents,
        digest,
        f"{found.distribution or 'batch'}-{digest[:8]}",
        found.files,
        len(found.documents) - len(left),
        frozenset(document.hash for document, is_copy in zip(left, copies, strict=True) if is_copy),
        batches.sources(documents),
        found.mode,
        bad,
    )


def look_at(inbox: InboxConfig) -> Arrived | None:
    """Which files lie in the inbox; None if only reading tells.

    Raises:
        DataError: The manifest is malformed, or there are too many files.
    """
    if inbox.path is not None:
        return look_at_inbox(Path(inbox.path))
    # A revision of the hub never changes.
    return Arrived(1, content_key([inbox.hf, inbox.revision]), 0, time.time_ns())


def arrived(inbox: InboxConfig) -> set[str]:
    """Hashes of all documents in the inbox, seen before or not."""
    return {row.hash for file in glance_at(inbox, {}).files for row in file.rows()}


def glance_at(inbox: InboxConfig, before: Mapping[str, ReadFile]) -> Glance:
    """Read what has arrived since an earlier glance, by the same settings.

    Raises:
        DataError: ``file:line: reason``.
    """
    bad = BadLines(inbox.max_bad_lines) if inbox.bad_lines == BadLinesRule.quarantine else None
    source = SourceConfig(
        files=inbox.path,
        hf=inbox.hf,
        name=inbox.name,
        revision=inbox.revision,
        split=inbox.split,
        text_field=inbox.text_field,
        source_field=inbox.source_field,
    )
    if inbox.path is not None:
        return glance_at_inbox(Path(inbox.path), source, bad, before)
    from lifelong_moe.data.text.hub import hub_documents

    documents = list(hub_documents(source, Quota(MAX_INBOX_BYTES, "the inbox")))
    # It has no file that could tell whether it has changed.
    found = {"name": f"{inbox.hf}@{inbox.revision}"}
    return Glance([FileRead("", found, (), SHARED, 0, documents, is_whole=False)], None)


def _whole_file(source: SourceConfig) -> str | None:
    """The file of a distribution that is read as a kept batch is, each of its documents; None of any other one."""
    if not isinstance(source.files, str):
        return None
    whole = batch_source(source.files, source.heldout_fraction, source.heldout_sources)
    return source.files if source == whole else None


def batch_source(files: str, heldout_fraction: float, heldout_sources: int = HELDOUT_SOURCES) -> SourceConfig:
    """A kept batch as a distribution's source."""
    return SourceConfig(files=files, heldout_fraction=heldout_fraction, heldout_sources=heldout_sources)
