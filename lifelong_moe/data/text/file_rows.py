"""Remember the documents of each large file, so that a distribution that grows reads what is new in it.

``cache/manifests/<key>.rows`` is named by all that a file's documents depend on: its SHA-256, its kind and the settings
by which it is read. It holds what a :class:`~lifelong_moe.data.text.spool.Spool` knows of each document, and the text
of those that were held out; of training text only hashes and numbers. Whatever does need the text reads the file, and
compares each document with its row.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.formats.compression import COMPRESSED
from lifelong_moe.data.formats.outcomes import FileOutcome, Outcome
from lifelong_moe.data.formats.streams import OpenFile, open_file
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.text.files import FilesReading, ReadNow, mode_of, reader_of
from lifelong_moe.data.text.jsonl import known_jsonl
from lifelong_moe.data.text.kept import document_rows, read_lines
from lifelong_moe.data.text.manifest import FOLDER, ROWS, SeenFile, hashed_file
from lifelong_moe.data.text.spool import ROW, SpooledDocuments
from lifelong_moe.errors import CorruptError, DataError
from lifelong_moe.storage.files import new_file
from lifelong_moe.storage.grammars import Sha256
from lifelong_moe.storage.keys import SHORT, canonical_json, content_key
from lifelong_moe.storage.plain import PlainError, from_plain
from lifelong_moe.storage.plain_files import open_stored
from lifelong_moe.storage.remembered import state_of
from lifelong_moe.storage.stored import parse_json

VERSION = 2
"""Raised whenever the same file would give other rows."""
LEAST_BYTES = 1 << 20
"""Smaller files are read each time that one of their distribution has changed."""
_MOST_HEAD_BYTES = 64 << 20
_DIGEST_BYTES = 32
_AT_ONCE = 1 << 20
"""Bytes that are hashed at once."""


@dataclass(frozen=True)
class _Head:
    """First line of a file of rows."""

    key: Sha256
    outcome: Outcome
    note: str
    documents: int
    text_bytes: int
    held_bytes: int
    excess_bytes: int
    name_bytes: int
    held: tuple[int, ...]
    """Numbers of the documents whose text follows."""
    origins: tuple[str, ...]
    """What follows the file's name in the origin of each of them."""

    def __post_init__(self) -> None:
        if min(self.documents, self.text_bytes, self.held_bytes, self.excess_bytes, self.name_bytes) < 0:
            raise CorruptError("a number is out of its range.")
        if len(self.origins) != len(self.held) or not all(0 <= number < self.documents for number in self.held):
            raise CorruptError("a document is not of the file.")


class FileRows:
    """A file that was read before; see :class:`lifelong_moe.data.text.files.ReadBefore`.

    Args:
        path: The file.
        config: How it is read.
        seen: The file as it is now.
        head: What is known of it.
        body: Rows, names of sources and held documents, in bytes.
    """

    def __init__(self, path: Path, config: SourceConfig, seen: SeenFile, head: _Head, body: NDArray[np.uint8]) -> None:
        self._path, self._config, self.seen, self._head, self._body = path, config, seen, head, body
        self.name, self.num_bytes = str(path), head.text_bytes
        outcome = FileOutcome(self.name, head.outcome, head.documents, head.note)
        self.read = ReadNow(outcome, head.held_bytes, head.excess_bytes)

    @property
    def rows(self) -> NDArray[np.void]:
        """Of its documents."""
        return self._body[: self._head.documents * ROW.itemsize].view(ROW)

    @property
    def names(self) -> bytes:
        """Of their sources."""
        begin = self._head.documents * ROW.itemsize
        return self._body[begin : begin + self._head.name_bytes].tobytes()

    @cached_property
    def _held(self) -> dict[int, Document]:
        begin = self._head.documents * ROW.itemsize + self._head.name_bytes
        documents = read_lines(io.BytesIO(self._body[begin:].tobytes()), self._path)
        each = zip(self._head.held, documents, self._head.origins, strict=True)
        # Not as written: the file may have another name now.
        return {number: replace(document, origin=f"{self.name}{origin}") for number, document, origin in each}

    def held(self) -> dict[int, Document]:
        """Documents that were held out, by their number in the file."""
        return self._held

    def documents(self) -> Iterator[Document]:
        """Read the file.

        Raises:
            DataError: It holds other documents than it did.
        """
        hashes, number = memoryview(self.rows["hash"].tobytes()), 0
        # What only a changed file holds, since it was read strictly before.
        with suppress(AttributeError, KeyError, RecursionError, TypeError, ValueError), open_file(self._path) as file:
            for document in self._parsed(file):
                if len(document.text.strip()) >= self._config.min_chars:
                    digest = hashlib.sha256(document.text.encode("utf-8")).digest()
                    if digest != hashes[32 * number : 32 * number + 32]:
                        break
                    number += 1
                    yield document
            else:
                if number == self._head.documents:
                    return
        raise DataError(f"{self._path}: has changed since this command began; start it again.")

    def _parsed(self, file: OpenFile) -> Iterator[Document]:
        if self._path.suffix.lower() != ".jsonl":
            return reader_of(self._path)(file, self._config)
        return known_jsonl(file, self._config.text_field, self._config.source_field, self._config.answer_field)


class RowsCache:
    """What is remembered of the files of a distribution.

    Args:
        config: The distribution.
        cache: The ``data/cache/`` directory.
        files: Files as they were when the distribution was last read.
    """

    def __init__(self, config: SourceConfig, cache: Path, files: Mapping[str, SeenFile]) -> None:
        self._config, self._folder, self._files = config, cache / FOLDER, files
        # Where nothing is remembered no file need be hashed to know.
        self._is_empty = next(self._folder.glob(f"*{ROWS}"), None) is None

    def find(self, file: OpenFile) -> FileRows | None:
        """What is remembered of an open file; None if it has to be read."""
        if self._is_empty or file.portion.packed_bytes < LEAST_BYTES:
            return None
        state, known = state_of(file.data), self._files.get(str(file.path))
        seen = known if known is not None and known.state == state else hashed_file(file.data)
        key = self._key(file.path, seen.sha256)
        try:
            with open_stored(self._path(key)) as stored:
                head, body = _read(stored, self._path(key), key)
            return FileRows(file.path, self._config, seen, head, body)
        # Missing or damaged is the same: the file is read.
        except (OSError, CorruptError, PlainError):
            return None

    def write(self, reading: FilesReading, heldout: Sequence[Document]) -> None:
        """Remember the files that were read; a cache that cannot be written to forgets.

        Args:
            reading: After all files were read.
            heldout: What is held out of them.
        """
        assert isinstance(heldout, SpooledDocuments)
        for name, read in reading.new.items():
            seen = reading.seen[name]
            # A file may have gone since.
            with suppress(OSError):
                if seen is not None and seen.sha256.strip("0") and Path(name).stat().st_size >= LEAST_BYTES:
                    self._write(Path(name), seen, read, heldout)

    def _write(self, path: Path, seen: SeenFile, read: ReadNow, heldout: SpooledDocuments) -> None:
        rows, names, held = heldout.of_file(str(path))
        if len(rows) != read.outcome.documents:
            return
        key, texts = self._key(path, seen.sha256), b"".join(document_rows(held.values()))
        outcome, num_bytes = read.outcome, int(rows["bytes"].sum())
        numbers = (outcome.documents, num_bytes, read.held_bytes, read.excess_bytes, len(names), tuple(held))
        origins = tuple(document.origin.removeprefix(str(path)) for document in held.values())
        head = asdict(_Head(key, outcome.outcome, outcome.note, *numbers, origins))
        digest = hashlib.sha256()
        with new_file(self._path(key), mode_of([path])) as work, work.open("wb") as file:
            for part in (f"{canonical_json(head)}\n".encode(), rows.tobytes(), names, texts):
                digest.update(part)
                file.write(part)
            file.write(digest.digest())

    def _key(self, path: Path, sha256: str) -> str:
        config = self._config
        settings = (config.text_field, config.source_field, config.answer_field, config.encoding, config.min_chars)
        # Text is kept of what is held out, so what that is counts, too.
        held = (config.heldout_fraction, config.heldout_files is None)
        # No more of the name than that: it may be no Unicode.
        kind = [suffix.lower() for suffix in path.suffixes[-2 if path.suffix.lower() in COMPRESSED else -1 :]]
        return content_key({"version": VERSION, "sha256": sha256, "kind": kind, "settings": settings, "held": held})

    def _path(self, key: str) -> Path:
        return self._folder / f"{key[:SHORT]}{ROWS}"


def _read(file: BufferedReader, path: Path, key: str) -> tuple[_Head, NDArray[np.uint8]]:
    """What is remembered in an open file; the rows are mapped from it.

    Raises:
        CorruptError: If it is damaged, or of another file.
        PlainError: Likewise.
    """
    head = from_plain(_Head, parse_json(file.readline(_MOST_HEAD_BYTES), path))
    begin, size = file.tell(), file.seek(0, io.SEEK_END)
    end = size - _DIGEST_BYTES
    # Before anything else is read: a file of any size could lie here.
    if head.key != key or end < begin + head.documents * ROW.itemsize + head.name_bytes:
        raise CorruptError(f"{path}: of another file.")
    data: NDArray[np.uint8] = np.memmap(file, np.uint8, "r")
    digest = hashlib.sha256()
    for start in range(0, end, _AT_ONCE):
        digest.update(data[start : min(start + _AT_ONCE, end)].tobytes())
    if digest.digest() != data[end:].tobytes():
        raise CorruptError(f"{path}: damaged.")
    # Garbage collection removes what nobody asked for in a long time.
    with suppress(OSError):
        os.utime(path)
    return head, data[begin:end]
