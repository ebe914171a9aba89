"""Tell which documents repeat known ones without reading those: an index of hashes for each known text.

``cache/manifests/<key>.hashes`` is named by what the text was made of. It holds a line of JSON, 16 bytes for each
document (:func:`lifelong_moe.data.text.spool.same_hashes`), and the SHA-256 of all before it.

It is believed only while the file system describes the text's files as it did when they were read, with inodes and
times of change, which no copy keeps. So an index that came with somebody else's cache says nothing, and neither does
one that is damaged or of other text. Then the text is read, and the index made again.

Legend: N known documents, W wanted hashes.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.data.text.documents import Corpus, Document
from lifelong_moe.data.text.manifest import FOLDER, HASHES, file_state
from lifelong_moe.data.text.spool import same_hashes
from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.files import new_file
from lifelong_moe.storage.keys import SHORT, canonical_json, content_key
from lifelong_moe.storage.modes import PRIVATE, SHARED
from lifelong_moe.storage.plain_files import open_stored

VERSION = 1
"""Raised whenever equal documents would have other hashes."""
WIDTH = 16
"""Bytes of a document's hash."""
_AT_ONCE = 1 << 16
"""Hashes that are read or written at once."""
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class KnownText:
    """Documents that are known, which may not have been read yet."""

    parts: Callable[[], Iterable[Sequence[Document]]]
    """Reads them."""
    made_of: str = ""
    """Names what they were made of; empty if nothing does, so that they are read each time."""
    state: str = ""
    """See :attr:`lifelong_moe.data.text.documents.Corpus.state`."""
    mode: int = SHARED
    """Permissions of files that are made of them."""

    @classmethod
    def of(cls, split: Corpus) -> KnownText:
        """A distribution as it was split, near copies of held-out text included."""
        made_of = split.identity and content_key({"split": split.identity})
        return cls(lambda: (split.train, split.heldout), made_of, split.state, split.mode)

    @classmethod
    def there(cls, documents: Sequence[Document]) -> KnownText:
        """Documents that have been read anyway."""
        return cls(lambda: (documents,))

    @classmethod
    def of_file(cls, path: Path, made_of: str, read: Callable[[], Sequence[Document]]) -> KnownText:
        """A file of documents of our own, which is read each time that it is asked for."""
        return cls(lambda: (read(),), content_key({"file": made_of}), file_state(path), PRIVATE)

    def documents(self) -> Iterator[Document]:
        """All of them, one after the other."""
        return chain.from_iterable(self.parts())

    def hashes(self) -> Iterator[bytes]:
        """16 bytes for each that equal documents share."""
        return chain.from_iterable(map(same_hashes, self.parts()))

    @property
    def is_remembered(self) -> bool:
        """Whether an index of it would be believed."""
        return bool(self.made_of and self.state)


class HashIndex:
    """The indices in a cache, and those that are to be written to it.

    Args:
        cache: The ``data/cache/`` directory.
    """

    def __init__(self, cache: Path) -> None:
        self._folder = cache / FOLDER
        self._new: dict[str, tuple[KnownText, bytes]] = {}

    def repeated(self, wanted: Iterable[bytes], known: Iterable[KnownText]) -> set[bytes]:
        """Which hashes are of known documents; text is read where there is no index of it, or none to believe."""
        asked, found = _Wanted.of(wanted), set[bytes]()
        for text in known:
            there = self._among(asked, text)
            if there is None:
                hashes = b"".join(text.hashes())
                there = asked.among(hashes)
                if text.is_remembered:
                    self._new[text.made_of] = text, hashes
            found |= there
        return found

    def read(self, wanted: Iterable[bytes], known: Iterable[KnownText]) -> set[bytes]:
        """Which hashes are of known documents, by the texts alone; an index that says otherwise is removed."""
        asked, found = _Wanted.of(wanted), set[bytes]()
        for text in known:
            there = set().union(*map(asked.among, _blocks(text.hashes())))
            if self._among(asked, text) not in (None, there):
                with suppress(OSError):
                    _path(self._folder, text).unlink()
            found |= there
        return found

    def save(self) -> None:
        """Write what is missing; where the cache cannot be written to, text is read again."""
        for text, hashes in self._new.values():
            write_index(self._folder.parent, text, hashes)
        self._new.clear()

    def _among(self, asked: _Wanted, text: KnownText) -> set[bytes] | None:
        if not text.is_remembered:
            return None
        path = _path(self._folder, text)
        try:
            with open_stored(path) as file:
                found = _read(file, _header(text), asked)
            # Garbage collection removes what nobody asked for in a long time. Another user's cannot be touched.
            with suppress(OSError):
                os.utime(path)
        except (OSError, CorruptError):
            return None
        return found


def write_index(cache: Path, text: KnownText, hashes: bytes | None = None) -> None:
    """Write the index of a text that would be believed; a cache that cannot be written to has none.

    Args:
        cache: The ``data/cache/`` directory.
        text: See :attr:`KnownText.is_remembered`.
        hashes: Of its documents, where they are known.
    """
    rows = text.hashes() if hashes is None else iter([hashes])
    digest = hashlib.sha256()
    with suppress(OSError), new_file(_path(cache / FOLDER, text), text.mode) as work, work.open("wb") as file:
        for block in chain([_header(text)], _blocks(rows)):
            digest.update(block)
            file.write(block)
        file.write(digest.digest())


def _blocks(rows: Iterator[bytes]) -> Iterator[bytes]:
    # Joined, since a write for each document would take longer than to hash it.
    while block := b"".join(islice(rows, _AT_ONCE)):
        yield block


def _path(folder: Path, text: KnownText) -> Path:
    return folder / f"{text.made_of[:SHORT]}{HASHES}"


def _header(text: KnownText) -> bytes:
    of: Mapping[str, object] = {"version": VERSION, "made_of": text.made_of, "state": text.state}
    return f"{canonical_json(of)}\n".encode()


def _read(file: BinaryIO, header: bytes, asked: _Wanted) -> set[bytes]:
    """The wanted hashes among those of an open index.

    Raises:
        CorruptError: If it is damaged, or of another text.
    """
    size = file.seek(0, io.SEEK_END) - len(header) - _DIGEST_BYTES
    file.seek(0)
    # Before anything else is read: a file of any size could lie here.
    if size < 0 or size % WIDTH or file.read(len(header)) != header:
        raise CorruptError("an index of another text.")
    digest, found = hashlib.sha256(header), set[bytes]()
    while size:
        block = file.read(min(size, WIDTH * _AT_ONCE))
        if not block:
            raise CorruptError("an index that has become shorter.")
        digest.update(block)
        found |= asked.among(block)
        size -= len(block)
    if file.read() != digest.digest():
        raise CorruptError("a damaged index.")
    return found


@dataclass(frozen=True, eq=False)
class _Wanted:
    """Hashes that are sought."""

    hashes: frozenset[bytes]
    first_W: NDArray[np.uint64]
    """First number of each, ascending."""

    @classmethod
    def of(cls, hashes: Iterable[bytes]) -> _Wanted:
        found = frozenset(hashes)
        return cls(found, np.sort(_first(b"".join(found))))

    def among(self, hashes: bytes) -> set[bytes]:
        """Those that stand in a row of hashes."""
        first_N = _first(hashes)
        if not len(first_N) or not len(self.first_W):
            return set()
        places_N = np.searchsorted(self.first_W, first_N)
        places_N[places_N == len(self.first_W)] = 0
        likely = np.flatnonzero(self.first_W[places_N] == first_N).tolist()
        return {one for one in (hashes[WIDTH * i : WIDTH * (i + 1)] for i in likely) if one in self.hashes}


def _first(hashes: bytes) -> NDArray[np.uint64]:
    # Of another byte order than the machine's a search would convert them each time.
    return np.frombuffer(hashes, ">u8")[::2].astype(np.uint64)
