"""What stages know of their data without opening it: hashes of text, and the tokenizer. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TokenizerIdentity:
    """Which tokenizer made the tokens."""

    recipe: dict[str, Any]
    """What it was made by."""
    hash: str


@dataclass(frozen=True)
class DataIdentity:
    """All that a plan needs to know of prepared data."""

    train_hashes: Mapping[str, str]
    """Hash of each distribution's training documents."""
    tokenizer: TokenizerIdentity
    vocab_size: int
    bos_id: int
    """The document separator."""
