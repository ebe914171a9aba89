"""Domains of a whole corpus, one number for each chunk of a document, in memory or in a file that is mapped.

The file lies beside the tokens: the numbers, little-endian, and then the SHA-256 of what decided them and of the
numbers themselves. A file that is damaged, cut short, of other tokens or of other centroids has another hash: it counts
as missing.

Legend: C chunks of the corpus, D documents.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.storage.files import new_file
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.storage.modes import as_private_as
from lifelong_moe.storage.opening import open_regular

_PIECE = 1 << 20
"""Numbers that are checked at a time."""


@dataclass(frozen=True)
class DomainFile:
    """A file of domains, which may be there or not."""

    folder: Path
    """That of the tokens: it goes where they go."""
    key: str
    """Hash of all that decides the numbers: the tokens, and how they are assigned."""
    chunks: int
    domains: int
    """Every number is below this one."""

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.folder / f"domains-{self.key[:SHORT]}.bin"

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """One byte for up to 256 domains."""
        return domain_dtype(self.domains)

    def find(self) -> NDArray[np.unsignedinteger] | None:
        """The numbers ``(C,)``, mapped from disk and read-only; None if there is no such file, or a damaged one."""
        width, digest = self.dtype.itemsize, self._digest()
        try:
            # Opened once: what is hashed is what is mapped.
            with open_regular(self.path, follow=False) as file:
                # Size before hash: whatever stands there is not read to its end.
                if os.fstat(file.fileno()).st_size != self.chunks * width + digest.digest_size:
                    return None
                ids_C = np.memmap(file, dtype=self.dtype, mode="r", shape=(self.chunks,))
                for start in range(0, self.chunks, _PIECE):
                    piece = ids_C[start : start + _PIECE]
                    digest.update(piece.data)
                    # A hash guards against damage, not against people; experts are looked up by these numbers.
                    if int(piece.max()) >= self.domains:
                        return None
                file.seek(self.chunks * width)
                if file.read() != digest.digest():
                    return None
        # A cache is made again and never an error; a file of no numbers cannot be mapped.
        except (OSError, ValueError):
            return None
        # Garbage collection removes what nobody opened for long. Another user's cache cannot be touched.
        with suppress(OSError):
            os.utime(self.path, follow_symlinks=False)
        return ids_C

    def write(self, batches: Iterable[NDArray[np.integer]]) -> None:
        """Write the numbers as they come, in place of what is there; the file appears once it is whole.

        Raises:
            OSError: If the folder is gone or cannot be written to, or the disk is full.
        """
        # From the domains of its chunks something of a text can be told, so who may not read the tokens may not read
        # these. It also fails where the tokens have been removed: their folder must not come back.
        mode = as_private_as((self.folder / "tokens.bin").stat().st_mode)
        digest = self._digest()
        with new_file(self.path, mode) as work, work.open("wb") as file:
            for batch in batches:
                written = batch.astype(self.dtype).tobytes()
                digest.update(written)
                file.write(written)
            file.write(digest.digest())

    def _digest(self) -> hashlib._Hash:
        return hashlib.sha256(self.key.encode())


def domain_dtype(domains: int) -> np.dtype[np.unsignedinteger]:
    """The smallest unsigned integer that holds every number below ``domains``, little-endian."""
    return np.min_scalar_type(max(domains, 1) - 1).newbyteorder("<")


@dataclass(frozen=True, eq=False)
class ChunkDomains:
    """Domain of each token of a corpus, as an array ``(num_tokens,)`` of which slices can be taken."""

    offsets: NDArray[np.int64]
    """Where documents begin, and the end, ``(D + 1,)``."""
    chunk: int
    """Tokens of a chunk; the last one of a document may be shorter."""
    ids_C: NDArray[np.unsignedinteger]
    """Domain of each chunk, document after document."""
    first: int | None = None
    """Domain of every document's first chunk, where it is known; None leaves ``ids_C`` as it is."""
    file: DomainFile | None = None
    """The file that ``ids_C`` is mapped from, if it is."""

    def __post_init__(self) -> None:
        if self.ids_C.shape != (self._begins[-1],):
            raise ValueError(f"domains {self.ids_C.shape} for {self._begins[-1]} chunks")

    @property
    def shape(self) -> tuple[int]:
        """As of an array."""
        return (int(self.offsets[-1]),)

    @cached_property
    def _begins(self) -> NDArray[np.int64]:
        return chunk_begins(self.offsets, self.chunk)

    def __getitem__(self, tokens: slice) -> NDArray[np.int64]:
        """Domain of each token of a slice without a step, int64."""
        begin, end, _ = tokens.indices(self.shape[0])
        first = int(np.searchsorted(self.offsets, begin, side="right")) - 1
        last = int(np.searchsorted(self.offsets, end, side="left"))
        borders = self.offsets[first : last + 1]  # of the documents that the slice has tokens of
        clipped = np.clip(borders, begin, end)
        lengths: NDArray[np.int64] = clipped[1:] - clipped[:-1]
        places = np.arange(begin, end) - np.repeat(borders[:-1], lengths)
        found = self.ids_C[np.repeat(self._begins[first:last], lengths) + places // self.chunk].astype(np.int64)
        if self.first is not None:
            found[places < self.chunk] = self.first
        return found


def chunk_begins(offsets: NDArray[np.int64], chunk: int) -> NDArray[np.int64]:
    """Where each document's chunks begin among those of all, and their number, int64 ``(D + 1,)``."""
    return np.concatenate([[0], np.cumsum(-(-np.diff(offsets) // chunk))])
