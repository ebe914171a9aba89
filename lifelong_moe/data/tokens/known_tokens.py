"""Tokens of single documents that the cache has already, whatever distribution they were tokenized for.

A grown corpus then costs what is new in it, and a ``prepare`` that was killed goes on: each piece of a large text is
kept as it is finished.

Legend: N documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.text.known import opened
from lifelong_moe.data.text.spool import SpooledDocuments

DIGEST = np.dtype("V16")
"""The first half of a document's SHA-256."""


@dataclass(frozen=True, eq=False)
class _Shard:
    hashes: NDArray[np.uint64]
    """First number of each document's hash, ascending."""
    digests: NDArray[np.void]
    tokens: NDArray[np.integer]
    offsets: NDArray[np.int64]


class KnownTokens:
    """Documents of some shards of one tokenizer, by their hash."""

    def __init__(self) -> None:
        self._shards: list[_Shard] = []

    def add(self, digests: NDArray[np.void], tokens: NDArray[np.integer], offsets: NDArray[np.int64]) -> None:
        """Add the documents of a shard, which lie in order of hash.

        Args:
            digests: Of each document ``(N,)``.
            tokens: Of all documents.
            offsets: Where documents begin, and the end.
        """
        hashes = first_numbers(digests)
        # In another order nothing would be found; then there is nothing to find.
        if (hashes[1:] >= hashes[:-1]).all():
            # As plain arrays: to slice one that is mapped takes ten times as long.
            self._shards.append(_Shard(hashes, np.asarray(digests), np.asarray(tokens), offsets))

    def find(self, digests: NDArray[np.void]) -> list[NDArray[np.integer] | None]:
        """Tokens of documents, BOS first; None of those that are not known."""
        found: list[NDArray[np.integer] | None] = [None] * len(digests)
        hashes = first_numbers(digests)
        for shard in self._shards:
            places = np.searchsorted(shard.hashes, hashes)
            places[places == len(shard.hashes)] = 0
            for i in np.flatnonzero(shard.digests[places] == digests).tolist() if len(shard.hashes) else ():
                begin, end = shard.offsets[places[i] : places[i] + 2].tolist()
                found[i] = shard.tokens[begin:end]
        return found


def first_numbers(digests: NDArray[np.void]) -> NDArray[np.uint64]:
    """The first eight bytes of each hash, most significant first."""
    return np.ascontiguousarray(digests).view(">u8").reshape(-1, 2)[:, 0].astype(np.uint64)


def digests_of(documents: Sequence[Document]) -> NDArray[np.void]:
    """The digest of each document, in their order ``(N,)``; those of a spool are known."""
    documents = opened(documents)
    if isinstance(documents, SpooledDocuments):
        hashes = np.ascontiguousarray(documents.rows["hash"][documents.order][:, :2])
        return hashes.view(DIGEST).reshape(-1)
    joined = b"".join(bytes.fromhex(document.hash[:32]) for document in documents)
    return np.frombuffer(joined, DIGEST)
