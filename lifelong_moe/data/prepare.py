"""From configured sources to tokens on disk: everything that a run reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lifelong_moe.data.config import SourceConfig, TokenizerConfig
from lifelong_moe.data.documents import Corpus, normalized_hash
from lifelong_moe.data.shards import TokenizedCorpus, tokenize_corpus
from lifelong_moe.data.sources import read_corpus
from lifelong_moe.data.tokenizer import Tokenizer, prepare_tokenizer, recipe
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
        context: Tokens in a training block; each trained distribution must fill at least one.
        cache: Directory for extracted text, tokenizers and tokens.

    Raises:
        DataError: If documents cannot be read or are too few, or a training document is held out elsewhere.
    """
    # A person's own files first: a mistake in them is then found before the cache is written.
    order = sorted(sources, key=lambda name: sources[name].builtin is not None)
    read = {name: _read(name, sources[name], cache) for name in order}
    corpora = {name: read[name] for name in sources}
    _require_disjoint(corpora, trained)
    made = prepare_tokenizer(tokenizer, corpora[trained[0]], cache)
    tokens = {name: tokenize_corpus(corpus, made, cache) for name, corpus in corpora.items()}
    for name in trained:
        if tokens[name].train.num_tokens <= context:
            raise DataError(
                f"distributions.{name}: too few tokens: {tokens[name].train.num_tokens} of training text do not fill "
                f"one block of model.context={context}."
            )
    _warn_if_coarse(tokens, trained[0])
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
                    f"distributions.{name}: a training document ({document.source}) is held out in {other}; "
                    f"remove it from one of them."
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
