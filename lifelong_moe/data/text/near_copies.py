"""Near copies: documents that share so much text with others that a loss on one says nothing new beside the other.

Compared exactly, by every run of :data:`NGRAM` letters and digits: in the same form in which equal documents are found
(:func:`lifelong_moe.data.text.documents.letters`), so case, spaces and punctuation do not count, and scripts without
spaces need no words. Two documents are near copies if either has half of its runs in the other.

``tests/unit/data/text/near_copies_reference.py`` does the same with sparse matrices of all runs.

Legend: D documents, R documents of a table, W its distinct runs, H runs found in documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.data.formats.progress import told
from lifelong_moe.data.text.documents import Corpus, Document, documents_hash
from lifelong_moe.data.text.known import opened, summary_of
from lifelong_moe.data.text.runs import LEAST, LEAST_OWN, LEAST_SHARED, Column, Hits, Table, begins_of, distinct
from lifelong_moe.data.text.split import documents_sha256
from lifelong_moe.data.text.spool import SpooledDocuments, chosen, source_number, source_numbers
from lifelong_moe.errors import DataError

SHARE = 0.5
"""Least share of its own runs that a near copy has in common with a known document."""
COMMON_SOURCES = 8
"""Most sources that have a run in common; a run of more (a licence, a greeting, a template) is *common*, any other is
a document's *own*. Common runs do not count."""
PART_BYTES = 4 << 20
"""Text that is looked up at once."""
RANGES = 16
"""Of runs whose sources are counted one after the other: as many as the first four bits of a number say."""
LEAST_MERGED = 1 << 20
"""Pairs of a run and a source that are collected before they are put in order with all others."""
MOST_HITS = 8 << 20
"""Runs of possible near copies that are held; where there are more, text is looked up a second time."""


@dataclass(frozen=True)
class _Sizes:
    """Runs of documents: all of them, and their own."""

    all: NDArray[np.int64]
    own: NDArray[np.int64]

    def reached(self, which: NDArray[np.int64], shared: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether documents share enough of their own runs."""
        own, size = self.own[which], self.all[which]
        # A document with few runs of its own would share half of them with many others by chance.
        return (own >= LEAST) & (own >= LEAST_OWN * size) & (shared >= SHARE * own)

    def mostly_shared(self, shared: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether documents with almost no run of their own share half of all their runs, common ones too."""
        return (self.all >= LEAST) & (self.own < LEAST_OWN * self.all) & (shared >= SHARE * self.all)


class _Sources:
    """Counts from how many sources each run of a table comes.

    A run and a source are one number, in order; they lie in ranges of runs, so that little is copied at a time.

    Args:
        table: Runs whose sources are counted.
        counts_R: Documents of the table whose sources count, too.
        folder: See :class:`Column`.
    """

    def __init__(self, table: Table, counts_R: NDArray[np.bool_], folder: Path | None = None) -> None:
        self._table, self._counts_R, self._folder = table, counts_R, folder
        # Ranges are told by the first four.
        self._bits = np.uint64(max(4, len(table).bit_length()))
        self._ranges: list[NDArray[np.uint64]] = [np.zeros(0, dtype=np.uint64)] * RANGES
        self._new, self._num_new = list[NDArray[np.uint64]](), 0
        self.common_W = np.zeros(len(table), dtype=bool)
        """Runs that are known to be common so far ``(W,)``: no pair of documents is sought by them."""
        self.common_W = self.common()

    def _paired(self, runs: NDArray[np.int32], sources: NDArray[np.uint64]) -> NDArray[np.uint64]:
        # A run, and as much of its source's hash as there is place for beside it: 40 bits and more of a million runs.
        return runs.astype(np.uint64) << (np.uint64(64) - self._bits) | sources >> self._bits

    def _counted(self, pairs: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        runs = (pairs >> (np.uint64(64) - self._bits)).astype(np.int64)
        begins = begins_of(runs)
        return runs[begins[:-1]], np.diff(begins)

    def add(self, hits: Hits, source_D: NDArray[np.uint64]) -> None:
        """Count the sources of some documents' runs."""
        # Of a run that is common already no source counts any more.
        new = ~self.common_W[hits.run_H]
        self._new.append(distinct(self._paired(hits.run_H[new], source_D[hits.document_H[new]])))
        self._num_new += len(self._new[-1])
        # Rarely, since all are put in order again.
        if self._num_new > max(LEAST_MERGED, sum(map(len, self._ranges)) // 4):
            self._merge()

    def _merge(self) -> None:
        parts = _in_ranges(np.concatenate([np.zeros(0, np.uint64), *self._new]))
        self._new, self._num_new = [], 0
        for number, part in enumerate(parts):
            pairs = distinct(np.concatenate([self._ranges[number], part]))
            runs, numbers = self._counted(pairs)
            is_common = numbers > COMMON_SOURCES
            self.common_W[runs[is_common]] = True
            column = Column(np.uint64, self._folder)
            column.extend(pairs[np.repeat(~is_common, numbers)])
            self._ranges[number] = column.array()

    def common(self) -> NDArray[np.bool_]:
        """Runs that more than :data:`COMMON_SOURCES` sources have ``(W,)``, of all documents that were added."""
        self._merge()
        common_W = self.common_W.copy()
        for number, pairs in enumerate(self._ranges):
            begin, end = (min(i << max(0, int(self._bits) - 4), len(common_W)) for i in (number, number + 1))
            runs, numbers = self._counted(pairs)
            most = self._table.documents_of(self._counts_R, begin, end)
            most[runs - begin] += numbers.astype(np.int32)
            # Only of these can there be enough sources, which are counted once each.
            is_asked = (most > COMMON_SOURCES) & ~common_W[begin:end]
            asked = (np.flatnonzero(is_asked) + begin).astype(np.int32)
            which, owner = self._table.owners(asked)
            counts = self._counts_R[owner]
            held = self._paired(asked[which[counts]], self._table.source_R[owner[counts]])
            old = pairs[np.repeat(is_asked[runs - begin], numbers)]
            runs, numbers = self._counted(distinct(np.concatenate([old, held])))
            common_W[runs[numbers > COMMON_SOURCES]] = True
        return common_W


def _in_ranges(pairs: NDArray[np.uint64]) -> list[NDArray[np.uint64]]:
    """Numbers in order, in ranges of their first bits; what is given is put in order itself."""
    pairs.sort()
    return np.split(pairs, np.searchsorted(pairs, np.arange(1, RANGES, dtype=np.uint64) << np.uint64(60)))


def near_copies(documents: Sequence[Document], known: Iterable[Document], *, may_contain: bool) -> list[bool]:
    """Which documents are near copies of known ones.

    A document is one if it shares half of its own runs with a known document, or else half of the known document's.
    Memory is that of the runs of ``documents`` and of what known ones share with them; of these each text is read once
    and none is held.

    Args:
        documents: To be judged.
        known: What they may repeat, in any order; nothing is read where there is nothing to judge.
        may_contain: Whether a document may contain a known one without being a copy. What is held out must not stand in
            training text at all; text that was merely seen may, or a short line of it would take a new book away.

    Source:
        Containment by shingles: Broder, "On the resemblance and containment of documents" (1997), there of words and
        estimated from samples; here exact, of letters, and without those that many sources share.
    """
    if not documents:
        return []
    table = Table(documents)
    everybody = np.ones(len(documents), dtype=bool)
    sources, is_known_W, held = _Sources(table, everybody), np.zeros(len(table), dtype=bool), list[Hits]()
    for _, part in _parts(enumerate(known)):
        hits = Hits.of(part, table, sources.common_W)
        sources.add(hits, np.array([source_number(document) for document in part], np.uint64))
        is_known_W[hits.run_H] = True
        held.append(hits.chosen(hits.size_D > 0))
    common_W = sources.common()
    new = _Sizes(table.size_R, table.size_R - table.count(common_W))
    is_copy = new.mostly_shared(table.count(is_known_W))
    for hits in held:
        old, (of_old, of_new, shared) = _own(hits, common_W), hits.chosen_runs(~common_W).shared(table)
        is_copy[of_new[new.reached(of_new, shared)]] = True
        if not may_contain:
            is_copy[of_new[old.reached(of_old, shared)]] = True
    return is_copy.tolist()


def _own(hits: Hits, common_W: NDArray[np.bool_]) -> _Sizes:
    common = np.bincount(hits.document_H[common_W[hits.run_H]], minlength=len(hits.size_D))
    return _Sizes(hits.size_D, hits.size_D - common)


def without_near_copies(
    corpora: Mapping[str, Corpus],
    others: Mapping[str, Sequence[Document]] | None = None,
    folder: Path | None = None,
) -> dict[str, Corpus]:
    """Leave out of each training text what is a near copy of any distribution's held-out text.

    What counts as common to many sources follows from a distribution's own text alone, so another distribution can only
    add near copies, and only by held-out text that is one.

    Args:
        corpora: As split, or as this returned them; held-out text is not changed.
        others: Held-out documents of further distributions, whose training text does not matter.
        folder: Where files are made of what there is much of; None keeps all in memory.

    Raises:
        DataError: If no training text is left.
    """
    parts = {name: corpus.heldout for name, corpus in corpora.items()} | dict(others or {})
    owner = np.repeat(list(parts), [len(documents) for documents in parts.values()])
    table = Table(chain.from_iterable(parts.values()), folder)
    found = {}
    for name, corpus in corpora.items():
        # From the split on, so that calling this again with more held-out text gives the same as one call.
        train = opened(corpus.train)
        # Documents of a spool are in order of hash already, and need not be held.
        if corpus.near_copies or not isinstance(train, SpooledDocuments):
            train = sorted([*corpus.train, *corpus.near_copies], key=lambda document: document.hash)
        # Common runs are those of this distribution alone: another one must not make held-out text "common".
        copies = _copies(train, table, _Sources(table, owner == name, folder))
        if copies.all():
            raise DataError(
                f"distributions.{name}: all {len(train)} training documents are near copies of held-out text; let "
                f"versions of one text share a source, so that they are split together."
            )
        kept, left = (chosen(train, copies == side) for side in (False, True))
        digest = corpus.train_hash if len(kept) == len(corpus.train) else _hash(kept)
        found[name] = replace(
            corpus, train=kept, train_hash=digest, near_copies=left, before_near_copies=corpus.split_hash
        )
    return found


def _hash(documents: Sequence[Document]) -> str:
    # Of a spool from its rows, since all hashes as text take as much memory as a tenth of the text.
    return documents_sha256(documents) if isinstance(documents, SpooledDocuments) else documents_hash(documents)


def _copies(train: Sequence[Document], table: Table, sources: _Sources) -> NDArray[np.bool_]:
    """Which training documents are near copies of a table's; ``sources`` counts those of their own distribution."""
    source_D, is_held = source_numbers(train), True
    maybe = list[tuple[NDArray[np.int64], Hits]]()
    for places, hits in _looked_up(train, table, sources):
        sources.add(hits, source_D[places])
        maybe.append((places, _possible(hits, table, sources.common_W)))
        is_held = is_held and sum(len(one.run_H) for _, one in maybe) <= MOST_HITS
        if not is_held:
            maybe.clear()
    common_W = sources.common()
    held = _Sizes(table.size_R, table.size_R - table.count(common_W))
    copies = np.zeros(len(train), dtype=bool)
    for places, hits in maybe if is_held else _looked_up(train, table, sources):
        new, (of_new, of_held, shared) = _own(hits, common_W), hits.chosen_runs(~common_W).shared(table)
        is_copy = new.mostly_shared(np.bincount(hits.document_H, minlength=len(hits.size_D)))
        is_copy[of_new[new.reached(of_new, shared) | held.reached(of_held, shared)]] = True
        copies[places] = is_copy
    return copies


def _looked_up(train: Sequence[Document], table: Table, sources: _Sources) -> Iterator[tuple[NDArray[np.int64], Hits]]:
    """Runs of training documents that a table has, with the places of the documents, in order of reading."""
    each = train.as_read() if isinstance(train, SpooledDocuments) else enumerate(train)
    size = summary_of(train).bytes
    for places, part in _parts(told(each, "looking for near copies", size, lambda one: one[1].num_bytes)):
        yield np.array(places), Hits.of(part, table, sources.common_W)


def _possible(hits: Hits, table: Table, common_W: NDArray[np.bool_]) -> Hits:
    """Hits of documents that may be near copies, whatever runs turn out to be common beside those that are known to."""
    shared_D = np.bincount(hits.document_H, minlength=len(hits.size_D))
    # Without almost all of its runs in the table a document keeps enough of its own.
    is_possible = (hits.size_D > 0) & (shared_D >= LEAST_SHARED) & (shared_D > (1 - LEAST_OWN) * hits.size_D - 1)
    of_new, of_held, shared = hits.chosen_runs(~common_W).shared(table)
    # Fewer runs than these are not half of any tenth.
    least = SHARE * LEAST_OWN * np.minimum(hits.size_D[of_new], table.size_R[of_held]) - 1
    is_possible[of_new[shared >= least]] = True
    return hits.chosen(is_possible)


def _parts(documents: Iterable[tuple[int, Document]]) -> Iterator[tuple[list[int], list[Document]]]:
    """Numbered documents in parts of so much text that what they share with a table fits into memory."""
    numbers, part, num_bytes = list[int](), list[Document](), 0
    for number, document in documents:
        numbers.append(number)
        part.append(document)
        num_bytes += document.num_bytes
        if num_bytes >= PART_BYTES:
            yield numbers, part
            numbers, part, num_bytes = [], [], 0
    if part:
        yield numbers, part
