"""Settings of distributions, which say where documents come from, and of the tokenizer. Torch-free."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction
from typing import Any

from lifelong_moe.config.routing.bounds import require_bounded
from lifelong_moe.errors import ConfigError

# A given tokenizer.json is held to it, too: its highest token id decides the size of the embedding.
MAX_VOCAB_SIZE = 1_000_000
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
"""``OWNER/NAME`` on the Hugging Face hub."""
COMMIT = re.compile(r"[0-9a-f]{40}")
"""A commit there; a branch or a tag may move."""
BUILTIN_SOURCES = ("english_docs", "python_code", "cpp_headers")
ENCODINGS = (
    *(f"cp125{number}" for number in range(9)),
    *("iso8859-1", "iso8859-2", "iso8859-15", "koi8-r", "koi8-u", "mac-roman"),
    *("shift_jis", "euc_jp", "gb18030", "big5", "euc_kr", "utf-16-le", "utf-16-be"),
)
"""Encodings of text files besides UTF-8, and UTF-16 with a byte order mark, by Python's names."""
MOST_PATTERNS = 1_000
MOST_PARTS = 10**18
"""Sum of a mixture's weights in whole numbers: what 64 bits hold."""
LONGEST_MIXED = 48
"""Characters of a stage's name that lists what it learns."""


class BadLinesRule(StrEnum):
    """What a line of an inbox that holds no document does."""

    refuse = "refuse"
    quarantine = "quarantine"


class KeepText(StrEnum):
    """How long a tick of scheduled retraining keeps its copy of a batch's text."""

    always = "always"
    until_promoted = "until_promoted"
    never = "never"


class BaseStore(StrEnum):
    """What a store holds of a checkpoint."""

    copy = "copy"
    reference = "reference"


@dataclass(frozen=True)
class TextMixture:
    """The distributions of a stage and their shares of its new text; the largest share comes first, then by name."""

    names: tuple[str, ...]
    weights: tuple[int, ...]
    """The shares in the smallest whole numbers."""

    @classmethod
    def as_written(cls, data: Any) -> TextMixture:
        """Read ``data`` of a stage: a name, or a mapping from names to positive numbers.

        Raises:
            ConfigError: Naming what came.
        """
        if isinstance(data, (str, int, float)):
            return cls((str(data),), (1,))
        if not isinstance(data, Mapping):
            shown = "null" if data is None else data
            raise ConfigError(f"data={shown} must be a name, or a mixture such as {{web: 0.7, code: 0.3}}.")
        found = {str(name): _weight(str(name), value) for name, value in data.items()}
        if len(found) < 2 or len(found) < len(data):
            raise ConfigError(
                f"data={{{', '.join(map(str, data))}}} must mix two distributions or more; one alone is data: NAME."
            )
        whole = math.lcm(*(weight.denominator for weight in found.values()))
        numbers = {name: int(weight * whole) for name, weight in found.items()}
        least = math.gcd(*numbers.values())
        names = sorted(numbers, key=lambda name: (-numbers[name], name))
        if sum(numbers.values()) // least > MOST_PARTS:
            raise ConfigError(
                f"data={{{', '.join(map(str, data))}}}: in whole numbers, its weights add up to more than "
                f"{MOST_PARTS:.0e}. Write them with fewer digits."
            )
        return cls(tuple(names), tuple(numbers[name] // least for name in names))

    @property
    def name(self) -> str:
        """A name for a stage that learns it."""
        first, whole = self.names[0], "-".join(self.names)
        # A number may follow it, and a suffix.
        return whole if len(whole) <= LONGEST_MIXED or whole == first else f"{first[:LONGEST_MIXED]}-mixed"

    def share(self, name: str) -> Fraction:
        """Share of a distribution in the stage's new text."""
        return Fraction(self.weights[self.names.index(name)], sum(self.weights))


def _weight(name: str, value: Any) -> Fraction:
    """A weight as the decimal number that it prints as, so that 0.1 is exactly a tenth."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"data.{name}={value!r} must be a positive number: its weight in the mixture.")
    return Fraction(str(value))


@dataclass(kw_only=True)
class SourceConfig:
    """Where a distribution's documents come from: exactly one of ``builtin``, ``files`` and ``hf``."""

    builtin: str | None = None
    """Text that comes with every installation: ``english_docs``, ``python_code`` or ``cpp_headers``. Null: not used."""
    files: Any = None
    """Path or glob, or a list of them, of ``.jsonl``, ``.parquet`` or text: ``.txt``, ``.md``, ``.rst``, ``.html`` and
    source code, each file a document; all but ``.parquet`` also as ``.gz`` or ``.zst``. ``~`` is your home directory.
    Null: not used."""
    heldout_files: Any = None
    """Path or glob, or a list of them, of the held-out documents, with ``files`` only. Null: ``heldout_fraction``
    splits them off."""
    encoding: str | None = None
    """Encoding of text files that are not UTF-8 and have no byte order mark, such as ``cp1252``, with ``files`` only.
    Null: they are left out and named, but for HTML pages that declare theirs."""
    min_chars: int = 0
    """Fewest characters of a document, with ``files`` only; shorter ones are left out. 0 keeps all."""
    hf: str | None = None
    """Id of a Hugging Face dataset. Null: not used."""
    name: str | None = None
    """Configuration name of the Hugging Face dataset. Null: its default configuration."""
    revision: str | None = None
    """Commit of the Hugging Face dataset, 40 hexadecimal digits; required with ``hf``, null without."""
    split: str = "train"
    """Split of the Hugging Face dataset."""
    text_field: str = "text"
    """Field (JSONL, Parquet, Hugging Face) that holds the text."""
    answer_field: str | None = None
    """Field (JSONL, Parquet, Hugging Face) that holds the answer to the prompt in ``text_field``. Only answers and the
    token that ends them are then scored, and only a stage of ``kind: finetune`` can train on them. Null: plain text."""
    source_field: str = "source"
    """Field that names the document's source unit, such as its author or site; a unit is never split between training
    and held-out documents. A document without it is a unit of its own."""
    heldout_fraction: float = 0.05
    """Fraction of source units held out, above 0 and below 1."""
    heldout_sources: int = 1
    """Fewest source units held out, whatever ``heldout_fraction`` gives, but never more than half of all."""
    max_bytes: int | None = None
    """Keep about this many UTF-8 bytes of documents at most, as whole source units in hash order. Null keeps all."""

    def __post_init__(self) -> None:
        require_bounded(self, "")
        given = [key for key in ("builtin", "files", "hf") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"a distribution needs exactly one of builtin, files and hf; got {', '.join(given) or 'none of them'}."
            )
        if self.builtin is not None and self.builtin not in BUILTIN_SOURCES:
            raise ConfigError(f"builtin={self.builtin} is unknown; there are {', '.join(BUILTIN_SOURCES)}.")
        # A commit and not a branch or tag, which may move: the text of a stage that is to be resumed must not change.
        if self.hf is not None and not COMMIT.fullmatch(self.revision or ""):
            raise ConfigError(
                f"hf={self.hf} needs revision=<commit, 40 hexadecimal digits>, so that the text cannot change; "
                f"got {self.revision}."
            )
        for key in ("heldout_files", "encoding", "min_chars"):
            if getattr(self, key) and self.files is None:
                raise ConfigError(f"{key} goes with files only.")
        for key in ("files", "heldout_files"):
            if getattr(self, key) is not None:
                _require_patterns(key, getattr(self, key))
        if self.encoding is not None and not is_known_encoding(self.encoding):
            raise ConfigError(f"encoding={self.encoding} is unknown; there are {', '.join(ENCODINGS)}.")
        if self.min_chars < 0:
            raise ConfigError(f"min_chars={self.min_chars} must not be negative.")
        if not 0.0 < self.heldout_fraction < 1.0:
            raise ConfigError(f"heldout_fraction={self.heldout_fraction} must lie between 0 and 1.")
        if self.heldout_sources < 1:
            raise ConfigError(f"heldout_sources={self.heldout_sources} must be at least 1.")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ConfigError(f"max_bytes={self.max_bytes} must be positive.")


def is_known_encoding(name: str) -> bool:
    """Whether an encoding is one of :data:`ENCODINGS`, by whichever of its names."""
    try:
        return codecs.lookup(name).name in ENCODINGS
    # LookupError: no such encoding; ValueError: no name at all.
    except (LookupError, ValueError):
        return False


def patterns(given: Any) -> tuple[str, ...]:
    """The paths and globs of ``files`` or ``heldout_files``; none where the key is null."""
    return () if given is None else tuple(given) if isinstance(given, list) else (given,)


def _require_patterns(key: str, given: Any) -> None:
    found = patterns(given)
    if not found or not all(isinstance(one, str) and one for one in found):
        raise ConfigError(f"{key}={given} must be a path or glob, or a list of them.")
    if len(found) > MOST_PATTERNS:
        raise ConfigError(f"{key} names {len(found):,} paths; there may be at most {MOST_PATTERNS:,}.")


@dataclass(kw_only=True)
class BaseConfig:
    """The checkpoint that a run begins with. ``model.from`` fills this section and the keys of ``model``; do not write
    it yourself."""

    path: str | None = None
    """Folder of the checkpoint, or its id on the hub; read until its model is in the store. Null: the run begins with
    random weights."""
    revision: str | None = None
    """Commit of the checkpoint on the hub, 40 hexadecimal digits. Null: ``path`` is a folder."""
    store: BaseStore = BaseStore.copy
    """What the store holds of its weights: a ``copy``, or a ``reference`` to its files and their hashes, which then
    must stay. ``model.store`` sets it."""
    sha256: str | None = None
    """Of its configuration and its weights."""
    vocab_size: int = 0
    """Rows of its embedding, of which a tokenizer may use fewer."""
    bos_id: int = 0
    """The token that its own files begin a document with."""
    ends: list[int] = field(default_factory=list)
    """Other tokens that its own files end a text with: where its model writes text, a document ends there."""

    def __post_init__(self) -> None:
        require_bounded(self, "base.")
        if (self.path is None) != (self.sha256 is None) or (self.path is None) != (self.vocab_size == 0):
            raise ConfigError("base is filled by model.from: write model.from=FOLDER and leave base out.")
        is_id = HUB_ID.fullmatch(self.path or "") and COMMIT.fullmatch(self.revision or "")
        if self.revision is not None and not is_id:
            raise ConfigError(f"base.path={self.path} and base.revision={self.revision} are no commit on the hub.")

    @property
    def is_given(self) -> bool:
        """Whether there is one."""
        return self.path is not None


@dataclass(kw_only=True)
class TokenizerConfig:
    """Byte-level BPE, trained once on the first stage's training text and never changed again."""

    vocab_size: int = 4096
    """Number of entries, special tokens included."""
    train_on: str | None = None
    """Distribution to train on. It must be the first stage's, which null means, too: a tokenizer that has seen later
    stages leaks the future."""
    file: str | None = None
    """Path of a ``tokenizer.json`` to use as it is; it then decides ``vocab_size``. Null trains one."""
    bos: str | None = None
    """Special token of ``file`` that begins each document. Null: with ``model.from`` what the checkpoint's files say,
    else the first of ``<|bos|>``, ``<s>``, ``<|begin_of_text|>``, ``<|startoftext|>``, ``<|endoftext|>``, ``[BOS]`` and
    ``<bos>`` that it has."""

    def __post_init__(self) -> None:
        if not 257 <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise ConfigError(
                f"tokenizer.vocab_size={self.vocab_size} must lie between 257 (256 bytes and the document separator) "
                f"and {MAX_VOCAB_SIZE:,}."
            )
        if self.bos is not None and self.file is None:
            raise ConfigError(f"tokenizer.bos={self.bos} goes with tokenizer.file; one that is trained has its own.")
