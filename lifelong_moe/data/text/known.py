"""Documents whose number, size and hashes are known before their text is read, which often is never."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

from lifelong_moe.data.formats.progress import told
from lifelong_moe.data.text.documents import Document


@dataclass(frozen=True)
class Summary:
    """What is known of documents without their text."""

    documents: int
    bytes: int
    """Of their UTF-8 texts."""
    hashes: tuple[str, ...] | None = None
    """Of the documents, in their order; None where nobody needs them."""
    rows: str | None = None
    """SHA-256 of :func:`lifelong_moe.data.text.kept.document_rows` of them; None where nobody needs it."""


class KnownDocuments(Sequence[Document]):
    """Documents that are read when the first one is asked for, and once.

    Args:
        summary: What is known of them.
        load: Reads them.
    """

    def __init__(self, summary: Summary, load: Callable[[], Sequence[Document]]) -> None:
        self.summary = summary
        self._load = load

    @cached_property
    def opened(self) -> Sequence[Document]:
        """The documents themselves."""
        return self._load()

    def __len__(self) -> int:
        return self.summary.documents

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Document]: ...
    def __getitem__(self, index: int | slice) -> Document | Sequence[Document]:
        return self.opened[index]

    def __iter__(self) -> Iterator[Document]:
        # A generator, so that making an iterator reads nothing yet.
        yield from self.opened

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def opened(documents: Sequence[Document]) -> Sequence[Document]:
    """Documents as they are kept, read by now."""
    return documents.opened if isinstance(documents, KnownDocuments) else documents


def summary_of(documents: Sequence[Document]) -> Summary:
    """What is known of documents; those in memory are counted."""
    known = getattr(documents, "summary", None)
    if isinstance(known, Summary):
        return known
    return Summary(len(documents), sum(document.num_bytes for document in documents))


def told_of(documents: Sequence[Document], what: str) -> Iterator[Document]:
    """Yield documents, telling how far one has come; see :mod:`lifelong_moe.data.formats.progress`."""
    # A generator, so that nothing is read before the first one is asked for.
    yield from told(documents, what, summary_of(documents).bytes, lambda document: document.num_bytes)


def hashes_of(documents: Sequence[Document]) -> tuple[str, ...]:
    """Hashes of documents, in their order."""
    known = getattr(documents, "summary", None)
    if isinstance(known, Summary) and known.hashes is not None:
        return known.hashes
    # A spool knows them, too.
    if (hashes := getattr(opened(documents), "hashes", None)) is not None:
        return tuple(hashes)
    return tuple(document.hash for document in documents)
