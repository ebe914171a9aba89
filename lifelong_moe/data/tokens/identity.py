"""Identify prepared data by hashes, so that plans and stage keys need no text. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lifelong_moe.storage.grammars import Sha256


@dataclass(frozen=True)
class TokenizerIdentity:
    """The tokenizer that made the tokens, by recipe and hash."""

    recipe: dict[str, Any]
    """How it was made: a file, or the settings and version of its training."""
    hash: Sha256


@dataclass(frozen=True)
class DataIdentity:
    """All that a plan needs to know of prepared data."""

    train_hashes: Mapping[str, str]
    """Hash of each distribution's training documents."""
    tokenizer: TokenizerIdentity
    vocab_size: int
    bos_id: int
    """The document separator."""
