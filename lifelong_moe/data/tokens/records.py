"""Record what a run must remember of its text, so that committed stages never need that text again.

A record says what a distribution's text was: fingerprints and sizes, no text. Held-out documents, without which nothing
could be measured on it, are kept apart, in ``heldout/<SHA-256 of the file>.jsonl`` (``text``, ``source``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lifelong_moe.data.text.documents import Corpus, Document
from lifelong_moe.data.text.kept import document_rows, read_rows, rows_sha256
from lifelong_moe.data.text.known import hashes_of, summary_of
from lifelong_moe.data.tokens.shards import TokenizedCorpus
from lifelong_moe.data.tokens.tokenizer import Tokenizer
from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.files import new_file
from lifelong_moe.storage.grammars import Prefix, Sha256
from lifelong_moe.storage.keys import file_sha256
from lifelong_moe.storage.modes import SHARED
from lifelong_moe.storage.plain_files import open_stored

DIGITS = 16
"""Hexadecimal digits kept of the hash of each document that was left out."""


@dataclass(frozen=True, kw_only=True)
class TextRecord:
    """A distribution's text, as a run last read it."""

    train_hash: Sha256
    heldout_hash: Sha256
    split_hash: Sha256
    """See :attr:`lifelong_moe.data.text.documents.Corpus.split_hash`."""
    documents: int
    tokens: int
    bytes_per_token: float
    """These three of the training text."""
    heldout_documents: int
    heldout_tokens: int
    duplicates: int
    left_out: tuple[Prefix, ...] = ()
    """First digits of the hash of each training document left out as a near copy of held-out text."""
    kept: Sha256 | None = None
    """Address of its held-out documents in the :class:`HeldoutStore`; None if they are not kept."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the training text; no token but each document's BOS stands for none."""
        return round(self.bytes_per_token * (self.tokens - self.documents))

    @classmethod
    def of(cls, corpus: Corpus, tokens: TokenizedCorpus) -> TextRecord:
        """Make the record of available text; its held-out documents are not stored yet."""
        return cls(
            train_hash=corpus.train_hash,
            heldout_hash=corpus.heldout_hash,
            split_hash=corpus.split_hash,
            documents=tokens.train.num_documents,
            tokens=tokens.train.num_tokens,
            bytes_per_token=tokens.train.bytes_per_token,
            heldout_documents=tokens.heldout.num_documents,
            heldout_tokens=tokens.heldout.num_tokens,
            duplicates=corpus.duplicates,
            left_out=tuple(digest[:DIGITS] for digest in hashes_of(corpus.near_copies)),
        )


class HeldoutStore:
    """Held-out documents under ``mlruns/heldout/``, named by their content."""

    def __init__(self, root: Path) -> None:
        self.root = root / "heldout"

    def path(self, address: str) -> Path:
        """File of a set of documents."""
        return self.root / f"{address}.jsonl"

    def add(self, documents: Sequence[Document], mode: int = SHARED) -> str:
        """Keep documents, in the order given, in a file of permissions ``mode``; returns their address."""
        # Named by content, so runs with the same held-out text share one file, and damage shows.
        path = self.path(address := summary_of(documents).rows or rows_sha256(documents))
        # A damaged file is written again.
        if path.is_file() and file_sha256(path) == address:
            # Restarts the grace period of garbage collection: no run may refer to the file yet.
            os.utime(path)
        else:
            with new_file(path, mode) as work, work.open("wb") as file:
                file.writelines(document_rows(documents))
        return address

    def documents(self, address: str) -> list[Document]:
        """The documents of an address.

        Raises:
            CorruptError: If they are missing or damaged.
        """
        path = self.path(address)
        try:
            with open_stored(path) as file:
                return read_rows(file, path, address)
        except FileNotFoundError:
            raise CorruptError(f"{path}: missing, but a run refers to it.") from None


@dataclass(frozen=True)
class Remembered:
    """What there is in place of text that is gone. By default nothing: all text must be there."""

    records: Mapping[str, TextRecord] = field(default_factory=dict)
    """By distribution; only of those whose entry in the configuration is the same as then."""
    heldout: HeldoutStore | None = None
    tokenizer: Callable[[], Tokenizer | None] = lambda: None
    """The tokenizer of the run's first stage; None if that is not committed."""
    added: Callable[[int], Tokenizer | None] = lambda stage: None
    """The newest tokenizer of the stage of this index; None if that is not committed."""
    within: tuple[Path, ...] | None = None
    """See :func:`lifelong_moe.data.text.sources.read_corpus`."""
    read: Mapping[str, Corpus] = field(default_factory=dict)
    """What this process has read already of the same distributions, and need not read again."""
