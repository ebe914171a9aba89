"""What documents a distribution consists of and how text becomes tokens. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from lifelong_moe.errors import ConfigError

MAX_VOCAB_SIZE = 1_000_000
BUILTIN_SOURCES = ("english_docs", "python_code", "cpp_headers")


class KeepText(StrEnum):
    """How long a tick keeps its copy of a batch's text."""

    always = "always"
    until_promoted = "until_promoted"
    never = "never"


@dataclass(kw_only=True)
class SourceConfig:
    """Where a distribution's documents come from: exactly one of ``builtin``, ``files`` and ``hf``."""

    builtin: str | None = None
    """Text that every installation carries: ``english_docs``, ``python_code`` or ``cpp_headers``."""
    files: str | None = None
    """Path or glob of ``.jsonl``, ``.txt`` or ``.parquet`` files; the first two also as ``.gz`` or ``.zst``."""
    heldout_files: str | None = None
    """Path or glob of the held-out documents; without it they are split off by ``heldout_fraction``."""
    hf: str | None = None
    """Id of a Hugging Face dataset."""
    name: str | None = None
    """Configuration name of the Hugging Face dataset."""
    revision: str | None = None
    """Commit of the Hugging Face dataset, 40 hexadecimal digits; required with ``hf``."""
    split: str = "train"
    """Split of the Hugging Face dataset."""
    text_field: str = "text"
    """Field (JSONL, Parquet, Hugging Face) that holds the text."""
    answer_field: str | None = None
    """Field (JSONL, Parquet, Hugging Face) with the answer to ``text_field``'s prompt. Only answers and their
    ends are then scored, and a stage of ``kind: finetune`` learns them alone."""
    source_field: str = "source"
    """Field that names the document's source unit, if present; a unit is never split between train and held-out."""
    heldout_fraction: float = 0.05
    """Share of source units held out."""
    heldout_sources: int = 1
    """Source units held out at least, whatever share they are, but never more than half of them."""
    max_bytes: int | None = None
    """Keep at most about this many UTF-8 bytes of documents (whole source units, in hash order); None keeps all."""

    def __post_init__(self) -> None:
        given = [key for key in ("builtin", "files", "hf") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"a distribution needs exactly one of builtin, files and hf; got {', '.join(given) or 'none of them'}."
            )
        if self.builtin is not None and self.builtin not in BUILTIN_SOURCES:
            raise ConfigError(f"builtin={self.builtin} is unknown; there are {', '.join(BUILTIN_SOURCES)}.")
        if self.hf is not None and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ConfigError(
                f"hf={self.hf} needs revision=<commit, 40 hexadecimal digits>, so that the text cannot change; "
                f"got {self.revision}."
            )
        if self.heldout_files is not None and self.files is None:
            raise ConfigError("heldout_files goes with files only.")
        if not 0.0 < self.heldout_fraction < 1.0:
            raise ConfigError(f"heldout_fraction={self.heldout_fraction} must lie between 0 and 1.")
        if self.heldout_sources < 1:
            raise ConfigError(f"heldout_sources={self.heldout_sources} must be at least 1.")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ConfigError(f"max_bytes={self.max_bytes} must be positive.")


@dataclass(kw_only=True)
class TokenizerConfig:
    """Byte-level BPE, trained once on the first stage's training text and then fixed for good."""

    vocab_size: int = 4096
    """Entries, special tokens included."""
    train_on: str | None = None
    """Must name the first stage's distribution, the default: a tokenizer that saw later stages leaks the future."""
    file: str | None = None
    """A given ``tokenizer.json`` instead; ``vocab_size`` is then read from it."""

    def __post_init__(self) -> None:
        if not 257 <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise ConfigError(
                f"tokenizer.vocab_size={self.vocab_size} must lie between 257 (256 bytes and the document separator) "
                f"and {MAX_VOCAB_SIZE:,}."
            )
