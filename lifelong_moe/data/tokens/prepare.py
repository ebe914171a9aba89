"""Turn configured sources into tokens on disk, using what a run remembers of text that is gone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

from lifelong_moe.config.data import SourceConfig, TokenizerConfig
from lifelong_moe.data.formats.outcomes import FileOutcome
from lifelong_moe.data.text.documents import Corpus, Document
from lifelong_moe.data.text.known import summary_of
from lifelong_moe.data.text.sources import lies_within
from lifelong_moe.data.tokens.identity import AddedTokens, AddedVocabulary, DataIdentity, TokenizerIdentity
from lifelong_moe.data.tokens.pairs import with_answers, with_heldout_answers
from lifelong_moe.data.tokens.records import Remembered, TextRecord
from lifelong_moe.data.tokens.shards import (
    TokenizedCorpus,
    TokenShard,
    open_or_tokenize,
    tokenize_corpus,
    tokenize_documents,
)
from lifelong_moe.data.tokens.texts import Texts, read_texts
from lifelong_moe.data.tokens.tokenizer import Tokenizer, recipe, trained_tokenizer
from lifelong_moe.data.tokens.vocabularies import LaterTexts, added_tokenizers, read_later
from lifelong_moe.errors import ConfigError, DataError, LifelongError
from lifelong_moe.storage.modes import PRIVATE

log = logging.getLogger(__name__)
COARSE = 0.75
"""Warn when a distribution has less than this many bytes per token, relative to the tokenizer's own text."""


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
    texts = read_texts(sources, trained, cache, remembered)
    text = {name: texts.corpora[name] for name in trained if name in texts.corpora and not sources[name].answer_field}
    check = partial(_require_blocks, text, context)
    # The first distribution's text is gone, so its tokenizer cannot be trained again; the first stage stored it.
    if given is None and trained[0] in texts.gone:
        given = _stored_tokenizer(remembered, texts.gone[trained[0]])
    if given is not None:
        check(given)
    # The tokenizer is fixed for good, so it must not depend on what any distribution will ever hold out.
    made = given or trained_tokenizer(tokenizer, texts.splits[trained[0]], cache, check)
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
    made_by = recipe(tokenizer, _learned_bytes(trained[0], texts.splits, records))
    data = PreparedData(made, made_by, tokens, records, heldout, texts.heldout, texts.gone, modes)
    data = replace(data, files={name: corpus.files for name, corpus in texts.corpora.items() if corpus.files})
    if vocabulary is None:
        return data
    of_stages = [texts.splits.get(name) or texts.gone[name] for name in trained]
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
