"""From configured sources to tokens on disk: everything that a run reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lifelong_moe.data.config import SourceConfig, TokenizerConfig
from lifelong_moe.data.documents import Corpus
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
    sources: Mapping[str, SourceConfig], tokenizer: TokenizerConfig, train_on: str, trained: list[str], cache: Path
) -> PreparedData:
    """Read, check and tokenize every distribution; what is in the cache already is only verified.

    Args:
        sources: Distributions by name, those of the stages and those only evaluated.
        tokenizer: How text becomes tokens.
        train_on: The first stage's distribution, whose training text the tokenizer is trained on.
        trained: Distributions whose training text some stage reads.
        cache: Directory for extracted text, tokenizers and tokens.

    Raises:
        DataError: If documents cannot be read, or a training document is held out elsewhere.
    """
    corpora = {}
    for name, source in sources.items():
        try:
            corpora[name] = read_corpus(name, source, cache)
        except ConfigError as error:
            raise ConfigError(f"distributions.{name}: {error}") from None
        except DataError as error:
            raise DataError(f"distributions.{name}: {error}") from None
    _require_disjoint(corpora, trained)
    made = prepare_tokenizer(tokenizer, corpora[train_on], cache)
    tokens = {name: tokenize_corpus(corpus, made, cache) for name, corpus in corpora.items()}
    _warn_if_coarse(tokens, train_on)
    return PreparedData(made, recipe(tokenizer), tokens)


def _require_disjoint(corpora: Mapping[str, Corpus], trained: list[str]) -> None:
    """Training text of one distribution must not be held out in another."""
    held_out = {document.hash: name for name, corpus in corpora.items() for document in corpus.heldout}
    for name in trained:
        for document in corpora[name].train:
            if document.hash in held_out:
                other = held_out[document.hash]
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
