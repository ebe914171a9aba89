"""Runs of letters, and which documents have which of them, in compact arrays of numbers.

A table holds the distinct runs of some documents. Others are looked up in it many documents at a time: every run is
hashed in place, and a filter of bits tells of most that the table does not have them. What there is much of lies in
files without names, which the system maps into memory as far as there is place.

Legend: D documents, R documents of the table, W its distinct runs, H runs found in documents, N all of some letters.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lifelong_moe.data.text.documents import SHORT_TEXT, Document, letters
from lifelong_moe.data.text.spool import source_number
from lifelong_moe.errors import DataError
from lifelong_moe.storage.temporary import unnamed_file

NGRAM = 16
"""Letters of a run, a power of 2: three or four words. A word that was changed costs about 20 runs."""
LEAST = SHORT_TEXT - NGRAM + 1
"""Runs below which a document is too short: only equal ones are found, see ``normalized_hash``."""
LEAST_SHARED = (LEAST + 1) // 2
"""Runs that near copies share at least: half of :data:`LEAST`."""
LEAST_OWN = 0.1
"""Least share of a document's runs that must be its own; one with less is judged by all its runs, common ones too."""
_SAMPLED = 4
"""Of so many runs one is looked at to tell that a document has many; a divisor of :data:`_AT_ONCE`."""
_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F)
"""Odd numbers of 64 bits: the first hashes letters, each other one joins two halves of a run."""
FILTER_BITS = (16, 27)
"""Least and most low bits of a hash that index the filter of a table, a bit for each value: at most 16 MiB."""
_AT_ONCE = 1 << 16
"""Letters hashed together: what is computed of them stays in a processor's cache."""
_BUCKETS = 16
"""Parts of a table, by the first bits of a hash, which are sorted one after the other."""
_MOST_BYTES = 4 << 20
"""Of a column that are held in memory."""
_OWNED = np.dtype([("run", "u8"), ("document", "i4")])
"""A run, and the document that has it."""
MOST_RUNS = (1 << 31) - 1
"""Of a table, whose numbers have 32 bits: those of some 3 GB of text."""
_COUNTED = 1 << 22
"""Runs of a table that are counted at once."""


def ngrams(text: str) -> NDArray[np.uint64]:
    """Hashes of every run of :data:`NGRAM` letters and digits, sorted, each once, uint64 ``(n,)``.

    A run of 2k letters is hashed from its halves, so four passes over the text make all runs of 16. The hashes are the
    same everywhere; two of a billion different runs share one with a probability of 3 %.
    """
    return distinct(_hashes(letters(text)))


def _hashes(plain: str) -> NDArray[np.uint64]:
    """Hashes of every run of letters, in their order."""
    if plain.isascii():
        hashes = _OF_ASCII[np.frombuffer(plain.encode("ascii"), dtype=np.uint8)]
    else:
        # UTF-32, so that each letter is one number in every script.
        hashes = _of_letters(np.frombuffer(plain.encode("utf-32-le"), dtype="<u4").astype(np.uint64))
    if len(hashes) < NGRAM:
        return hashes[:0]
    for i, half in enumerate((1, 2, 4, 8), 1):
        joined = hashes[:-half] * np.uint64(_MULTIPLIERS[i])
        joined += hashes[half:]
        joined ^= joined >> np.uint64(31)  # high bits, in which a product is best, must reach the low ones
        hashes = joined
    return hashes


def _of_letters(codes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    hashes = (codes + np.uint64(1)) * np.uint64(_MULTIPLIERS[0])
    return hashes ^ (hashes >> np.uint64(31))


_OF_ASCII = _of_letters(np.arange(128, dtype=np.uint64))


def distinct(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Sorted distinct numbers, three times faster than ``np.unique``."""
    ordered = np.sort(numbers)
    return ordered[_is_first(ordered)]


def _is_first(ordered: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Which of some sorted numbers differ from the one before."""
    first = np.ones(len(ordered), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return first


def begins_of(ordered: NDArray[np.integer]) -> NDArray[np.int64]:
    """Where each different one of some sorted numbers begins; and their number, at the end."""
    return np.append(np.flatnonzero(_is_first(ordered)), len(ordered))


class Column:
    """Numbers, one after the other: in memory while they are few, else in a file without a name.

    Args:
        dtype: Of each.
        folder: Where the file is made; None, or a folder that cannot be written to, keeps all in memory.
    """

    def __init__(self, dtype: DTypeLike, folder: Path | None) -> None:
        self._dtype, self._folder, self._buffer = np.dtype(dtype), folder, bytearray()
        self._file: IO[bytes] | None = None

    def extend(self, numbers: NDArray[Any]) -> None:
        """Add numbers at the end."""
        self._buffer += numbers.tobytes()
        if len(self._buffer) > _MOST_BYTES and self._folder is not None:
            self._file = self._file or unnamed_file(self._folder)
            if self._file is None:
                self._folder = None
                return
            self._file.write(self._buffer)
            self._buffer.clear()

    def array(self) -> NDArray[Any]:
        """All of them ``(n,)``, mapped where they are in a file. Afterwards nothing can be added."""
        if self._file is None:
            return np.frombuffer(self._buffer, self._dtype)
        # The map keeps what is in the file, which has no name and goes with it.
        with self._file as file:
            file.write(self._buffer)
            file.flush()
            self._buffer.clear()
            return np.memmap(file, self._dtype, "r")


class Table:
    """The distinct runs of some documents, sorted, and who has which: 12 bytes a run, and more where two have it.

    Args:
        documents: They are read once, and not held.
        folder: See :class:`Column`.

    Raises:
        DataError: If they have more runs than :data:`MOST_RUNS`.
    """

    def __init__(self, documents: Iterable[Document], folder: Path | None = None) -> None:
        sizes, sources = array("q"), array("Q")
        buckets = [Column(_OWNED, folder) for _ in range(_BUCKETS)]
        shift = np.uint64(64 - _BUCKETS.bit_length() + 1)
        for number, document in enumerate(documents):
            runs = ngrams(document.text)
            owned = np.empty(len(runs), _OWNED)
            owned["run"], owned["document"] = runs, number
            ends = np.searchsorted(runs >> shift, np.arange(_BUCKETS, dtype=np.uint64), side="right").tolist()
            for bucket, begin, end in zip(buckets, [0, *ends], ends, strict=False):
                bucket.extend(owned[begin:end])
            sizes.append(len(runs))
            sources.append(source_number(document))
        self.size_R = np.array(sizes, np.int64)
        """Runs of each document."""
        self.source_R = np.array(sources, np.uint64)
        """A hash of each document's source, of 64 bits."""
        columns: list[Column] = [Column(dtype, folder) for dtype in (np.uint64, np.int32, np.int32, np.int32)]
        number = 0
        while buckets:
            owned = buckets.pop(0).array()
            runs = np.array(owned["run"])
            order = np.argsort(runs, kind="stable")
            runs, owner = runs[order], owned["document"][order]
            is_first = _is_first(runs)
            places = (np.cumsum(is_first) - 1 + number).astype(np.int32)
            number += int(is_first.sum())
            if number > MOST_RUNS:
                raise DataError(
                    f"text that is held out has more than {MOST_RUNS:,} different runs of {NGRAM} letters, which is "
                    f"some 3 GB: lower heldout_fraction, or name heldout_files."
                )
            found: list[NDArray[Any]] = [runs[is_first], owner[is_first], places[~is_first], owner[~is_first]]
            for column, numbers in zip(columns, found, strict=True):
                column.extend(numbers)
        # The first document that has a run; further ones are told by the two that follow, in order of run.
        self.runs_W, self._first_W, self._again_run, self._again_document = (column.array() for column in columns)
        self._index()

    def _index(self) -> None:
        """Make what runs are found by."""
        number = len(self)
        bits = min(max((16 * number).bit_length(), FILTER_BITS[0]), FILTER_BITS[1])
        self._low = np.uint64((1 << bits) - 1)
        self._filter = np.zeros(1 << (bits - 3), dtype=np.uint8)
        # Where the runs of the same first bits begin: hashes are spread evenly, so these are few.
        high = max(1, number.bit_length() - 4)
        self._high, counts = np.uint64(64 - high), np.zeros((1 << high) + 1, np.int32)
        for part in np.array_split(self.runs_W, 1 + number // _AT_ONCE):
            low = (part & self._low).astype(np.int64)
            np.bitwise_or.at(self._filter, low >> 3, np.left_shift(1, low & 7).astype(np.uint8))
            begins = begins_of(firsts := (part >> self._high).astype(np.int64))
            counts[firsts[begins[:-1]] + 1] += np.diff(begins).astype(np.int32)
        self._steps = int(counts.max()).bit_length()
        self._begins = np.cumsum(counts, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.runs_W)

    def places(self, hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of some runs are in the table, and which of its runs they are."""
        # Most runs are not in the table, and reading one bit is cheaper than a search.
        low = (hashes & self._low).view(np.int64)
        bytes_N = self._filter[low >> 3]
        which = np.flatnonzero((bytes_N >> (low & 7).astype(np.uint8)) & 1)
        sought = hashes[which]
        # Equal parts of the table are read together when what is sought is in order.
        order = np.argsort(sought)
        which, sought = which[order], sought[order]
        found = self._searched(sought)
        # What exceeds all runs is one past the end; the next line compares and drops it.
        found[found == len(self)] = 0
        is_there = self.runs_W[found] == sought if len(self) else np.zeros(len(found), dtype=bool)
        return which[is_there], found[is_there]

    def _searched(self, sought: NDArray[np.uint64]) -> NDArray[np.int64]:
        """What ``np.searchsorted`` finds, without most of its steps, each of which reads another place of memory."""
        first = (sought >> self._high).astype(np.int64)
        begins, ends = self._begins[first].astype(np.int64), self._begins[first + 1].astype(np.int64)
        for _ in range(self._steps):
            middles = (begins + ends) >> 1
            is_after = (begins < ends) & (self.runs_W[np.minimum(middles, len(self) - 1)] < sought)
            begins, ends = np.where(is_after, middles + 1, begins), np.where(is_after, ends, middles)
        return begins

    def owners(self, run_H: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Documents that have some runs: which of the runs, and which document."""
        begins, ends = (np.searchsorted(self._again_run, run_H, side) for side in ("left", "right"))
        numbers = ends - begins
        which = np.repeat(np.arange(len(run_H)), numbers)
        further = np.arange(len(which)) - np.repeat(np.cumsum(numbers) - numbers, numbers) + np.repeat(begins, numbers)
        return (
            np.concatenate([np.arange(len(run_H)), which]),
            np.concatenate([self._first_W[run_H], self._again_document[further]]),
        )

    def count(self, is_counted_W: NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many of the runs that a mask says each document has ``(R,)``."""
        counts = np.zeros(len(self.size_R), np.int64)
        for begin in range(0, len(self), _COUNTED):
            part = slice(begin, begin + _COUNTED)
            counts += np.bincount(self._first_W[part][is_counted_W[part]], minlength=len(counts))
        for begin in range(0, len(self._again_run), _COUNTED):
            part = slice(begin, begin + _COUNTED)
            is_counted = is_counted_W[self._again_run[part]]
            counts += np.bincount(self._again_document[part][is_counted], minlength=len(counts))
        return counts

    def documents_of(self, which_R: NDArray[np.bool_], begin: int, end: int) -> NDArray[np.int32]:
        """By how many of some documents each run of a range is had ``(end - begin,)``."""
        numbers = which_R[self._first_W[begin:end]].astype(np.int32)
        # Of the same type: for another one NumPy would copy the whole column.
        again = slice(*np.searchsorted(self._again_run, np.array([begin, end], np.int32)))
        runs = self._again_run[again][which_R[self._again_document[again]]]
        begins = begins_of(runs)
        numbers[runs[begins[:-1]] - begin] += np.diff(begins).astype(np.int32)
        return numbers


@dataclass(frozen=True)
class Hits:
    """Runs of a table that documents have."""

    document_H: NDArray[np.int64]
    """Ascending."""
    run_H: NDArray[np.int32]
    """Ascending within a document, each once."""
    size_D: NDArray[np.int64]
    """Distinct runs of each document, others than the table's too; 0 of one that can be a near copy of nothing."""

    @classmethod
    def of(cls, documents: Sequence[Document], table: Table, common_W: NDArray[np.bool_]) -> Hits:
        """Look up every run of some documents.

        Args:
            documents: A few.
            table: Where they are sought.
            common_W: Runs of the table by which nothing is a near copy ``(W,)``, which many documents may have.
        """
        keys, number, judged = [np.zeros(0, np.uint64)], 0, list[int]()
        for texts in _batches(letters(document.text) for document in documents):
            found, mostly = _looked_up(texts, table)
            keys.append(found + np.uint64(number << 32))
            judged += [number + i for i in mostly]
            number += len(texts)
        key_H = np.concatenate(keys)
        numbers = (key_H >> np.uint64(32)).astype(np.int64), (key_H & np.uint64(0xFFFFFFFF)).astype(np.int32)
        hits = cls(*numbers, np.zeros(number, np.int64))
        # To count all runs of a document takes as long as to look them up, and hardly one need be judged.
        for i in {*judged, *hits.chosen_runs(~common_W).shared(table)[0].tolist()}:
            hits.size_D[i] = len(ngrams(documents[i].text))
        return hits

    def chosen(self, is_chosen_D: NDArray[np.bool_]) -> Hits:
        """Those of some documents, whose numbers stay what they are."""
        is_chosen_H = is_chosen_D[self.document_H]
        return Hits(self.document_H[is_chosen_H], self.run_H[is_chosen_H], self.size_D)

    def chosen_runs(self, is_chosen_W: NDArray[np.bool_]) -> Hits:
        """Those of some runs."""
        is_chosen_H = is_chosen_W[self.run_H]
        return Hits(self.document_H[is_chosen_H], self.run_H[is_chosen_H], self.size_D)

    def shared(self, table: Table) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Documents, documents of the table, and how many runs they share, where these are enough for near copies."""
        which, owner = table.owners(self.run_H)
        pairs = np.sort(self.document_H[which] << 32 | owner)
        begins = begins_of(pairs)
        numbers = np.diff(begins)
        is_enough = numbers >= LEAST_SHARED
        pairs = pairs[begins[:-1][is_enough]]
        return pairs >> 32, pairs & 0xFFFFFFFF, numbers[is_enough]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts that are hashed together."""
    batch, number = list[str](), 0
    for text in texts:
        batch.append(text)
        number += len(text)
        if number >= _AT_ONCE:
            yield batch
            batch, number = [], 0
    if batch:
        yield batch


def _looked_up(texts: Sequence[str], table: Table) -> tuple[NDArray[np.uint64], list[int]]:
    """Look up some texts.

    Returns:
        Number of a text times 2**32, and of a run of the table that it has: sorted, each once. And the numbers of texts
        that may have almost no other runs.
    """
    joined, ends = "".join(texts), np.cumsum([len(text) for text in texts])
    found, sampled = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
    # A long text is hashed in parts, which overlap by what the last runs of each need.
    for start in range(0, max(1, len(joined) - NGRAM + 1), 4 * _AT_ONCE):
        hashes = _hashes(joined[start : start + 4 * _AT_ONCE + NGRAM - 1])
        which, runs = table.places(hashes)
        which += start
        numbers = np.searchsorted(ends, which, side="right")
        # What reaches from one text into the next is no run of either.
        within = which + NGRAM <= ends[numbers]
        found.append(numbers[within].astype(np.uint64) << np.uint64(32) | runs[within].astype(np.uint64))
        sampled.append(hashes[::_SAMPLED])
    keys, sample = distinct(np.concatenate(found)), np.concatenate(sampled)
    hits = np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(texts))
    mostly = []
    for i in np.flatnonzero(hits >= LEAST_SHARED).tolist():
        begin, end = -(-int(ends[i] - len(texts[i])) // _SAMPLED), -(-int(ends[i] - NGRAM + 1) // _SAMPLED)
        # Every fourth run: there are at least as many as these are.
        if hits[i] > (1 - LEAST_OWN) * len(distinct(sample[begin:end])) - 1:
            mostly.append(i)
    return keys, mostly
