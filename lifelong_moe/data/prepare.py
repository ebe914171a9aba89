"""From configured sources to tokens on disk: everything that a run reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lifelong_moe.data.config import SourceConfig, TokenizerConfig
from lifelong_moe.data.documents import Corpus, normalized_hash
from lifelong_moe.data.near_copies import without_near_copies
from lifelong_moe.data.pairs import with_answers
from lifelong_moe.data.shards import TokenizedCorpus, tokenize_corpus, tokenize_documents
from lifelong_moe.data.sources import read_corpus
from lifelong_moe.data.tokenizer import Tokenizer, recipe, trained_tokenizer
from lifelong_moe.errors import ConfigError, DataError

log = logging.getLogger(__name__)
COARSE = 0.75
"""Warn when a distribution has less than this many bytes per token, relative to the tokenizer's own text."""


@dataclass(frozen=True)
class PreparedData:
    """Tokenizer and tokenized distributions."""

    tokenizer: Tokenizer
    recipe: dict[str, str | int]
    """What the tokenizer was made by."""
    corpora: dict[str, TokenizedCorpus]

    def tokenizer_identity(self) -> dict[str, Any]:
        """What stage keys and manifests say of the tokenizer."""
        return {"recipe": self.recipe, "hash": self.tokenizer.hash, "vocab_size": self.tokenizer.vocab_size}


def prepare_data(
    sources: Mapping[str, SourceConfig],
    tokenizer: TokenizerConfig,
    trained: list[str],
    context: int,
    cache: Path,
) -> PreparedData:
    """Read, check and tokenize every distribution; what is in the cache already is only verified.

    Args:
        sources: Distributions by name, those of the stages and those only evaluated.
        tokenizer: How text becomes tokens.
        trained: Distributions that the stages train on, in order; the tokenizer is trained on the first one's text.
        context: Tokens in a training block; text that is trained on must fill at least one.
        cache: Directory for extracted text, tokenizers and tokens.

    Raises:
        DataError: If documents cannot be read or are too few, or a training document is held out elsewhere.
    """
    # A person's own files first: a mistake in them is then found before the cache is written.
    given = None if tokenizer.file is None else Tokenizer.load(Path(tokenizer.file))
    order = sorted(sources, key=lambda name: sources[name].builtin is not None)
    read = {name: _read(name, sources[name], cache) for name in order}
    _require_disjoint(read, trained)
    corpora = without_near_copies({name: read[name] for name in sources})
    text = {name: corpora[name] for name in trained if sources[name].answer_field is None}
    check = partial(_require_blocks, text, context)
    if given is not None:
        check(given)
    # The tokenizer is fixed for good, so it must not depend on what any distribution will ever hold out.
    made = given or trained_tokenizer(tokenizer, read[trained[0]], cache, check)
    tokens = {name: tokenize_corpus(corpus, made, cache) for name, corpus in corpora.items()}
    _warn_if_coarse(tokens, trained[0])
    for name, source in sources.items():
        if source.answer_field is not None:
            tokens[name] = with_answers(corpora[name], tokens[name], made, context)
    return PreparedData(made, recipe(tokenizer), tokens)


def _read(name: str, source: SourceConfig, cache: Path) -> Corpus:
    try:
        return read_corpus(name, source, cache)
    except ConfigError as error:
        raise ConfigError(f"distributions.{name}: {error}") from None
    except DataError as error:
        raise DataError(f"distributions.{name}: {error}") from None


def _require_disjoint(corpora: Mapping[str, Corpus], trained: list[str]) -> None:
    """Training text of one distribution must not be held out in another."""
    held_out = {normalized_hash(d.text): name for name, corpus in corpora.items() for d in corpus.heldout}
    for name in trained:
        for document in corpora[name].train:
            if (other := held_out.get(normalized_hash(document.text))) is not None:
                raise DataError(
                    f"distributions.{name}: {document.origin or document.source}: this training document is held out "
                    f"in {other}; remove it from one of them."
                )


def _require_blocks(corpora: Mapping[str, Corpus], context: int, tokenizer: Tokenizer) -> None:
    """Each corpus must fill a training block; one of so few bytes that it may not is tokenized to know.

    Clusters and new experts begin from what a stage's text looks like, which next to no text does not show.
    """
    for name, corpus in corpora.items():
        if sum(document.num_bytes for document in corpus.train) > context * tokenizer.longest_token_bytes:
            continue
        num_tokens = tokenize_documents(corpus.train, tokenizer).num_tokens
        if num_tokens < context:
            raise DataError(
                f"distributions.{name}: too few tokens: {num_tokens} of training text do not fill one block of "
                f"model.context={context}."
            )


def _warn_if_coarse(corpora: Mapping[str, TokenizedCorpus], train_on: str) -> None:
    reference = corpora[train_on].train.bytes_per_token
    for name, corpus in corpora.items():
        found = corpus.train.bytes_per_token
        if found < COARSE * reference:
            log.warning(
                "%s has %.2f bytes per token, %s has %.2f: the tokenizer, trained on %s, cuts it finely, so its loss "
                "per token looks low; compare bits per byte", name, found, train_on, reference, train_on,
            )  # fmt: skip
