"""Documents in files of ours, a line of JSON each; whoever has changed such a file, it is read as what it must be."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from lifelong_moe.data.formats.limits import MAX_TEXT_FILE_BYTES
from lifelong_moe.data.text.documents import Document
from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.keys import canonical_json
from lifelong_moe.storage.plain import from_plain
from lifelong_moe.storage.stored import naming, parse_json

_MOST_LINE_BYTES = 7 * MAX_TEXT_FILE_BYTES
"""Longest line: JSON writes a control character in six bytes. A sparse file is one line, however long it says it is."""


def document_rows(documents: Iterable[Document]) -> Iterator[bytes]:
    """Yield a line of JSON for each document, in the order given."""
    for document in documents:
        yield f"{canonical_json({'text': document.text, 'source': document.source})}\n".encode()


def rows_sha256(documents: Iterable[Document]) -> str:
    """SHA-256 of all lines of :func:`document_rows`."""
    digest = hashlib.sha256()
    for row in document_rows(documents):
        digest.update(row)
    return digest.hexdigest()


def read_rows(file: BufferedReader, path: Path, digest: str) -> list[Document]:
    """Read documents from where an open file stands to its end.

    Args:
        file: What :func:`document_rows` made.
        path: Its name, for messages.
        digest: SHA-256 of these bytes.

    Raises:
        CorruptError: If they are others, or no documents.
    """
    start = file.tell()
    # In constant memory, before anything is held.
    if (found := hashlib.file_digest(file, "sha256").hexdigest()) != digest:
        raise CorruptError(f"{path}: SHA-256 is {found}.")
    file.seek(start)
    return read_lines(file, path)


def read_lines(file: BinaryIO, path: Path) -> list[Document]:
    """:func:`read_rows` of bytes that are known to be what they were.

    Raises:
        CorruptError: If they are no documents.
    """
    documents = []
    # Only a newline ends a line: U+2028 may stand within a text.
    while row := file.readline(_MOST_LINE_BYTES + 1):
        if len(row) > _MOST_LINE_BYTES:
            raise CorruptError(f"{path}: a document of more than {_MOST_LINE_BYTES >> 20} MiB.")
        content = parse_json(row, path)
        with naming(path):
            documents.append(from_plain(Document, content))
    return documents
