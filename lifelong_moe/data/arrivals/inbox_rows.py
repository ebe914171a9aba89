"""Documents of the inbox without their text: what a tick keeps of a file, so that the next one need not read it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.grammars import Sha256
from lifelong_moe.storage.remembered import State

UNCOUNTED = -1
"""In place of a number of tokens."""


@dataclass(frozen=True)
class Row:
    """A document of the inbox without its text."""

    hash: str
    same: bytes
    """16 bytes that equal documents share; see :func:`lifelong_moe.data.text.documents.normalized_hash`."""
    source: str
    tokens: int = UNCOUNTED
    """By the champion's tokenizer; :data:`UNCOUNTED` if nobody counted them."""
    is_copy: bool = False
    """Whether it was found to be a near copy of what was known then."""


@dataclass(frozen=True)
class ReadFile:
    """What a file of the inbox held when it was read, so that it need not be read again."""

    state: State
    bytes: int
    sha256: Sha256
    held_bytes: int
    """Counted against the limit for the inbox."""
    hashes: str
    """Of its documents, one after the other, hexadecimal."""
    same: str
    """16 bytes for each, likewise."""
    sources: tuple[str, ...]
    tokens: tuple[int, ...]
    copies: tuple[int, ...] = ()
    """Numbers of the documents that were near copies."""

    def __post_init__(self) -> None:
        number = len(self.sources)
        texts = ((self.hashes, 64), (self.same, 32))
        if not all(re.fullmatch(f"[0-9a-f]{{{width * number}}}", text) for text, width in texts):
            raise CorruptError(f"hashes of {number} documents were expected.")
        is_bounded = min(self.tokens, default=0) >= UNCOUNTED and self.held_bytes >= 0 <= self.bytes
        if len(self.tokens) != number or not is_bounded or not all(0 <= one < number for one in self.copies):
            raise CorruptError("a number is out of its range.")

    @classmethod
    def of(cls, state: State, found: Mapping[str, Any], held_bytes: int, rows: Sequence[Row]) -> ReadFile:
        """A file whose documents have these rows; ``found`` has its ``bytes`` and ``sha256``."""
        return cls(
            state,
            found["bytes"],
            found["sha256"],
            held_bytes,
            "".join(row.hash for row in rows),
            "".join(row.same.hex() for row in rows),
            tuple(row.source for row in rows),
            tuple(row.tokens for row in rows),
            tuple(number for number, row in enumerate(rows) if row.is_copy),
        )

    def rows(self) -> list[Row]:
        """Its documents, in their order."""
        same, copies = bytes.fromhex(self.same), frozenset(self.copies)
        return [
            Row(self.hashes[64 * i : 64 * i + 64], same[16 * i : 16 * i + 16], source, self.tokens[i], i in copies)
            for i, source in enumerate(self.sources)
        ]
