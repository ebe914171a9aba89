"""Documents and corpora, and the hashes by which they are known."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lifelong_moe.data.formats.outcomes import FileOutcome
from lifelong_moe.storage.keys import text_sha256
from lifelong_moe.storage.modes import SHARED

SHORT_TEXT = 64
"""In a text with fewer letters and digits than this, symbols count when duplicates are sought."""
_EDGES = ("Ps", "Pe", "Pi", "Pf", "Po")
"""Unicode categories of brackets, quotation marks and sentence punctuation; dashes and symbols are of others."""
_OPERATORS = frozenset("#%&*/@\\")
"""What is punctuation to Unicode, but not at the edge of a number."""
_VARIATIONS = frozenset(map(chr, range(0xFE00, 0xFE10)))
"""Marks that only choose how an emoji looks."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text, never empty."""

    text: str
    source: str
    """Split unit: documents of one unit are never divided between train and held-out."""
    origin: str = field(default="", compare=False, repr=False)
    """``file:line`` if known, for messages only."""

    @property
    def hash(self) -> str:
        """SHA-256 of the UTF-8 text, hexadecimal."""
        return text_sha256(self.text)

    @property
    def num_bytes(self) -> int:
        """Length of the UTF-8 text."""
        # Asked several times of each document, and most text needs no encoding to know.
        return len(self.text) if self.text.isascii() else len(self.text.encode("utf-8"))


@dataclass(frozen=True, slots=True)
class Corpus:
    """A distribution's documents. Both lists are in order of document hash, which is also their shuffle."""

    name: str
    train: Sequence[Document]
    heldout: Sequence[Document]
    train_hash: str
    """SHA-256 over the sorted document hashes: file names and their order do not count."""
    heldout_hash: str
    duplicates: int = 0
    """Documents left out because they repeat others."""
    near_copies: Sequence[Document] = field(default_factory=list)
    """Left out of ``train`` because they are near copies of held-out text, of this or another distribution."""
    mode: int = SHARED
    """Permissions of files that are made of this text: as private as each of those it came from."""
    files: tuple[FileOutcome, ...] = field(default=(), compare=False)
    """What became of each file that was read for it; see :func:`lifelong_moe.data.text.files.settled`."""
    identity: str = field(default="", compare=False)
    """Of all that it was made of: its configuration and the hashes of its files. Empty if that is not known."""
    state: str = field(default="", compare=False)
    """Of its files, as the file system describes them now; empty if that is not known, or might hide a change."""
    before_near_copies: str = field(default="", compare=False)
    """Hash of the training text before near copies were left out; empty where none were."""
    beyond: frozenset[str] = field(default=frozenset(), compare=False)
    """Files of documents that ``max_bytes`` left out."""
    remember: Callable[[], None] | None = field(default=None, compare=False, repr=False)
    """Lets a later start read nothing of it; called once no mistake is found, for it writes. None: nothing new."""

    @property
    def split_hash(self) -> str:
        """Of the training text with its near copies: how documents were split, whatever else a run holds out."""
        if self.before_near_copies or not self.near_copies:
            return self.before_near_copies or self.train_hash
        return documents_hash([*self.train, *self.near_copies])


def documents_hash(documents: Iterable[Document]) -> str:
    """Return one SHA-256 for a set of documents, whatever their order, names and files."""
    return hash_of_hashes(document.hash for document in documents)


def hash_of_hashes(hashes: Iterable[str]) -> str:
    """:func:`documents_hash`, of which only the documents' own hashes are left."""
    return text_sha256("\n".join(sorted(hashes)))


def normalized_hash(text: str) -> str:
    """Return a hash that two texts share if they differ only in case, spaces and punctuation.

    Composed and decomposed characters are the same; marks belong to their letters, as vowel signs do. In a text of
    few letters and digits ``12<3`` and ``12>3`` are not the same: there only spaces, and punctuation at the edges of
    words, do not count.

    Source:
        Unicode 16.0, D145 (canonical caseless matching), and table 4-4 (general categories).
    """
    found = letters(text)
    # Few letters: `a < b` and `a > b` must stay two documents, so symbols count here.
    if len(found) < SHORT_TEXT:
        folded = _folded(text)
        found = " ".join(filter(None, map(_without_edges, folded.split()))) or folded
    return text_sha256(found)


def letters(text: str) -> str:
    """Return the letters, with their marks, and the digits of a text, in one case and one form of composition."""
    # Of ASCII the same in a tenth of the time: there is nothing to compose, and case has no exceptions.
    if text.isascii():
        return text.lower().encode("ascii").translate(None, _NO_LETTERS).decode("ascii")
    return _folded(text).translate(_LETTERS)


def _folded(text: str) -> str:
    # Decomposed before folding, as D145 asks, for rare characters such as U+0345.
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())


class _Letters(dict[int, int | None]):
    """For ``str.translate``: letters, their marks and digits stay; looked up once a character."""

    def __missing__(self, code: int) -> int | None:
        char = chr(code)
        # Marks are kept (Unicode's M): without its vowel signs, an Indic word is another word.
        self[code] = code if unicodedata.category(char)[0] in "LMN" and char not in _VARIATIONS else None
        return self[code]


_LETTERS = _Letters()
_NO_LETTERS = bytes(code for code in range(128) if unicodedata.category(chr(code))[0] not in "LN")


def _without_edges(word: str) -> str:
    """A word without punctuation before and after it."""
    # Control and format characters, such as a zero-width joiner, are invisible and do not count.
    chars = [char for char in word if unicodedata.category(char)[0] != "C"]
    inner = [i for i, c in enumerate(chars) if c in _OPERATORS or unicodedata.category(c) not in _EDGES]
    return "".join(chars[inner[0] : inner[-1] + 1]) if inner else ""
