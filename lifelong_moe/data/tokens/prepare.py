"""Turn configured sources into tokens on disk, using what a run remembers of text that is gone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache as once
from functools import partial, reduce
from itertools import pairwise
from operator import and_
from pathlib import Path

import numpy as np

from lifelong_moe.config.data import SourceConfig, TokenizerConfig
from lifelong_moe.data.formats.outcomes import FileOutcome
from lifelong_moe.data.text.documents import Corpus, Document, documents_hash
from lifelong_moe.data.text.files import settled
from lifelong_moe.data.text.kept import rows_sha256
from lifelong_moe.data.text.known import KnownDocuments, Summary, hashes_of, summary_of
from lifelong_moe.data.text.manifest import LeftManifest, PartSummary, forget_left, left_manifest, write_left
from lifelong_moe.data.text.near_copies import without_near_copies
from lifelong_moe.data.text.sources import HAS_CHANGED, heldout_documents, lies_within, read_corpus
from lifelong_moe.data.text.spool import chosen, same_hashes
from lifelong_moe.data.tokens.identity import AddedTokens, AddedVocabulary, DataIdentity, TokenizerIdentity
from lifelong_moe.data.tokens.pairs import with_answers, with_heldout_answers
from lifelong_moe.data.tokens.records import DIGITS, Remembered, TextRecord
from lifelong_moe.data.tokens.shards import (
    TokenizedCorpus,
    TokenShard,
    open_or_tokenize,
    tokenize_corpus,
    tokenize_documents,
)
from lifelong_moe.data.tokens.tokenizer import Tokenizer, recipe, trained_tokenizer
from lifelong_moe.data.tokens.vocabularies import LaterTexts, added_tokenizers, read_later
from lifelong_moe.errors import ConfigError, CorruptError, DataError, LifelongError, TryAgainError
from lifelong_moe.storage.modes import PRIVATE

log = logging.getLogger(__name__)
COARSE = 0.75
"""Warn when a distribution has less than this many bytes per token, relative to the tokenizer's own text."""


@dataclass(frozen=True)
class Texts:
    """Documents of distributions, and what was kept of distributions whose text is gone."""

    corpora: dict[str, Corpus]
    """Those that are there, training text without near copies of held-out text."""
    heldout: dict[str, Sequence[Document]]
    """Held-out documents, in order of hash: of those that are there, and of the others if they were kept."""
    gone: dict[str, LifelongError]
    """Why text is not there."""
    remember: Callable[[], None] = lambda: None
    """Lets a later start read nothing of it; to be called once no mistake is found, for it writes to the cache."""

    def at_hand(self, name: str) -> Sequence[Document]:
        """Training documents; held-out ones where text is gone."""
        return self.corpora[name].train if name in self.corpora else self.heldout[name]


@dataclass(frozen=True)
class PreparedData:
    """Tokenizer and tokenized distributions.

    Where stages add tokens there are several vocabularies, numbered from 0 in order. Whatever is not said to be of
    another one is read with the first.
    """

    tokenizer: Tokenizer
    recipe: dict[str, str | int]
    """What the tokenizer was made by."""
    corpora: dict[str, TokenizedCorpus]
    """Distributions whose text is there."""
    records: dict[str, TextRecord]
    """What every distribution's text is or was."""
    heldout: dict[str, TokenShard]
    """What can be measured on: held-out text that is there or was kept."""
    heldout_documents: Mapping[str, Sequence[Document]]
    """The same as text."""
    gone: dict[str, LifelongError]
    """Why the other distributions' text is not there."""
    modes: Mapping[str, int] = field(default_factory=dict)
    """Permissions of files that are made of text that is there; of other text they are private."""
    added: Mapping[int, Tokenizer] = field(default_factory=dict)
    """Tokenizers of the later vocabularies, by the index of the stage that adds their tokens, in order."""
    later: LaterTexts = field(default_factory=LaterTexts)
    """What stages train on, read with the later vocabularies."""
    files: Mapping[str, tuple[FileOutcome, ...]] = field(default_factory=dict)
    """What became of the user's own files, of distributions that are there."""

    def corpora_by(self, vocabulary_of: Callable[[str], int]) -> dict[str, TokenizedCorpus]:
        """Distributions whose text is there, each read with the vocabulary of this number."""
        numbers = {name: vocabulary_of(name) for name in self.corpora}
        return {name: self.later.corpora[name, v] if v else self.corpora[name] for name, v in numbers.items()}

    def heldout_by(self, name: str, vocabulary: int) -> TokenShard:
        """Held-out text, read with the vocabulary of this number."""
        return self.later.heldout[name, vocabulary] if vocabulary else self.heldout[name]

    def mode(self, name: str) -> int:
        """Permissions of files that are made of a distribution's text."""
        return self.modes.get(name, PRIVATE)

    @property
    def identity(self) -> DataIdentity:
        """What plans and stage keys say of it."""
        tokenizer = self.tokenizer
        each = [tokenizer, *self.added.values()]
        numbers = [after.num_tokens - before.num_tokens for before, after in pairwise(each)]
        return DataIdentity(
            {name: record.train_hash for name, record in self.records.items()},
            TokenizerIdentity(dict(self.recipe), tokenizer.hash),
            tokenizer.vocab_size,
            tokenizer.bos_id,
            {
                stage: AddedTokens(number, TokenizerIdentity(dict(self.recipe), one.hash))
                for (stage, one), number in zip(self.added.items(), numbers, strict=True)
            },
        )

    def at_hand(self, name: str) -> TokenShard:
        """Training text; held-out text where that is gone."""
        return self.corpora[name].train if name in self.corpora else self.heldout[name]


def prepare_data(
    sources: Mapping[str, SourceConfig],
    tokenizer: TokenizerConfig,
    trained: list[str],
    context: int,
    cache: Path,
    remembered: Remembered | None = None,
    vocabulary: AddedVocabulary | None = None,
) -> PreparedData:
    """Read, check and tokenize every distribution; what is in the cache already is only verified.

    Args:
        sources: Distributions by name, those of the stages and those only evaluated.
        tokenizer: How text becomes tokens.
        trained: Distributions that the stages train on, in order; the tokenizer is trained on the first one's text.
        context: Tokens in a training block; text that is trained on must fill at least one.
        cache: Directory for extracted text, tokenizers and tokens.
        remembered: In place of text that is gone.
        vocabulary: What the stages add to it; None is nothing.

    Raises:
        DataError: If documents cannot be read or are too few, or a training document is held out elsewhere.
    """
    remembered = remembered or Remembered()
    # A person's own files first: a mistake in them is then found before the cache is written.
    given = _given_tokenizer(tokenizer, remembered)
    texts, splits = _read_all(sources, trained, cache, remembered)
    text = {name: texts.corpora[name] for name in trained if name in texts.corpora and not sources[name].answer_field}
    check = partial(_require_blocks, text, context)
    # The first distribution's text is gone, so its tokenizer cannot be trained again; the first stage stored it.
    if given is None and trained[0] in texts.gone:
        given = _stored_tokenizer(remembered, texts.gone[trained[0]])
    if given is not None:
        check(given)
    # The tokenizer is fixed for good, so it must not depend on what any distribution will ever hold out.
    made = given or trained_tokenizer(tokenizer, splits[trained[0]], cache, check)
    texts.remember()
    tokens = {name: tokenize_corpus(corpus, made, cache) for name, corpus in texts.corpora.items()}
    records = {
        name: TextRecord.of(texts.corpora[name], tokens[name]) if name in tokens else remembered.records[name]
        for name in sources
    }
    heldout = _heldout_tokens(texts, tokens, records, made, cache)
    _warn_if_coarse(records, trained[0])
    answers = [name for name, source in sources.items() if source.answer_field is not None]
    _mark_answers(answers, texts, tokens, heldout, made, context)
    modes = {name: corpus.mode for name, corpus in texts.corpora.items()}
    made_by = recipe(tokenizer, _learned_bytes(trained[0], splits, records))
    data = PreparedData(made, made_by, tokens, records, heldout, texts.heldout, texts.gone, modes)
    data = replace(data, files={name: corpus.files for name, corpus in texts.corpora.items() if corpus.files})
    if vocabulary is None:
        return data
    of_stages = [splits[name] if name in splits else texts.gone[name] for name in trained]
    added = added_tokenizers(made, vocabulary, of_stages, remembered.added, cache)
    later = read_later(added, trained, {**texts.heldout, **texts.corpora}, answers, context, cache)
    return replace(data, added=added, later=later)


def _heldout_tokens(
    texts: Texts,
    tokens: Mapping[str, TokenizedCorpus],
    records: Mapping[str, TextRecord],
    tokenizer: Tokenizer,
    cache: Path,
) -> dict[str, TokenShard]:
    """Held-out text as tokens, where it is kept too."""
    return {
        name: tokens[name].heldout
        if name in tokens
        else open_or_tokenize(documents, records[name].heldout_hash, tokenizer, cache, PRIVATE)
        for name, documents in texts.heldout.items()
    }


def _learned_bytes(name: str, splits: Mapping[str, Corpus], records: Mapping[str, TextRecord]) -> int:
    """Bytes of the text that the tokenizer was trained on, or of what is known of it."""
    return summary_of(splits[name].train).bytes if name in splits else records[name].num_bytes


def _mark_answers(
    names: list[str],
    texts: Texts,
    tokens: dict[str, TokenizedCorpus],
    heldout: dict[str, TokenShard],
    tokenizer: Tokenizer,
    context: int,
) -> None:
    """Let only answers count in distributions of prompts and answers."""
    for name in names:
        if name in tokens:
            tokens[name] = with_answers(texts.corpora[name], tokens[name], tokenizer, context)
            heldout[name] = tokens[name].heldout
        elif name in heldout:
            heldout[name] = with_heldout_answers(texts.heldout[name], heldout[name], tokenizer)


def read_texts(
    sources: Mapping[str, SourceConfig], trained: list[str], cache: Path, remembered: Remembered | None = None
) -> Texts:
    """Read the documents of every distribution; arguments and errors as for :func:`prepare_data`."""
    texts = _read_all(sources, trained, cache, remembered or Remembered())[0]
    texts.remember()
    return texts


def _read_all(
    sources: Mapping[str, SourceConfig], trained: list[str], cache: Path, remembered: Remembered
) -> tuple[Texts, dict[str, Corpus]]:
    """Return the available text, and the corpora as split, before near copies of other held-out text are dropped."""
    splits: dict[str, Corpus] = {}
    gone: dict[str, LifelongError] = {}
    # A user's own files first: a mistake in them is found before the builtin text is extracted.
    for name in sorted(sources, key=lambda name: sources[name].builtin is not None):
        try:
            splits[name] = read_corpus(name, sources[name], cache, remembered.within)
        except (ConfigError, DataError, TryAgainError) as error:
            told = _of_distribution(name, error)
            if name not in remembered.records or not _is_missing(error):
                # Only missing text is replaced by what the run remembers; malformed text is a mistake to report.
                raise told from None
            gone[name] = told
    kept = {name: found for name in gone if (found := _kept(name, sources[name], remembered)) is not None}
    there = {name: splits[name] for name in sources if name in splits}
    known: dict[str, Sequence[Document]] = {name: corpus.heldout for name, corpus in there.items()}
    known |= kept
    heldout = {name: known[name] for name in sources if name in known}
    there, left = _left(there, kept, heldout, {name: splits[name] for name in trained if name in splits}, cache)
    # Near copies of held-out text that is no longer known stay left out.
    if len(heldout) < len(sources):
        there = {name: _as_before(corpus, remembered.records.get(name)) for name, corpus in there.items()}

    def remember() -> None:
        for one in (*(corpus.remember for corpus in splits.values()), left):
            if one is not None:
                one()

    return Texts(there, heldout, gone, remember), splits


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
    left = without_near_copies(there, kept)
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
        is_copy = np.array([document.hash in copies for document in corpus.train])
        kept, left = chosen(corpus.train, ~is_copy), chosen(corpus.train, is_copy)
        # Tokens are known of the text that the manifest says; text of another hash must not get that name.
        if PartSummary(documents_hash(kept), len(kept), summary_of(kept).bytes) != known.train:
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


def _given_tokenizer(config: TokenizerConfig, remembered: Remembered) -> Tokenizer | None:
    """The tokenizer that is named, or that a run was begun with if its file is gone; None if none is named."""
    if config.file is None:
        return None
    path, within = Path(config.file), remembered.within
    is_elsewhere = within is not None and not lies_within(path, within)
    # The file wins if it is there: a changed one must change the stage keys, not be ignored.
    if (is_elsewhere or not path.exists()) and (begun := remembered.tokenizer()) is not None:
        return begun
    if is_elsewhere:
        raise ConfigError(f"tokenizer.file={path}: not below {Path.cwd()}; what a store names elsewhere is not opened.")
    return Tokenizer.load(path, config.bos)


def _stored_tokenizer(remembered: Remembered, error: LifelongError) -> Tokenizer:
    if (begun := remembered.tokenizer()) is None:
        # No stage is committed yet that could have stored it.
        raise error
    return begun


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


def _require_blocks(corpora: Mapping[str, Corpus], context: int, tokenizer: Tokenizer) -> None:
    """Each corpus must fill a training block; one of so few bytes that it may not is tokenized to know.

    Clusters and new experts begin from what a stage's text looks like, which next to no text does not show.
    """
    for name, corpus in corpora.items():
        # A lower bound without tokenizing: a token stands for at most `longest_token_bytes` bytes.
        if summary_of(corpus.train).bytes > context * tokenizer.longest_token_bytes:
            continue
        num_tokens = tokenize_documents(corpus.train, tokenizer).num_tokens
        if num_tokens < context:
            raise DataError(
                f"distributions.{name}: too few tokens: {num_tokens} of training text do not fill one block of "
                f"model.context={context}."
            )


def _warn_if_coarse(records: Mapping[str, TextRecord], train_on: str) -> None:
    reference = records[train_on].bytes_per_token
    for name, record in records.items():
        found = record.bytes_per_token
        # Loss per token is lower where tokens stand for fewer bytes, which looks like a better model.
        if found < COARSE * reference:
            log.warning(
                "%s has %.2f bytes per token, %s has %.2f: the tokenizer, trained on %s, cuts it finely, so its loss "
                "per token looks low; compare bits per byte", name, found, train_on, reference, train_on,
            )  # fmt: skip
