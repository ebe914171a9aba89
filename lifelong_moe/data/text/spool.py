"""Documents as they are read: a row of numbers for each, and the text in memory while it is little, else on disk.

Text on disk is divided into buckets by the first byte of its hash, so that reading it in order of hash stays within one
small file at a time. The folder is temporary: it goes with the spool, or with the process. Of files whose rows are
known (:mod:`lifelong_moe.data.text.file_rows`) no text is there, and most of the time nobody asks for it.

Legend: N documents.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import struct
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.data.text.documents import Document, normalized_hash
from lifelong_moe.data.text.jsonl import SEPARATOR, own_unit_of
from lifelong_moe.data.text.known import Summary, opened
from lifelong_moe.storage.modes import PRIVATE, make_folder
from lifelong_moe.storage.temporary import temporary

ROW = np.dtype(
    [("same", ">u8", 2), ("hash", ">u8", 4), ("unit", ">u8", 2), ("cap", ">u8", 2), ("bytes", "<i8"), ("name", "<i8"),
     ("name_bytes", "<i4"), ("answer", "<i4"), ("file", "<i4"), ("part", "<i4")]
)  # fmt: skip
"""Hashes by which duplicates, documents and units are told apart (of units for the split and for the cap), most
significant number first; bytes of the text; where the source's name is and its bytes, of which there are none where a
document is its own source; bytes of the answer; number of its file; the part that it was read for."""
MOST_BYTES = 64 << 20
"""Text that is held in memory, by all spools of the process together; the one that exceeds it goes to disk whole."""
BUCKETS = 256
_BUFFER_BYTES = 128 << 10
"""Written to a bucket at once."""
_READ_BYTES = 8 << 10
"""Read of a bucket at once."""
_AT_ONCE = 4096
"""Rows that are looked up at once."""
_NOWHERE = -1
"""In place of where a text is that was not read."""
_HEAD = struct.Struct("<IIQ")
_PACKED = struct.Struct("<16s32s16s16sqqiiii")
_LINE = re.compile(r":\d+$")
"""No file that is read is called so: its name ends in what tells its kind."""


class KnownFile(Protocol):
    """A file whose documents' rows are known."""

    @property
    def name(self) -> str:
        """As origins of its documents have it."""

    @property
    def rows(self) -> NDArray[np.void]:
        """Of its documents, in their order; names of sources lie in ``names``."""

    @property
    def names(self) -> bytes:
        """Names of sources, one after the other."""

    @property
    def num_bytes(self) -> int:
        """Of its texts."""

    def held(self) -> dict[int, Document]:
        """Documents that need not be read from the file, by their number in it."""

    def documents(self) -> Iterator[Document]:
        """Reads them all."""


@dataclass
class _File:
    """A file that documents were read from."""

    number: int
    begin: int
    """Number of its first document."""
    documents: int = 0


class Spool:
    """Documents in the order in which they were added.

    Args:
        folder: Where text goes that is more than :data:`MOST_BYTES`; None keeps all in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._packed, self._names, self._in_memory = bytearray(), bytearray(), _Share()
        self._num_name_bytes, self._last_name = 0, (b"", (0, 0))
        self._held: list[Document] | None = []
        self._numbers = array("q")
        """Numbers of the documents that are held."""
        self._places = array("q")
        """Where the text of each document is, among those that are held or in its bucket."""
        self._disk: _Disk | None = None
        self._units: dict[str, tuple[bytes, bytes]] = {}
        self._known: list[tuple[int, KnownFile]] = []
        """Files whose text was not read, with the number of their first document."""
        self._files: dict[str, _File] = {}

    def add(self, document: Document | KnownFile, part: int = 0) -> None:
        """Add a document, or those of a file that are known, for a part, such as 1 for held-out text."""
        if not isinstance(document, Document):
            self._add_known(document, part)
            return
        data = document.text.encode("utf-8")
        digest = hashlib.sha256(data).digest()
        file = self._file(_LINE.sub("", document.origin))
        self._places.append(self._keep(document, data, digest, len(self._places)))
        same = bytes.fromhex(normalized_hash(document.text)[:32])
        split, cap = self._unit(document.source)
        answer = len(document.text.partition(SEPARATOR)[2].encode()) if SEPARATOR in document.text else 0
        name = self._name(document.source, digest.hex())
        self._packed += _PACKED.pack(same, digest, split, cap, len(data), *name, answer, file, part)
        self._spill()

    def _add_known(self, file: KnownFile, part: int) -> None:
        self._known.append((len(self._places), file))
        number, names = self._file(file.name, len(file.rows)), file.names
        for start in range(0, len(file.rows), _AT_ONCE):
            rows = file.rows[start : start + _AT_ONCE].copy()
            rows["file"], rows["part"] = number, part
            rows["name"] += self._num_name_bytes
            self._places.extend(_NOWHERE for _ in rows)
            self._packed += rows.tobytes()
            self._spill()
        self._names += names
        self._num_name_bytes += len(names)

    def _keep(self, document: Document, data: bytes, digest: bytes, number: int) -> int:
        """Keep the text of a document; returns its place."""
        if self._held is None:
            assert self._disk is not None
            return self._disk.add(document, data, digest)
        self._held.append(document)
        self._numbers.append(number)
        self._in_memory.take(len(data))
        if _Share.num_bytes > MOST_BYTES and (disk := self._on_disk()) is not None:
            places = [_added(disk, document) for document in self._held]
            for held, place in zip(self._numbers[:-1], places[:-1], strict=True):
                self._places[held] = place
            self._held, self._numbers = None, array("q")
            self._in_memory.give_back()
            return places[-1]
        return len(self._held) - 1

    def _on_disk(self) -> _Disk | None:
        """The temporary folder; None if there can be none."""
        if self._disk is None and self._folder is not None:
            try:
                self._disk = _Disk(self._folder)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                # Another user's cache, whose tokens can be used all the same, as long as the text fits into memory.
                self._folder = None
        return self._disk

    def _spill(self) -> None:
        if len(self._packed) + len(self._names) > MOST_BYTES // 8 and (disk := self._on_disk()) is not None:
            disk.rows.write(self._packed)
            disk.names.write(self._names)
            self._packed.clear()
            self._names.clear()

    def _file(self, name: str, documents: int = 1) -> int:
        """The number of a file, of which there are further documents."""
        file = self._files.setdefault(name, _File(len(self._files), len(self._places)))
        file.documents += documents
        return file.number

    def _name(self, source: str, digest: str) -> tuple[int, int]:
        """Where a source's name is, and its bytes."""
        if source == own_unit_of(digest):
            return 0, 0
        # Files name a source many times in a row, and what is known of a file holds all names of its documents.
        data = f"{len(self._files)}\n{source}".encode()
        if data != self._last_name[0]:
            name = source.encode()
            self._last_name = data, (self._num_name_bytes, len(name))
            self._names += name
            self._num_name_bytes += len(name)
        return self._last_name[1]

    def _unit(self, source: str) -> tuple[bytes, bytes]:
        found = self._units.get(source)
        if found is None:
            found = unit_hash("split", source), unit_hash("cap", source)
            # Files name a source many times in a row; of others next to none comes again.
            if len(self._units) > 1000:
                self._units.clear()
            self._units[source] = found
        return found

    def rows(self) -> NDArray[np.void]:
        """The rows of all documents ``(N,)``, mapped from disk where there are many."""
        if self._disk is None:
            return np.frombuffer(bytes(self._packed), ROW)
        self._disk.rows.write(self._packed)
        self._disk.names.write(self._names)
        self._packed.clear()
        self._names.clear()
        self._disk.flush()
        return np.memmap(self._disk.rows.name, ROW, "r")

    def source(self, row: np.void) -> str:
        """The source of a document, given its row."""
        begin, size = int(row["name"]), int(row["name_bytes"])
        return self.names(begin, begin + size).decode() if size else own_unit_of(row["hash"].tobytes().hex())

    def names(self, begin: int, end: int) -> bytes:
        """Names of sources, by where they are."""
        # Where they were when rows were asked for: text that is read since may have gone to disk without them.
        if self._disk is None or self._names:
            return bytes(self._names[begin:end])
        with Path(self._disk.names.name).open("rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    def of_file(self, rows: NDArray[np.void], name: str) -> NDArray[np.int64]:
        """Numbers of a file's documents, in order of reading; none where it was read twice."""
        file = self._files.get(name, _File(0, 0))
        numbers = np.arange(file.begin, file.begin + file.documents)
        return numbers if (rows["file"][numbers] == file.number).all() else numbers[:0]

    def files(self, numbers: Iterable[int]) -> list[str]:
        """Names of files, by their numbers."""
        names = list(self._files)
        return [names[number] for number in numbers]

    def documents(self, rows: NDArray[np.void], numbers: NDArray[np.integer]) -> Iterator[Document]:
        """Yield documents, given all rows and the numbers of theirs."""
        for start in range(0, len(numbers), _AT_ONCE):
            chosen = numbers[start : start + _AT_ONCE]
            texts = self._known_texts(chosen)
            places = [self._places[number] for number in chosen.tolist()]
            if self._held is not None:
                held = self._held
                yield from (
                    held[place] if place != _NOWHERE else texts[number]
                    for number, place in zip(chosen.tolist(), places, strict=True)
                )
                continue
            assert self._disk is not None
            buckets = (rows["hash"][chosen][:, 0].astype(np.uint64) >> np.uint64(56)).tolist()
            for number, bucket, place in zip(chosen.tolist(), buckets, places, strict=True):
                yield self._disk.read(bucket, place) if place != _NOWHERE else texts[number]

    def _known_texts(self, numbers: NDArray[np.integer]) -> dict[int, Document]:
        """Documents among these whose text was not read; they are read with all others if they are not at hand."""
        missing = [number for number in numbers.tolist() if self._places[number] == _NOWHERE] if self._known else []
        if not missing:
            return {}
        begins = np.array([begin for begin, _ in self._known])
        texts = dict[int, Document]()
        for which in np.unique(np.searchsorted(begins, missing, side="right") - 1).tolist():
            begin, file = self._known[which]
            texts |= {begin + number: document for number, document in file.held().items()}
        if all(number in texts for number in missing):
            return texts
        for begin, file in self._known:
            for number, document in enumerate(file.documents(), begin):
                data = document.text.encode("utf-8")
                self._places[number] = self._keep(document, data, hashlib.sha256(data).digest(), number)
        if self._disk is not None:
            self._disk.flush()
        self._known.clear()
        return {}

    def as_read(self, rows: NDArray[np.void], numbers: NDArray[np.integer]) -> Iterator[tuple[int, Document]]:
        """Yield some documents once, with their place among them: those of files that were not read file by file."""
        known = list(self._known)
        is_known = np.zeros(len(numbers), dtype=bool)
        if known:
            # Where a document is among those that are asked for; few distributions have as many as 32 bits say.
            where = np.full(len(rows), _NOWHERE, np.int32)
            where[numbers] = np.arange(len(numbers), dtype=np.int32)
            for begin, file in known:
                places = where[begin : begin + len(file.rows)]
                is_known[places[places != _NOWHERE]] = True
        others = np.flatnonzero(~is_known)
        # In parts, since Python's numbers take nine times as much memory.
        for start in range(0, len(others), _AT_ONCE):
            part = others[start : start + _AT_ONCE]
            yield from zip(part.tolist(), self.documents(rows, numbers[part]), strict=True)
        for begin, file in known:
            places = where[begin : begin + len(file.rows)].tolist()
            if any(place != _NOWHERE for place in places):
                yield from (
                    (place, document)
                    for place, document in zip(places, file.documents(), strict=True)
                    if place != _NOWHERE
                )


def _added(disk: _Disk, document: Document) -> int:
    data = document.text.encode("utf-8")
    return disk.add(document, data, hashlib.sha256(data).digest())


class _Share:
    """Bytes of text that a spool holds in memory; those of a spool that is gone no longer count."""

    num_bytes = 0
    """Of all spools."""

    def __init__(self) -> None:
        self._mine = 0

    def take(self, num_bytes: int) -> None:
        """Count bytes that a spool holds from now on."""
        self._mine += num_bytes
        type(self).num_bytes += num_bytes

    def give_back(self) -> None:
        """Count none of them any more."""
        type(self).num_bytes -= self._mine
        self._mine = 0

    __del__ = give_back


def unit_hash(salt: str, unit: str) -> bytes:
    """The first 16 bytes of a source unit's hash, by which it is split or capped."""
    return hashlib.sha256(f"{salt}\n{unit}".encode()).digest()[:16]


class _Disk:
    """A temporary folder of text in buckets, and of rows."""

    def __init__(self, parent: Path) -> None:
        make_folder(parent)
        self._buffers = [bytearray() for _ in range(BUCKETS)]
        self._sizes = [0] * BUCKETS
        self._open: dict[int, IO[bytes]] = {}
        with ExitStack() as stack:
            # Private, whoever may read the files: nobody else ever has to.
            self.folder = stack.enter_context(temporary(parent, PRIVATE))
            self.rows: IO[bytes] = (self.folder / "rows").open("wb")
            self.names: IO[bytes] = (self.folder / "names").open("wb")
            stack.callback(_discard, self.rows)
            stack.callback(_discard, self.names)
            stack.callback(_close, self._open)
            weakref.finalize(self, stack.pop_all().close)

    def add(self, document: Document, data: bytes, digest: bytes) -> int:
        """Add a document to its bucket; returns its place there."""
        bucket = digest[0]
        # A path may be of bytes that are no UTF-8.
        source, origin = document.source.encode(), document.origin.encode("utf-8", "surrogateescape")
        record = b"".join((_HEAD.pack(len(source), len(origin), len(data)), source, origin, data))
        place = self._sizes[bucket]
        self._sizes[bucket] += len(record)
        self._buffers[bucket] += record
        if len(self._buffers[bucket]) > _BUFFER_BYTES:
            self._write(bucket)
        return place

    def _write(self, bucket: int) -> None:
        # Opened each time: not every system lets a process hold hundreds of files open.
        with (self.folder / str(bucket)).open("ab") as file:
            file.write(self._buffers[bucket])
        self._buffers[bucket] = bytearray()

    def flush(self) -> None:
        """Write what is buffered."""
        self.rows.flush()
        self.names.flush()
        for bucket in range(BUCKETS):
            if self._buffers[bucket]:
                self._write(bucket)

    def read(self, bucket: int, place: int) -> Document:
        """The document of a bucket at a place."""
        file = self._open.get(bucket)
        if file is None:
            # One at a time: documents are read in order of hash, or a few here and there.
            _close(self._open)
            file = self._open[bucket] = (self.folder / str(bucket)).open("rb", buffering=0)
        # Most documents are whole in what is read at once; of what follows one no more is looked at.
        data = os.pread(file.fileno(), _READ_BYTES, place)
        source, origin, text = _HEAD.unpack_from(data)
        names, begin = _HEAD.size + source, _HEAD.size + source + origin
        if (missing := begin + text - len(data)) > 0:
            data += os.pread(file.fileno(), missing, place + len(data))
        return Document(
            data[begin : begin + text].decode(),
            data[_HEAD.size : names].decode(),
            data[names:begin].decode("utf-8", "surrogateescape"),
        )


def _discard(file: IO[bytes]) -> None:
    # Closing it writes what is buffered, which on a full disk fails a second time.
    with suppress(OSError):
        file.close()


def _close(files: dict[int, IO[bytes]]) -> None:
    for file in files.values():
        file.close()
    files.clear()


class SpooledDocuments(Sequence[Document]):
    """Some documents of a spool, in an order of their own.

    Args:
        spool: Where they are.
        rows: Of all documents of the spool.
        order: Numbers of their rows ``(n,)``.
    """

    def __init__(self, spool: Spool, rows: NDArray[np.void], order: NDArray[np.integer]) -> None:
        self._spool, self.rows, self.order = spool, rows, order

    @property
    def summary(self) -> Summary:
        """Their number and bytes."""
        parts = range(0, len(self), _AT_ONCE)
        return Summary(len(self), sum(int(self.rows["bytes"][self.order[i : i + _AT_ONCE]].sum()) for i in parts))

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> SpooledDocuments: ...
    def __getitem__(self, index: int | slice) -> Document | SpooledDocuments:
        if isinstance(index, slice):
            return self.chosen(np.arange(len(self))[index])
        return next(self._spool.documents(self.rows, self.order[[index]]))

    def __iter__(self) -> Iterator[Document]:
        return self._spool.documents(self.rows, self.order)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(_equal, self, other))

    __hash__ = None  # type: ignore[assignment]

    @property
    def hashes(self) -> Iterator[str]:
        """SHA-256 of each document, hexadecimal, in their order."""
        for start in range(0, len(self), _AT_ONCE):
            found = self.rows["hash"][self.order[start : start + _AT_ONCE]].tobytes().hex()
            yield from (found[i : i + 64] for i in range(0, len(found), 64))

    def of_file(self, name: str) -> tuple[NDArray[np.void], bytes, dict[int, Document]]:
        """What a :class:`KnownFile` says of a file that was read; those of its documents that are here are held.

        Returns:
            Rows, none where the file was read twice; names of sources; documents, by their number in the file.
        """
        numbers = self._spool.of_file(self.rows, name)
        rows = self.rows[numbers]
        named = rows["name_bytes"] > 0
        begin = int(rows["name"][named].min(initial=np.iinfo(np.int64).max))
        end = int((rows["name"] + rows["name_bytes"])[named].max(initial=begin))
        rows["name"][named] -= begin
        held = self.chosen(np.isin(self.order, numbers))
        held = held.chosen(np.argsort(held.order))
        places = (held.order - numbers[:1]).tolist()
        return rows, self._spool.names(begin, end), dict(zip(places, held, strict=True))

    @property
    def num_bytes(self) -> NDArray[np.int64]:
        """Bytes of each text."""
        return self.rows["bytes"][self.order]

    @property
    def answer_bytes(self) -> NDArray[np.int32]:
        """Bytes of each answer, 0 where there is none."""
        return self.rows["answer"][self.order]

    @property
    def files(self) -> list[str]:
        """Files that they are of."""
        return self._spool.files(np.unique(self.rows["file"][self.order]).tolist())

    def as_read(self) -> Iterator[tuple[int, Document]]:
        """Yield each once, with its place among them, in the order in which they are read fastest."""
        return self._spool.as_read(self.rows, self.order)

    def chosen(self, which: NDArray[np.integer] | NDArray[np.bool_]) -> SpooledDocuments:
        """Those of some places, or those that a mask says."""
        return SpooledDocuments(self._spool, self.rows, self.order[which])


def chosen(documents: Sequence[Document], which: NDArray[np.bool_]) -> Sequence[Document]:
    """The documents that a mask says, in the same order."""
    documents = opened(documents)
    if isinstance(documents, SpooledDocuments):
        return documents.chosen(which)
    return [document for document, is_chosen in zip(documents, which.tolist(), strict=True) if is_chosen]


def source_number(document: Document) -> int:
    """A hash of a document's source, of 64 bits."""
    return int.from_bytes(unit_hash("split", document.source)[:8], "big")


def source_numbers(documents: Sequence[Document]) -> NDArray[np.uint64]:
    """:func:`source_number` of each document; those of a spool are known."""
    documents = opened(documents)
    if isinstance(documents, SpooledDocuments):
        return documents.rows["unit"][:, 0][documents.order].astype(np.uint64)
    return np.array([source_number(document) for document in documents], dtype=np.uint64)


def same_hashes(documents: Sequence[Document]) -> Iterator[bytes]:
    """16 bytes for each document that two of them share if they are duplicates; those of a spool are known."""
    documents = opened(documents)
    if isinstance(documents, SpooledDocuments):
        for start in range(0, len(documents), _AT_ONCE):
            found = documents.rows["same"][documents.order[start : start + _AT_ONCE]].tobytes()
            yield from (found[i : i + 16] for i in range(0, len(found), 16))
    else:
        yield from (bytes.fromhex(normalized_hash(document.text)[:32]) for document in documents)


def _equal(one: object, other: object) -> bool:
    return one == other
