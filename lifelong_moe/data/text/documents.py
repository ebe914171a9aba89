"""Build a corpus from documents: drop duplicates, cap, split, and sort into canonical order."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.formats.outcomes import FileOutcome
from lifelong_moe.errors import DataError
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
        return len(self.text.encode("utf-8"))


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
    before_near_copies: str = field(default="", compare=False)
    """Hash of the training text before near copies were left out; empty where none were."""
    beyond: frozenset[str] = field(default=frozenset(), compare=False)
    """Origins of documents that ``max_bytes`` left out."""
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


def _without_edges(word: str) -> str:
    """A word without punctuation before and after it."""
    # Control and format characters, such as a zero-width joiner, are invisible and do not count.
    chars = [char for char in word if unicodedata.category(char)[0] != "C"]
    inner = [i for i, c in enumerate(chars) if c in _OPERATORS or unicodedata.category(c) not in _EDGES]
    return "".join(chars[inner[0] : inner[-1] + 1]) if inner else ""


def build_corpus(
    name: str, documents: Sequence[Document], config: SourceConfig, heldout: Sequence[Document] | None = None
) -> Corpus:
    """Turn documents into a distribution: drop duplicates, cap, split by source unit, sort by hash.

    Both the cap and the split decide by a hash of the unit's name, each with its own salt, so neither depends on the
    order of documents, and a unit stays on its side of the split when others are added.

    Args:
        name: The distribution.
        documents: All documents, or with ``heldout`` the training documents.
        config: ``heldout_fraction``, ``heldout_sources`` and ``max_bytes``.
        heldout: Explicit held-out documents; they are neither capped nor split.

    Returns:
        The corpus, with at least one document on each side.

    Raises:
        DataError: Over half the documents are duplicates, too few documents or units, or a training document is in
            the held-out set.
    """
    distinct, held = _distinct(documents), _distinct(heldout or [])
    duplicates = len(documents) - len(distinct) + len(heldout or []) - len(held)
    # Before the cap: a training document that is also held out is an error even if the cap would drop it.
    _refuse_overlap(distinct, held)
    beyond = frozenset[str]()
    if config.max_bytes is not None:
        # Where documents are yet to be split at least two units, so that each side has one.
        train = _capped(distinct, config.max_bytes, least=2 if heldout is None else 1)
        beyond = frozenset(d.origin for d in distinct) - {d.origin for d in train}
    else:
        train = distinct
    if heldout is None:
        train, held = _split(train, config.heldout_fraction, config.heldout_sources)
    for side, part in (("training", train), ("held-out", held)):
        if not part:
            raise DataError(f"there are no {side} documents.")
    hashes = documents_hash(train), documents_hash(held)
    return Corpus(name, _in_hash_order(train), _in_hash_order(held), *hashes, duplicates, beyond=beyond)


def heldout_part(documents: Sequence[Document]) -> list[Document]:
    """The held-out side that :func:`build_corpus` makes of explicit held-out documents."""
    return _in_hash_order(_distinct(documents))


def _distinct(documents: Sequence[Document]) -> list[Document]:
    """Keep one document of each set of duplicates: the first by (source, hash), so that reading order is moot."""
    kept: dict[str, Document] = {}
    for document in documents:
        key = normalized_hash(document.text)
        other = kept.get(key)
        if other is None or (document.source, document.hash) < (other.source, other.hash):
            kept[key] = document
    duplicates = len(documents) - len(kept)
    # A few repeats are normal in real text; a majority means that the configuration names a file twice.
    if 2 * duplicates > len(documents):
        raise DataError(
            f"{duplicates} of {len(documents)} documents are duplicates of others (case, spaces "
            "and punctuation aside); at most half may be. Is a file matched or concatenated twice?"
        )
    return list(kept.values())


def _units(documents: Iterable[Document]) -> dict[str, list[Document]]:
    units: dict[str, list[Document]] = {}
    for document in documents:
        units.setdefault(document.source, []).append(document)
    return units


def _unit_hash(salt: str, unit: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{salt}\n{unit}".encode()).digest(), "big")


def _capped(documents: list[Document], max_bytes: int, least: int) -> list[Document]:
    """Take whole units in hash order, passing over those that no longer fit, but at least ``least`` units."""
    units = _units(documents)
    kept: list[Document] = []
    total = taken = 0
    for unit in sorted(units, key=lambda unit: _unit_hash("cap", unit)):
        size = sum(document.num_bytes for document in units[unit])
        if taken < least or total + size <= max_bytes:
            kept += units[unit]
            total, taken = total + size, taken + 1
    return kept


def _split(documents: list[Document], fraction: float, least: int) -> tuple[list[Document], list[Document]]:
    """Hold out each unit whose hash lies in the lowest ``fraction`` of all hashes.

    Where these are fewer than ``least``, the next ones in order of hash as well, up to half of all; in any case at
    least one unit a side.
    """
    units = _units(documents)
    if len(units) < 2:
        raise DataError(
            f"{len(documents)} distinct document(s) in {len(units)} source unit(s) are too few to "
            "split; at least 2 units are needed. Add documents, or give heldout_files."
        )
    order = sorted(units, key=lambda unit: _unit_hash("split", unit))
    # A fixed threshold, not a share of the units present: in a large corpus, adding units moves no other one.
    threshold = int(fraction * 2**256)
    num_held = sum(_unit_hash("split", unit) < threshold for unit in order)
    num_held = min(max(num_held, min(least, len(order) // 2), 1), len(order) - 1)
    held = [document for unit in order[:num_held] for document in units[unit]]
    train = [document for unit in order[num_held:] for document in units[unit]]
    # Duplicates were dropped before; a leak would make every held-out loss look too good.
    assert not {normalized_hash(d.text) for d in held} & {normalized_hash(d.text) for d in train}
    return train, held


def _refuse_overlap(train: list[Document], heldout: list[Document]) -> None:
    held = {normalized_hash(document.text): document for document in heldout}
    for document in train:
        twin = held.get(normalized_hash(document.text))
        if twin is not None:
            raise DataError(
                f"{document.origin or document.source}: this training document is also in the held-out set "
                f"({twin.origin or twin.source}); remove it from one of the two."
            )


def _in_hash_order(documents: list[Document]) -> list[Document]:
    return sorted(documents, key=lambda document: document.hash)
