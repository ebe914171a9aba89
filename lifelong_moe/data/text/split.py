"""Build a corpus from documents: drop duplicates, cap, split, and sort into canonical order, without holding text.

All decisions are made on rows of numbers (:mod:`lifelong_moe.data.text.spool`), in ranges of the hash that decides, so
that memory is bounded however many documents there are. ``tests/unit/data/text/reference.py`` does the same with lists.

Legend: N documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.text.documents import Corpus, Document
from lifelong_moe.data.text.spool import KnownFile, Spool, SpooledDocuments
from lifelong_moe.errors import DataError

RANGE = 2_000_000
"""Rows that are sorted at once; a range of hashes has about so many."""
_AT_ONCE = 1 << 16
"""Rows whose hashes are written as text at once."""
TRAIN, HELDOUT = 0, 1
"""Parts of a spool: documents that are yet to be split, or of training alone; and explicit held-out ones."""
Numbers = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class _Distinct:
    """Which documents stay once duplicates are dropped."""

    kept_N: Mask
    overlap: tuple[int, int] | None
    """The first training document that is also held out, and that one."""


def build_corpus(
    name: str,
    documents: Iterable[Document | KnownFile],
    config: SourceConfig,
    heldout: Iterable[Document | KnownFile] | None = None,
    cache: Path | None = None,
) -> Corpus:
    """Turn documents into a distribution: drop duplicates, cap, split by source unit, sort by hash.

    Both the cap and the split decide by a hash of the unit's name, each with its own salt, so neither depends on the
    order of documents, and a unit stays on its side of the split when others are added.

    Args:
        name: The distribution.
        documents: All documents, or with ``heldout`` the training documents; read once. Known files are not read.
        config: ``heldout_fraction``, ``heldout_sources`` and ``max_bytes``.
        heldout: Explicit held-out documents, read first; they are neither capped nor split.
        cache: Directory where text is kept for the time being if it is too much for memory; None holds all of it.

    Returns:
        The corpus, with at least one document on each side.

    Raises:
        DataError: Over half the documents are duplicates, too few documents or units, or a training document is in
            the held-out set.
    """
    spool = Spool(cache)
    for part, each in ((HELDOUT, heldout or ()), (TRAIN, documents)):
        for one in each:
            spool.add(one, part)
    rows = spool.rows()
    part_N = np.asarray(rows["part"])
    found = _distinct(spool, rows)
    for part in (TRAIN, HELDOUT):
        _require_distinct(int((part_N == part).sum()), int((found.kept_N & (part_N == part)).sum()))
    # Before the cap: a training document that is also held out is an error even if the cap would drop it.
    if found.overlap is not None:
        document, twin = spool.documents(rows, np.array(found.overlap))
        raise DataError(
            f"{document.origin or document.source}: this training document is also in the held-out set "
            f"({twin.origin or twin.source}); remove it from one of the two."
        )
    train_N, heldout_N = found.kept_N & (part_N == TRAIN), found.kept_N & (part_N == HELDOUT)
    left_N = np.zeros_like(train_N)
    if config.max_bytes is not None:
        # Where documents are yet to be split at least two units, so that each side has one.
        within_N = _capped(rows, train_N, config.max_bytes, least=2 if heldout is None else 1)
        train_N, left_N = within_N, train_N & ~within_N
    beyond = frozenset(spool.files(np.unique(rows["file"][left_N]).tolist()))
    if heldout is None:
        heldout_N = _heldout(rows, train_N, config.heldout_fraction, config.heldout_sources)
        train_N = train_N & ~heldout_N
    for side, chosen_N in (("training", train_N), ("held-out", heldout_N)):
        if not chosen_N.any():
            raise DataError(f"there are no {side} documents.")
    train, held = (SpooledDocuments(spool, rows, _in_hash_order(rows, chosen_N)) for chosen_N in (train_N, heldout_N))
    hashes = documents_sha256(train), documents_sha256(held)
    return Corpus(name, train, held, *hashes, duplicates=int((~found.kept_N).sum()), beyond=beyond)


def heldout_part(documents: Iterable[Document]) -> Sequence[Document]:
    """The held-out side that :func:`build_corpus` makes of explicit held-out documents."""
    spool = Spool()
    for document in documents:
        spool.add(document, HELDOUT)
    rows = spool.rows()
    kept_N = _distinct(spool, rows).kept_N
    _require_distinct(len(rows), int(kept_N.sum()))
    return list(SpooledDocuments(spool, rows, _in_hash_order(rows, kept_N)))


def documents_sha256(documents: SpooledDocuments) -> str:
    """:func:`lifelong_moe.data.text.documents.documents_hash` of documents in order of hash, from their rows."""
    digest, separator = hashlib.sha256(), b""
    for start in range(0, len(documents), _AT_ONCE):
        hashes = documents.rows["hash"][documents.order[start : start + _AT_ONCE]]
        digest.update(separator + hashes.tobytes().hex("\n", 32).encode())
        separator = b"\n"
    return digest.hexdigest()


def _ranges(first_N: NDArray[np.uint64], chosen_N: Mask) -> Iterator[Numbers]:
    """Numbers of the chosen rows, in ranges of the first number of their hash, ascending."""
    number = max(1, -(-int(chosen_N.sum()) // RANGE))
    edges = [(i << 64) // number for i in range(number)]
    for low, high in zip(edges, [*edges[1:], None], strict=True):
        inside_N = chosen_N if low == 0 else chosen_N & (first_N >= np.uint64(low))
        yield np.flatnonzero(inside_N if high is None else inside_N & (first_N < np.uint64(high)))


def _grouped(rows: NDArray[np.void], column: str, numbers: Numbers) -> tuple[Numbers, Numbers]:
    """Row numbers in order of a hash, equal ones in order of reading; and where each different hash begins."""
    keys = rows[column][numbers][:, :2].astype(np.uint64)
    # Stable, the last key first.
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    keys = keys[order]
    begins = np.append(True, (keys[1:] != keys[:-1]).any(axis=1))[: len(keys)]
    return numbers[order], np.flatnonzero(begins)


def _distinct(spool: Spool, rows: NDArray[np.void]) -> _Distinct:
    """Keep one document of each set of duplicates: the first by (source, hash), so that reading order is moot."""
    kept_N, overlaps = np.ones(len(rows), dtype=bool), []
    for numbers in _ranges(rows["same"][:, 0], kept_N.copy()):
        ordered, begins = _grouped(rows, "same", numbers)
        sizes = np.diff(np.append(begins, len(ordered)))
        for begin, size in zip(begins[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
            group, best = ordered[begin : begin + size].tolist(), dict[int, int]()
            kept_N[group] = False
            for part in (TRAIN, HELDOUT):
                if same := [number for number in group if rows["part"][number] == part]:
                    best[part] = min(same, key=lambda number: _rank(spool, rows, number)) if len(same) > 1 else same[0]
                    kept_N[best[part]] = True
            if len(best) == 2:
                first = min(number for number in group if rows["part"][number] == TRAIN)
                overlaps.append((first, best[TRAIN], best[HELDOUT]))
    return _Distinct(kept_N, min(overlaps)[1:] if overlaps else None)


def _rank(spool: Spool, rows: NDArray[np.void], number: int) -> tuple[str, bytes]:
    return spool.source(rows[number]), rows["hash"][number].tobytes()


def _require_distinct(number: int, distinct: int) -> None:
    # A few repeats are normal in real text; a majority means that the configuration names a file twice.
    if 2 * (number - distinct) > number:
        raise DataError(
            f"{number - distinct} of {number} documents are duplicates of others (case, spaces "
            "and punctuation aside); at most half may be. Is a file matched or concatenated twice?"
        )


def _capped(rows: NDArray[np.void], chosen_N: Mask, max_bytes: int, least: int) -> Mask:
    """Take whole units in hash order, passing over those that no longer fit, but at least ``least`` units."""
    taken_N, total, taken = np.zeros(len(rows), dtype=bool), 0, 0
    for numbers in _ranges(rows["cap"][:, 0], chosen_N):
        ordered, begins = _grouped(rows, "cap", numbers)
        if not len(ordered):
            continue
        sizes = np.add.reduceat(rows["bytes"][ordered], begins)
        fits = []
        for size in sizes.tolist():
            fits.append(taken < least or total + size <= max_bytes)
            if fits[-1]:
                total, taken = total + size, taken + 1
        taken_N[ordered] = np.repeat(fits, np.diff(np.append(begins, len(ordered))))
    return taken_N


def _heldout(rows: NDArray[np.void], chosen_N: Mask, fraction: float, least: int) -> Mask:
    """Hold out each unit whose hash lies in the lowest ``fraction`` of all hashes.

    Where these are fewer than ``least``, the next ones in order of hash as well, up to half of all; in any case at
    least one unit a side.
    """
    # A fixed threshold, not a share of the units present: in a large corpus, adding units moves no other one.
    threshold = _two(int(fraction * 2**256) >> 128)
    units = below = 0
    for first in _units(rows, chosen_N):
        units += len(first)
        below += int(_is_below(rows["unit"][first], threshold).sum())
    if units < 2:
        raise DataError(
            f"{int(chosen_N.sum())} distinct document(s) in {units} source unit(s) are too few to "
            "split; at least 2 units are needed. Add documents, or give heldout_files."
        )
    number = min(max(below, min(least, units // 2), 1), units - 1)
    if number != below:
        threshold = _nth(rows, chosen_N, number)
    return chosen_N & _is_below(rows["unit"], threshold)


def _units(rows: NDArray[np.void], chosen_N: Mask) -> Iterator[Numbers]:
    """The first row of each source unit, in order of the unit's hash, in ranges."""
    for numbers in _ranges(rows["unit"][:, 0], chosen_N):
        ordered, begins = _grouped(rows, "unit", numbers)
        yield ordered[begins]


def _nth(rows: NDArray[np.void], chosen_N: Mask, number: int) -> tuple[int, int]:
    """The hash of the unit before which there are so many others."""
    for first in _units(rows, chosen_N):
        if number < len(first):
            high, low = rows["unit"][first[number]].tolist()
            return high, low
        number -= len(first)
    raise ValueError("there are not so many units")


def _two(value: int) -> tuple[int, int]:
    return value >> 64, value & (1 << 64) - 1


def _is_below(keys: NDArray[np.uint64], threshold: tuple[int, int]) -> Mask:
    high, low = (np.uint64(part) for part in threshold)
    return (keys[:, 0] < high) | ((keys[:, 0] == high) & (keys[:, 1] < low))


def _in_hash_order(rows: NDArray[np.void], chosen_N: Mask) -> NDArray[np.uint32]:
    parts = [_grouped(rows, "hash", numbers)[0] for numbers in _ranges(rows["hash"][:, 0], chosen_N)]
    return np.concatenate(parts).astype(np.uint32)
