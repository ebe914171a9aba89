"""Identify prepared data by hashes, so that plans and stage keys need no text. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lifelong_moe.storage.grammars import Sha256


@dataclass(frozen=True)
class TokenizerIdentity:
    """The tokenizer that made the tokens, by recipe and hash."""

    recipe: dict[str, Any]
    """How it was made: a file, or the settings and version of its training."""
    hash: Sha256


@dataclass(frozen=True)
class AddedVocabulary:
    """What stages add to the vocabulary of the first one."""

    numbers: tuple[int, ...] = ()
    """Tokens wanted of each stage, in order; 0 adds none."""
    rows: int = 0
    """Rows of a checkpoint's embedding, of which its tokenizer may use fewer."""


@dataclass(frozen=True)
class AddedTokens:
    """The tokens that a stage adds, which its training text decides."""

    number: int
    tokenizer: TokenizerIdentity
    """With them."""


@dataclass(frozen=True)
class DataIdentity:
    """All that a plan needs to know of prepared data."""

    train_hashes: Mapping[str, str]
    """Hash of each distribution's training documents."""
    tokenizer: TokenizerIdentity
    vocab_size: int
    bos_id: int
    """The document separator."""
    added: Mapping[int, AddedTokens] = field(default_factory=dict)
    """By the index of the stage that adds them, in order."""

    def at(self, stage: int) -> DataIdentity:
        """The same with the tokenizer of a stage's model, given its index."""
        known = [one.tokenizer for index, one in self.added.items() if index <= stage]
        return replace(self, tokenizer=known[-1]) if known else self

    def tokens_added(self, stage: int) -> int:
        """Number of tokens that a stage adds, given its index."""
        return self.added[stage].number if stage in self.added else 0
