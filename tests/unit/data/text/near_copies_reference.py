"""Near copies as earlier versions sought them, by sparse matrices of all runs: what arrays of numbers have to equal.

Compared exactly, by every run of :data:`NGRAM` letters and digits: in the same form in which equal documents are found
(:func:`lifelong_moe.data.text.documents.letters`), so case, spaces and punctuation do not count, and scripts without
spaces need no words. Two documents are near copies if either has half of its runs in the other.

Legend: D documents, R known documents, W distinct runs.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.data.text.documents import SHORT_TEXT, Corpus, Document, documents_hash, letters
from lifelong_moe.data.text.known import opened, summary_of, told_of
from lifelong_moe.data.text.spool import SpooledDocuments, chosen, source_number, source_numbers
from lifelong_moe.errors import DataError

if TYPE_CHECKING:
    from scipy import sparse

NGRAM = 16
"""Letters of a run, a power of 2: three or four words. A word that was changed costs about 20 runs."""
SHARE = 0.5
"""Least share of its own runs that a near copy has in common with a known document."""
COMMON_SOURCES = 8
"""Most sources that have a run in common; a run of more (a licence, a greeting, a template) is *common*, any other is
a document's *own*. Common runs do not count."""
LEAST_OWN = 0.1
"""Least share of a document's runs that must be its own; one with less is judged by all its runs, common ones too."""
PART_BYTES = 32 << 20
"""Training text that is compared at once."""
LEAST = SHORT_TEXT - NGRAM + 1
"""Runs below which a document is too short: only equal ones are found, see ``normalized_hash``."""
_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F)
"""Odd numbers of 64 bits: the first hashes letters, each other one joins two halves of a run."""
FILTER_BITS = 24
"""Low bits of a hash that index the filter of a table: one flag for each value, 16 MiB together."""
_LOW = np.uint64((1 << FILTER_BITS) - 1)


def ngrams(text: str) -> NDArray[np.uint64]:
    """Hashes of every run of :data:`NGRAM` letters and digits, sorted, each once, uint64 ``(n,)``.

    A run of 2k letters is hashed from its halves, so four passes over the text make all runs of 16. The hashes are the
    same everywhere; two of a billion different runs share one with a probability of 3 %.
    """
    # UTF-32, so that each letter is one number in every script.
    codes = np.frombuffer(letters(text).encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    if len(codes) < NGRAM:
        return codes[:0]
    hashes = _mixed((codes + np.uint64(1)) * np.uint64(_MULTIPLIERS[0]))
    for i, half in enumerate((1, 2, 4, 8), 1):
        hashes = _mixed(hashes[:-half] * np.uint64(_MULTIPLIERS[i]) + hashes[half:])
    return _distinct(hashes)


def _distinct(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Sorted distinct hashes, three times faster than ``np.unique``."""
    ordered = np.sort(hashes)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]


def _mixed(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Let high bits, in which a product is best, reach the low ones."""
    return hashes ^ (hashes >> np.uint64(31))


class _Table:
    """The distinct runs of some documents, sorted; a run's index is its column in :class:`_Texts`."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self.runs_W = _distinct(np.concatenate([np.zeros(0, np.uint64), *(ngrams(d.text) for d in documents)]))
        # A filter with false positives only; `places` confirms each by search.
        self.maybe = np.zeros(1 << FILTER_BITS, dtype=bool)
        self.maybe[self.runs_W & _LOW] = True

    def places(self, runs: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Indices in ``runs_W`` of those runs that are in the table."""
        # Most runs are not in the table, and reading one flag is cheaper than a search.
        runs = runs[self.maybe[runs & _LOW]]
        places = np.searchsorted(self.runs_W, runs)
        # `searchsorted` puts what exceeds all runs one past the end; the next line compares and drops it.
        places[places == len(self.runs_W)] = 0
        return places[self.runs_W[places] == runs]


@dataclass(frozen=True)
class _Texts:
    """Documents as rows of a matrix over the runs of a table."""

    has_DW: sparse.csr_array
    """1 where a document has a run, int32; runs that are not in the table are not there."""
    size_D: NDArray[np.int64]
    """Runs of each document, those that are not in the table too."""
    source_D: NDArray[np.uint64]
    """A hash of each document's source, of 64 bits."""

    @classmethod
    def of(cls, documents: Iterable[Document], table: _Table) -> _Texts:
        """Look every run up in a table."""
        # Imported here: importing scipy takes as long as answering a command about a run may take.
        from scipy import sparse

        columns, lengths, sizes, sources = array("i"), array("q", [0]), array("q"), array("Q")
        for document in documents:
            runs = ngrams(document.text)
            found = table.places(runs).astype(np.int32)
            columns.frombytes(found.tobytes())
            lengths.append(len(found))
            sizes.append(len(runs))
            sources.append(source_number(document))
        # Numbers of 32 bits: they count shared runs, which would overflow a byte, and there are as many as runs.
        columns_N, ends = np.frombuffer(columns, np.int32), np.cumsum(lengths)
        shape = (len(sizes), len(table.runs_W))
        has = sparse.csr_array((np.ones(len(columns_N), np.int32), columns_N, ends), shape=shape)
        return cls(has, np.array(sizes, np.int64), np.array(sources, np.uint64))


def near_copies(documents: Sequence[Document], known: Iterable[Document], *, may_contain: bool) -> list[bool]:
    """What :func:`lifelong_moe.data.text.near_copies.near_copies` finds."""
    if not documents:
        return []
    table = _Table(documents)
    new, old = _Texts.of(documents, table), _Texts.of(known, table)
    sources = np.unique(np.concatenate([new.source_D, old.source_D]))
    return _Judge(old, _common([new, old], sources)).copies(new, may_contain=may_contain).tolist()


def without_near_copies(
    corpora: Mapping[str, Corpus], others: Mapping[str, Sequence[Document]] | None = None
) -> dict[str, Corpus]:
    """Leave out of each training text what is a near copy of any distribution's held-out text.

    What counts as common to many sources follows from a distribution's own text alone, so another distribution can only
    add near copies, and only by held-out text that is one.

    Args:
        corpora: As split, or as this returned them; held-out text is not changed.
        others: Held-out documents of further distributions, whose training text does not matter.

    Raises:
        DataError: If no training text is left.
    """
    parts = {name: corpus.heldout for name, corpus in corpora.items()} | dict(others or {})
    held = [document for documents in parts.values() for document in documents]
    owner = np.array([name for name, documents in parts.items() for _ in documents])
    table = _Table(held)
    heldout = _Texts.of(held, table)
    found = {}
    for name, corpus in corpora.items():
        # From the split on, so that calling this again with more held-out text gives the same as one call.
        train = opened(corpus.train)
        # Documents of a spool are in order of hash already, and need not be held.
        if corpus.near_copies or not isinstance(train, SpooledDocuments):
            train = sorted([*corpus.train, *corpus.near_copies], key=lambda document: document.hash)
        rows = np.flatnonzero(owner == name)
        held_here = _Texts(heldout.has_DW[rows], heldout.size_D[rows], heldout.source_D[rows])
        sources = np.unique(np.concatenate([source_numbers(train), held_here.source_D]))
        # Little text is looked up once; of more, what is shared would fill memory, and it is looked up twice.
        parts_of = partial(_parts, train, table)
        trained = list(parts_of()) if summary_of(train).bytes <= PART_BYTES else None
        # Common runs are those of this distribution alone: another one must not make held-out text "common".
        common_W = _common(chain([held_here], trained or parts_of()), sources)
        judge = _Judge(heldout, common_W)
        copies = np.concatenate([judge.copies(part, may_contain=False) for part in trained or parts_of()])
        if copies.all():
            raise DataError(
                f"distributions.{name}: all {len(train)} training documents are near copies of held-out text; let "
                f"versions of one text share a source, so that they are split together."
            )
        kept, left = (chosen(train, copies == side) for side in (False, True))
        digest = corpus.train_hash if len(kept) == len(corpus.train) else documents_hash(kept)
        found[name] = replace(
            corpus, train=kept, train_hash=digest, near_copies=left, before_near_copies=corpus.split_hash
        )
    return found


def _parts(documents: Sequence[Document], table: _Table) -> Iterator[_Texts]:
    """Documents in parts of so much text that what they share with a table fits into memory."""
    part, num_bytes = list[Document](), 0
    for document in told_of(documents, "looking for near copies"):
        part.append(document)
        num_bytes += document.num_bytes
        if num_bytes >= PART_BYTES:
            yield _Texts.of(part, table)
            part, num_bytes = [], 0
    if part:
        yield _Texts.of(part, table)


def _common(texts: Iterable[_Texts], sources: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Runs that more than :data:`COMMON_SOURCES` sources have, bool ``(W,)``; ``sources`` are all there are, sorted."""
    common_W, known = np.zeros(0, dtype=bool), np.zeros(0, dtype=np.uint64)
    for text in texts:
        if not len(common_W):
            common_W = np.zeros(text.has_DW.shape[1], dtype=bool)
        # A run and a source in one number; of a run that is common already no source counts any more.
        runs = text.has_DW.indices.astype(np.uint64)
        places = np.searchsorted(sources, text.source_D).astype(np.uint64)
        pairs = runs << np.uint64(32) | np.repeat(places, np.diff(text.has_DW.indptr))
        # Stable, which for two sorted halves is a merge.
        known = np.concatenate([known, _distinct(pairs[~common_W[runs]])])
        known.sort(kind="stable")
        known = known[np.append(True, known[1:] != known[:-1])[: len(known)]]
        runs = known >> np.uint64(32)
        begins = np.flatnonzero(np.append(True, runs[1:] != runs[:-1])[: len(runs)])
        numbers = np.diff(np.append(begins, len(runs)))
        common_W[runs[begins[numbers > COMMON_SOURCES]]] = True
        known = known[~common_W[runs]]
    return common_W


class _Judge:
    """Finds near copies of known documents.

    Args:
        known: What may be repeated.
        common_W: Runs that do not count.
    """

    def __init__(self, known: _Texts, common_W: NDArray[np.bool_]) -> None:
        self._common_W, self._rare = common_W.astype(np.int32), np.flatnonzero(~common_W)
        self._known_RW, self._own_R = known.has_DW[:, self._rare], self._own(known)
        self._size_R = known.size_D
        self._is_known_W = (np.bincount(known.has_DW.indices, minlength=len(common_W)) > 0).astype(np.int32)

    def _own(self, text: _Texts) -> NDArray[np.int64]:
        return text.size_D - text.has_DW @ self._common_W

    def copies(self, new: _Texts, *, may_contain: bool) -> NDArray[np.bool_]:
        """Which new documents are near copies of known ones, bool ``(D,)``; see :func:`near_copies`."""
        own_D = self._own(new)
        pairs = (new.has_DW[:, self._rare] @ self._known_RW.T).tocoo()
        is_copy = np.zeros(len(own_D), dtype=bool)
        sides = [(own_D, new.size_D, pairs.row), (self._own_R, self._size_R, pairs.col)]
        for own, size, side in sides[:1] if may_contain else sides:
            # A document with few runs of its own would share half of them with many others by chance.
            judged = (own >= LEAST) & (own >= LEAST_OWN * size)
            is_copy[pairs.row[judged[side] & (pairs.data >= SHARE * own[side])]] = True
        # New text with almost no run of its own is a copy if half of all its runs, common ones too, are known.
        shared_D = new.has_DW @ self._is_known_W
        return is_copy | ((new.size_D >= LEAST) & (own_D < LEAST_OWN * new.size_D) & (shared_D >= SHARE * new.size_D))
