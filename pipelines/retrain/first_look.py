"""Look at the inbox by hashes: which documents repeat nothing that is known, without reading what is known.

Near copies only make new text less. So text that is too little by hashes is too little, and only once it is enough, all
that is known is read. What a tick has read of the inbox itself it keeps for the next one, in ``arrived.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial

from lifelong_moe.data.arrivals.inbox import Arrived, FileRead, Glance
from lifelong_moe.data.arrivals.inbox_rows import UNCOUNTED, ReadFile, Row
from lifelong_moe.data.text.documents import hash_of_hashes
from lifelong_moe.data.text.known_hashes import HashIndex
from lifelong_moe.data.text.manifest import VERSION
from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.files import write_atomic
from lifelong_moe.storage.grammars import Sha256
from lifelong_moe.storage.keys import canonical_json, content_key
from lifelong_moe.storage.modes import SHARED
from lifelong_moe.storage.plain import from_plain
from lifelong_moe.storage.stored import read_stored
from pipelines.retrain.arrivals import Counts, compared_with, settled_before
from pipelines.retrain.tick import Tick
from pipelines.retrain.waiting import Offered
from pipelines.shared.novelty import Known, glance_at

MOST_ROWS = 500_000
"""Documents of the inbox that are kept by their hashes, some 200 bytes each; a larger inbox is read again."""


@dataclass(frozen=True)
class _Rows:
    """What earlier ticks have read of the inbox."""

    read_by: Sha256
    """Of what decides which documents a file holds, and how many tokens they have."""
    judged_with: Sha256
    """Of all that decides which documents are near copies."""
    files: Mapping[str, ReadFile] = field(default_factory=dict)


@dataclass(frozen=True)
class FirstLook:
    """New documents by their hashes; some may be near copies of what is known."""

    glance: Glance
    each: Sequence[tuple[FileRead, list[Row]]]
    """Each file with its documents."""
    new: Mapping[str, Row]
    """By hash."""
    copies: frozenset[str]
    """Hashes of documents that an earlier tick has found to be near copies."""
    repeats: int
    """Documents that were seen before, or repeat a new one."""
    judged_with: Sha256
    """See :attr:`_Rows.judged_with`."""

    @property
    def counts(self) -> Counts:
        """What there is at most of new text."""
        sources = {row.source for row in self.new.values()}
        return Counts(len(self.new), len(sources), self.tokens(self.new), len(self.copies))

    def tokens(self, hashes: Collection[str]) -> int:
        """Tokens of some of the new documents."""
        return sum(self.new[one].tokens for one in hashes)

    def offered(self, copy_with: Callable[[Mapping[str, str]], str | None]) -> Offered:
        """The batch that these documents are; ``copy_with`` says which copy of it."""
        given = {digest: row.source for digest, row in self.new.items()}
        return Offered(hash_of_hashes(given), copy_with(given), given)


def first_look(tick: Tick, known: Known, index: HashIndex) -> FirstLook:
    """Look at the inbox by hashes.

    Raises:
        DataError: ``file:line: reason``.
    """
    before = _rows_before(tick)
    # Tokens were counted of what was new: if more is new now, its text is needed.
    return _look(tick, known, index, before) or _checked(_look(tick, known, index, replace(before, files={})))


def _checked(look: FirstLook | None) -> FirstLook:
    assert look is not None
    return look


def _look(tick: Tick, known: Known, index: HashIndex, before: _Rows) -> FirstLook | None:
    glance = glance_at(tick.retraining.settings.inbox, before.files)
    each = [(file, file.rows()) for file in glance.files]
    # A text that stands in several files gets the source which the last of them names.
    last = {row.same: row for _, rows in each for row in rows}
    seen = index.repeated(last, known.texts) | known.removed
    left = {row.hash: row for same, row in last.items() if same not in seen}
    judged_with = _judged_with(tick, known, last.values())
    is_judged = before.judged_with == judged_with
    copies = frozenset(digest for digest, row in left.items() if row.is_copy and is_judged)
    new = {digest: row for digest, row in left.items() if digest not in copies}
    uncounted = [digest for digest, row in new.items() if row.tokens == UNCOUNTED]
    texts = {
        row.hash: document
        for file, rows in each
        if file.documents is not None
        for row, document in zip(rows, file.documents, strict=True)
    }
    if not texts.keys() >= set(uncounted):
        return None
    counted = tick.tokens_of([texts[digest] for digest in uncounted])
    new |= {digest: replace(new[digest], tokens=tokens) for digest, tokens in zip(uncounted, counted, strict=True)}
    return FirstLook(glance, each, new, copies, sum(len(rows) for _, rows in each) - len(left), judged_with)


def remember_rows(tick: Tick, files: Arrived | None, look: FirstLook, copies: frozenset[str]) -> None:
    """Keep what was read of the inbox for the next tick.

    Args:
        tick: The present one.
        files: What lay in the inbox before it was read; None if that is not known.
        look: What was read.
        copies: Hashes of the documents that are near copies of what is known.
    """
    if files is None or sum(len(rows) for _, rows in look.each) > MOST_ROWS:
        return
    before, kept, mode = _rows_before(tick), dict[str, ReadFile](), SHARED
    for file, rows in look.each:
        # As in `remember_found`; and a name that is no Unicode cannot be written.
        if not (file.is_whole and file.state[-1] < settled_before(files) and file.name.isprintable()):
            continue
        tokens = {row.hash: row.tokens for row in rows} | {one: row.tokens for one, row in look.new.items()}
        found = [replace(row, tokens=tokens[row.hash], is_copy=row.hash in copies) for row in rows]
        kept[file.name] = ReadFile.of(file.state, file.found, file.held_bytes, found)
        mode &= file.mode
    now = _Rows(_read_by(tick), look.judged_with, kept)
    if now != before:
        with suppress(OSError):
            write_atomic(tick.record.path / "arrived.json", canonical_json(asdict(now)), mode)


def _rows_before(tick: Tick) -> _Rows:
    # It comes with the store; each file in it holds for the inode and times that no copy of the inbox has.
    with suppress(OSError, CorruptError):
        found = read_stored(tick.record.path / "arrived.json", partial(from_plain, _Rows))
        if found.read_by == _read_by(tick):
            return found
    return _Rows(_read_by(tick), "")


def _judged_with(tick: Tick, known: Known, rows: Iterable[Row]) -> str:
    """A hash of what near copies depend on: known text, and all others, for what many sources share marks no copy."""
    texts = sorted([text.made_of, text.state] for text in known.texts)
    return content_key([compared_with(tick), texts, sorted({(row.hash, row.source) for row in rows})])


def _read_by(tick: Tick) -> str:
    settings = asdict(tick.retraining.settings.inbox)
    return content_key({"inbox": settings, "version": VERSION, "champion": tick.head.champion.key})
