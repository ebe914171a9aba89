"""Documents of all distributions together: read, or kept of text that is gone, without near copies across them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache as once
from functools import partial, reduce
from operator import and_
from pathlib import Path

import numpy as np

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.text.documents import Corpus, Document, documents_hash, hash_of_hashes
from lifelong_moe.data.text.files import settled
from lifelong_moe.data.text.kept import rows_sha256
from lifelong_moe.data.text.known import KnownDocuments, Summary, hashes_of, summary_of
from lifelong_moe.data.text.known_hashes import KnownText, write_index
from lifelong_moe.data.text.manifest import LeftManifest, PartSummary, forget_left, left_manifest, write_left
from lifelong_moe.data.text.near_copies import without_near_copies
from lifelong_moe.data.text.sources import HAS_CHANGED, heldout_documents, read_corpus
from lifelong_moe.data.text.spool import chosen, same_hashes
from lifelong_moe.data.tokens.records import DIGITS, Remembered, TextRecord
from lifelong_moe.errors import ConfigError, CorruptError, DataError, LifelongError, TryAgainError


@dataclass(frozen=True)
class Texts:
    """Documents of distributions, and what was kept of distributions whose text is gone."""

    corpora: dict[str, Corpus]
    """Those that are there, training text without near copies of held-out text."""
    splits: dict[str, Corpus]
    """The same as split, before near copies of other held-out text were dropped."""
    heldout: dict[str, Sequence[Document]]
    """Held-out documents, in order of hash: of those that are there, and of the others if they were kept."""
    gone: dict[str, LifelongError]
    """Why text is not there."""
    remember: Callable[[], None] = lambda: None
    """Lets a later start read nothing of it; to be called once no mistake is found, for it writes to the cache."""

    def at_hand(self, name: str) -> Sequence[Document]:
        """Training documents; held-out ones where text is gone."""
        return self.corpora[name].train if name in self.corpora else self.heldout[name]


def read_texts(sources: Mapping[str, SourceConfig], trained: list[str], cache: Path, remembered: Remembered) -> Texts:
    """Read the documents of every distribution.

    Arguments and errors as for :func:`lifelong_moe.data.tokens.prepare.prepare_data`.
    """
    splits: dict[str, Corpus] = {}
    gone: dict[str, LifelongError] = {}
    # A user's own files first: a mistake in them is found before the builtin text is extracted.
    for name in sorted(sources, key=lambda name: sources[name].builtin is not None):
        try:
            known = remembered.read.get(name)
            splits[name] = known or read_corpus(name, sources[name], cache, remembered.within)
        except (ConfigError, DataError, TryAgainError) as error:
            told = _of_distribution(name, error)
            if name not in remembered.records or not _is_missing(error):
                # Only missing text is replaced by what the run remembers; malformed text is a mistake to report.
                raise told from None
            gone[name] = told
    kept = {name: found for name in gone if (found := _kept(name, sources[name], remembered)) is not None}
    there = {name: splits[name] for name in sources if name in splits}
    held: dict[str, Sequence[Document]] = {name: corpus.heldout for name, corpus in there.items()}
    held |= kept
    heldout = {name: held[name] for name in sources if name in held}
    there, left = _left(there, kept, heldout, {name: splits[name] for name in trained if name in splits}, cache)
    # Near copies of held-out text that is no longer known stay left out.
    if len(heldout) < len(sources):
        there = {name: _as_before(corpus, remembered.records.get(name)) for name, corpus in there.items()}

    def remember() -> None:
        for one in (*(corpus.remember for corpus in splits.values()), left):
            if one is not None:
                one()
        # Of what was read anyway, so that a tick of retraining need not read it again.
        for corpus in splits.values():
            if corpus.remember is not None and (text := KnownText.of(corpus)).is_remembered:
                write_index(cache, text)

    return Texts(there, splits, heldout, gone, remember)


def _left(
    there: Mapping[str, Corpus],
    kept: Mapping[str, Sequence[Document]],
    heldout: Mapping[str, Sequence[Document]],
    trained: Mapping[str, Corpus],
    cache: Path,
) -> tuple[dict[str, Corpus], Callable[[], None] | None]:
    """Distributions without near copies of held-out text, and what remembers them; once it has, nothing is read."""
    made_of = {name: corpus.identity for name, corpus in there.items()}
    rows = {name: summary_of(documents).rows or rows_sha256(documents) for name, documents in kept.items()}
    asked = {"near_copies": made_of, "kept": rows, "trained": sorted(trained)}
    known = left_manifest(asked, cache) if all(made_of.values()) else None
    if known is not None and known.keys() == there.keys():
        forgetting = partial(forget_left, asked, cache)
        return {name: _as_left(corpus, known[name], forgetting) for name, corpus in there.items()}, None
    # Before near copies are dropped: an equal document in two places is a mistake, a near copy is not.
    _require_disjoint(heldout, trained)
    left = without_near_copies(there, kept, cache)
    left = {name: replace(corpus, files=settled(corpus)) for name, corpus in left.items()}
    if not left or not all(made_of.values()):
        return left, None
    found = {name: _manifest(one) for name, one in left.items()}
    return left, partial(write_left, asked, found, cache, reduce(and_, (one.mode for one in left.values())))


def _manifest(corpus: Corpus) -> LeftManifest:
    part = PartSummary(corpus.train_hash, len(corpus.train), summary_of(corpus.train).bytes)
    return LeftManifest(part, hashes_of(corpus.near_copies), corpus.files)


def _as_left(corpus: Corpus, known: LeftManifest, forgetting: Callable[[], None]) -> Corpus:
    """A corpus without the near copies that it is known to have, whose text is read when it is needed."""
    copies = frozenset(known.near_copies)

    @once
    def sides() -> tuple[Sequence[Document], Sequence[Document]]:
        is_copy = np.array([digest in copies for digest in hashes_of(corpus.train)])
        kept, left = chosen(corpus.train, ~is_copy), chosen(corpus.train, is_copy)
        # Tokens are known of the text that the manifest says; text of another hash must not get that name.
        if PartSummary(hash_of_hashes(hashes_of(kept)), len(kept), summary_of(kept).bytes) != known.train:
            forgetting()
            raise DataError(f"distributions.{corpus.name}: {HAS_CHANGED}")
        return kept, left

    return replace(
        corpus,
        train=KnownDocuments(Summary(known.train.documents, known.train.bytes), lambda: sides()[0]),
        train_hash=known.train.hash,
        near_copies=KnownDocuments(Summary(len(copies), 0, known.near_copies), lambda: sides()[1]),
        before_near_copies=corpus.split_hash,
        files=known.outcomes,
    )


def _of_distribution(name: str, error: LifelongError) -> LifelongError:
    return type(error)(f"distributions.{name}: {error}")


def _is_missing(error: LifelongError) -> bool:
    """Whether text is not to be had: deleted, or of a hub that does not answer; what is malformed is a mistake."""
    return isinstance(error, TryAgainError) or (isinstance(error, DataError) and error.is_missing)


def _kept(name: str, source: SourceConfig, remembered: Remembered) -> Sequence[Document] | None:
    """Held-out documents of a distribution whose text is gone: those that were kept, else those in a file of their own.

    Raises:
        CorruptError: If those that were kept are others than the record says.
        DataError: If that file holds others than it did.
    """
    record = remembered.records[name]
    if record.kept is not None and remembered.heldout is not None:
        kept: Sequence[Document] = remembered.heldout.documents(record.kept)
        # Its tokens are cached by the hash that the record says.
        if (found := documents_hash(kept)) != record.heldout_hash:
            raise CorruptError(
                f"distributions.{name}: its kept held-out text was {record.heldout_hash[:DIGITS]} and is "
                f"{found[:DIGITS]} (SHA-256)."
            )
        return kept
    try:
        documents = heldout_documents(source, remembered.within)
    except DataError as error:
        if error.is_missing:
            return None
        raise _of_distribution(name, error) from None
    if documents is None:
        return None
    # Another held-out set would make losses of earlier stages incomparable with new ones.
    if (found := documents_hash(documents)) != record.heldout_hash:
        raise DataError(
            f"distributions.{name}: its held-out text was {record.heldout_hash[:DIGITS]} and is {found[:DIGITS]} "
            f"(SHA-256). Bring that text back, or remove it."
        )
    return documents


def _as_before(corpus: Corpus, record: TextRecord | None) -> Corpus:
    """A corpus without the near copies that were left out of it before, of whatever held-out text they are."""
    # Only for the same text and split: other text has no earlier near copies.
    if record is None or record.split_hash != corpus.split_hash:
        return corpus
    known = set(record.left_out)
    if known <= {digest[:DIGITS] for digest in hashes_of(corpus.near_copies)}:
        return corpus
    is_copy = np.array([document.hash[:DIGITS] in known for document in corpus.train])
    train = chosen(corpus.train, ~is_copy)
    near_copies = [*corpus.near_copies, *chosen(corpus.train, is_copy)]
    before = corpus.split_hash
    corpus = replace(corpus, train=train, train_hash=documents_hash(train), near_copies=near_copies)
    return replace(corpus, before_near_copies=before, files=settled(corpus))


def _require_disjoint(heldout: Mapping[str, Sequence[Document]], trained: Mapping[str, Corpus]) -> None:
    """Training text of one distribution must not be held out in another."""
    held_out = {same: name for name, documents in heldout.items() for same in same_hashes(documents)}
    for name, corpus in trained.items():
        for number, same in enumerate(same_hashes(corpus.train)):
            if (other := held_out.get(same)) is not None:
                document = corpus.train[number]
                raise DataError(
                    f"distributions.{name}: {document.origin or document.source}: this training document is held out "
                    f"in {other}; remove it from one of them."
                )
