"""Slices: parts of the old held-out text with limits of their own, where a mean over all text could hide a loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from lifelong_moe.config.retraining.policy import GateConfig, SliceConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.retraining.bounds import LEAST_SOURCES, DocumentLosses, has_enough_sources


@dataclass(frozen=True, eq=False)
class Slice:
    """The scored documents of a slice, by two versions."""

    after: DocumentLosses
    before: DocumentLosses
    num_sources: int
    by_document: bool
    """Whether each document stands for itself, for want of sources. Bounds are then about more documents of these
    sources, which is what a slice of one source asks for, and not about more sources like them."""


def slices_of(
    after: Mapping[str, DocumentLosses], before: Mapping[str, DocumentLosses], config: GateConfig
) -> Iterator[tuple[str, float, Slice | None]]:
    """Each slice's name, its tolerance, and its documents; None if none of its text is scored.

    Args:
        after: Losses of one version, by old distribution.
        before: Losses of another, on the same documents.
        config: The gate's.
    """
    for name, part in config.slices.items():
        yield name, config.tolerance if part.tolerance is None else part.tolerance, _slice(after, before, part)


def require_text(config: GateConfig, sources: Mapping[str, Iterable[str]]) -> None:
    """Require enough held-out documents of each slice, without which no candidate could pass.

    Args:
        config: The gate's.
        sources: Of each of the held-out documents of each old distribution.

    Raises:
        ConfigError: If there are too few.
    """
    for name, part in config.slices.items():
        if part.data is not None and part.data not in sources:
            raise ConfigError(f"gate.slices.{name}.data={part.data}: there are {', '.join(sorted(sources))}.")
        of = [part.data] if part.data is not None else sources
        number = sum(fnmatchcase(source, part.sources) for one in of for source in sources[one])
        if 0 < number < LEAST_SOURCES:
            raise ConfigError(
                f"gate.slices.{name}.sources={part.sources}: {number} held-out document(s) are of it; at least "
                f"{LEAST_SOURCES} are needed. Hold out more, or take more together."
            )
        if not number:
            # Of a document that names no source, the hash stands for it.
            there = sorted({one for each in of for one in sources[each] if not one.startswith("sha256:")})
            named = f"there are {', '.join(there[:5])}{', …' * (len(there) > 5)}" if there else "none has a name"
            raise ConfigError(
                f"gate.slices.{name}.sources={part.sources}: no source of held-out text is named so; {named}."
            )


def _slice(
    after: Mapping[str, DocumentLosses], before: Mapping[str, DocumentLosses], part: SliceConfig
) -> Slice | None:
    whole = [name for name in after if part.data in (None, name)]
    # Which documents these are, and whether they stand for themselves, depends on sources and sizes alone: a candidate
    # must not choose its own test.
    rows = [
        (name, place)
        for name in whole
        for place, source in enumerate(after[name].sources)
        if fnmatchcase(source, part.sources)
    ]
    if not rows:
        return None
    # Prefixed: sources of the same name in two distributions are two sources.
    sources = [f"{name}/{after[name].sources[place]}" for name, place in rows]
    by_document = not has_enough_sources(_losses(after, rows, sources).sizes)
    units = [str(number) for number in range(len(rows))] if by_document else sources
    return Slice(_losses(after, rows, units), _losses(before, rows, units), len(set(sources)), by_document)


def _losses(by: Mapping[str, DocumentLosses], rows: list[tuple[str, int]], units: list[str]) -> DocumentLosses:
    nats = np.array([by[name].nats[place] for name, place in rows], np.float64)
    tokens = np.array([by[name].tokens[place] for name, place in rows], np.int64)
    return DocumentLosses(nats, tokens, units)
