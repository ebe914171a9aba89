"""A corpus built from lists of documents, as it was before documents were spooled: what the passes have to equal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.text.documents import Corpus, Document, documents_hash, normalized_hash
from lifelong_moe.errors import DataError


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
        within = {d.origin for d in train}
        beyond = frozenset(d.origin.rpartition(":")[0] for d in distinct if d.origin not in within)
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
