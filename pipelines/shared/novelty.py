"""Find the new documents of the inbox.

New is what has no copy and no near copy in the champion's distributions or in a batch that was decided about.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lifelong_moe.config.data import BadLinesRule, SourceConfig
from lifelong_moe.config.retraining.operation import InboxConfig
from lifelong_moe.config.retraining.policy import HELDOUT_SOURCES
from lifelong_moe.config.run import RunConfig
from lifelong_moe.data.formats.bad_lines import BadLines
from lifelong_moe.data.formats.limits import MAX_INBOX_BYTES, Quota
from lifelong_moe.data.text.batches import BatchStore
from lifelong_moe.data.text.documents import Document, documents_hash, normalized_hash
from lifelong_moe.data.text.inbox import Arrived, Inbox, look_at_inbox, read_inbox
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
    near_copies: int
    """Documents of these files that are near copies of what was seen before, held-out text included."""
    sources: str | None = None
    """Identifies this copy of the batch if the same documents arrived before with other sources; otherwise None."""
    mode: int = SHARED
    """Permissions of the batch's files: as private as the files read."""
    bad_lines: BadLines | None = None
    """Lines that were left out because they hold no document, if that is allowed."""


def read_texts(config: RunConfig, known: Remembered | None = None) -> Texts:
    """Read the documents of a run's distributions; near copies of held-out text are left out of the training text."""
    sources = {name: config.distributions[name] for name in config.evaluated}
    found = documents.read_texts(sources, config.trained, CACHE, known or Remembered())
    found.remember()
    return found


def new_documents(inbox: InboxConfig, texts: Texts, settled: Iterable[str], batches: BatchStore) -> NewDocuments:
    """Read the inbox and leave out documents that were seen before, and near copies of them.

    Args:
        inbox: The inbox's settings.
        texts: Texts of the champion's distributions.
        settled: Hashes of batches that a tick has decided about.
        batches: The store of these batches.

    Raises:
        DataError: ``file:line: reason``.
    """
    bad = BadLines(inbox.max_bad_lines) if inbox.bad_lines == BadLinesRule.quarantine else None
    found = _arrived(inbox, bad)
    if found is None:
        return NewDocuments([], documents_hash([]), "", [], 0, 0, bad_lines=bad)
    # A text that stands in several files gets the source which the last of them names.
    new = {normalized_hash(document.text): document for document in found.documents}
    held = [document for documents in texts.heldout.values() for document in documents]
    seen = held + [d for corpus in texts.corpora.values() for d in (*corpus.train, *corpus.near_copies)]
    there = {batch: batches.has_text(batch) for batch in settled}
    seen += [document for batch in there if there[batch] for document in batches.documents(batch)]
    # Of removed text only hashes are left, which find equal documents but no near copies.
    removed = set().union(*(batches.normalized(batch) for batch in there if not there[batch]))
    for digest in (*removed, *(normalized_hash(document.text) for document in seen)):
        new.pop(digest, None)
    # A near copy in the training text would teach what the gate measures on; one in the held-out text would measure
    # what was trained on.
    left = list(new.values())
    either = zip(near_copies(left, seen, may_contain=True), near_copies(left, held, may_contain=False), strict=True)
    copies = [one or other for one, other in either]
    documents = [document for document, is_copy in zip(left, copies, strict=True) if not is_copy]
    digest = documents_hash(documents)
    name, known = f"{found.distribution or 'batch'}-{digest[:8]}", len(found.documents) - len(left)
    sources = batches.sources(documents)
    return NewDocuments(documents, digest, name, found.files, known, sum(copies), sources, found.mode, bad)


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
    found = _arrived(inbox, BadLines(inbox.max_bad_lines) if inbox.bad_lines == BadLinesRule.quarantine else None)
    return set() if found is None else {document.hash for document in found.documents}


def _arrived(inbox: InboxConfig, bad_lines: BadLines | None) -> Inbox | None:
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
        return read_inbox(Path(inbox.path), source, bad_lines)
    from lifelong_moe.data.text.hub import hub_documents

    documents = list(hub_documents(source, Quota(MAX_INBOX_BYTES, "the inbox")))
    return Inbox(documents, [{"name": f"{inbox.hf}@{inbox.revision}"}], None) if documents else None


def batch_source(files: str, heldout_fraction: float, heldout_sources: int = HELDOUT_SOURCES) -> SourceConfig:
    """A kept batch as a distribution's source."""
    return SourceConfig(files=files, heldout_fraction=heldout_fraction, heldout_sources=heldout_sources)
