"""Documents as they are read: a row of numbers for each, and the text in memory while it is little, else on disk.

Text on disk is divided into buckets by the first byte of its hash, so that reading it in order of hash stays within one
small file at a time. The folder is temporary: it goes with the spool, or with the process.

Legend: N documents.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, overload

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.data.text.documents import Document, normalized_hash
from lifelong_moe.data.text.known import Summary, opened
from lifelong_moe.storage.modes import PRIVATE, make_folder
from lifelong_moe.storage.temporary import temporary

ROW = np.dtype(
    [("same", ">u8", 2), ("hash", ">u8", 4), ("unit", ">u8", 2), ("cap", ">u8", 2), ("bytes", "<i8"), ("place", "<i8"),
     ("part", "<i8")]
)  # fmt: skip
"""Hashes by which duplicates, documents and units are told apart (of units for the split and for the cap), most
significant number first; bytes of the text; where it is; the part that it was read for."""
MOST_BYTES = 64 << 20
"""Text that is held in memory, by all spools of the process together; the one that exceeds it goes to disk whole."""
BUCKETS = 256
_BUFFER_BYTES = 128 << 10
"""Written to a bucket at once."""
_AT_ONCE = 4096
"""Rows looked up at once."""
_HEAD = struct.Struct("<IIQ")
_PACKED = struct.Struct("<16s32s16s16sqqq")


class Spool:
    """Documents in the order in which they were added.

    Args:
        folder: Where text goes that is more than :data:`MOST_BYTES`; None keeps all in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._packed, self._in_memory = bytearray(), _Share()
        self._held: list[Document] | None = []
        self._disk: _Disk | None = None
        self._units: dict[str, tuple[bytes, bytes]] = {}

    def add(self, document: Document, part: int = 0) -> None:
        """Add a document, which was read for a part, such as 1 for held-out text."""
        data, place = document.text.encode("utf-8"), len(self._packed) // ROW.itemsize
        digest = hashlib.sha256(data)
        if self._held is not None:
            self._held.append(document)
            self._in_memory.take(len(data))
            if self._folder is not None and _Share.num_bytes > MOST_BYTES:
                place = self._move_to_disk(self._folder, place)
        elif self._disk is not None:
            place = self._disk.add(document, data, digest.digest())
        same = bytes.fromhex(normalized_hash(document.text)[:32])
        split, cap = self._unit(document.source)
        self._packed += _PACKED.pack(same, digest.digest(), split, cap, len(data), place, part)
        if self._disk is not None and len(self._packed) > MOST_BYTES // 8:
            self._disk.rows.write(self._packed)
            self._packed.clear()

    def _unit(self, source: str) -> tuple[bytes, bytes]:
        found = self._units.get(source)
        if found is None:
            found = unit_hash("split", source), unit_hash("cap", source)
            # Files name a source many times in a row; of others next to none comes again.
            if len(self._units) > 1000:
                self._units.clear()
            self._units[source] = found
        return found

    def _move_to_disk(self, folder: Path, place: int) -> int:
        """Write what was held in memory; returns the place of the last document, whose row is not there yet."""
        assert self._held is not None
        try:
            self._disk = disk = _Disk(folder)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            # Another user's cache, whose tokens can be used all the same, as long as the text fits into memory.
            self._folder = None
            return place
        places = []
        for document in self._held:
            data = document.text.encode("utf-8")
            places.append(disk.add(document, data, hashlib.sha256(data).digest()))
        rows = np.frombuffer(bytes(self._packed), ROW).copy()
        rows["place"] = places[: len(rows)]
        self._packed, self._held = bytearray(rows.tobytes()), None
        self._in_memory.give_back()
        return places[-1]

    def rows(self) -> NDArray[np.void]:
        """The rows of all documents ``(N,)``, mapped from disk where the text is there too."""
        if self._disk is None:
            return np.frombuffer(bytes(self._packed), ROW)
        self._disk.rows.write(self._packed)
        self._packed.clear()
        self._disk.flush()
        return np.memmap(self._disk.rows.name, ROW, "r")

    def documents(self, rows: NDArray[np.void], numbers: NDArray[np.integer]) -> Iterator[Document]:
        """Yield documents, given all rows and the numbers of theirs."""
        if self._held is not None:
            yield from map(self._held.__getitem__, numbers.tolist())
            return
        assert self._disk is not None
        for start in range(0, len(numbers), _AT_ONCE):
            chosen = rows[numbers[start : start + _AT_ONCE]]
            buckets = chosen["hash"][:, 0].astype(np.uint64) >> np.uint64(56)
            yield from map(self._disk.read, buckets.tolist(), chosen["place"].tolist())


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
            stack.callback(_discard, self.rows)
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
        source, origin, text = _HEAD.unpack(os.pread(file.fileno(), _HEAD.size, place))
        data = os.pread(file.fileno(), source + origin + text, place + _HEAD.size)
        return Document(
            data[source + origin :].decode(),
            data[:source].decode(),
            data[source : source + origin].decode("utf-8", "surrogateescape"),
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
        return Summary(len(self), int(self.rows["bytes"][self.order].sum()))

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
        return documents.rows["unit"][documents.order][:, 0].astype(np.uint64)
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
