"""A checkpoint's folder: what is in it, checked before a number is read. Torch-free.

Files may be symbolic links, as in the hub's cache: the user names the folder, which may lie anywhere.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from lifelong_moe.config.model import ModelConfig
from lifelong_moe.data.formats.strict_json import parse_object
from lifelong_moe.errors import CheckpointError
from lifelong_moe.interop.layout.families import Family, read_family
from lifelong_moe.interop.layout.safetensors import Extent, read_header
from lifelong_moe.interop.layout.tensors import Stored, has_fused_experts, matched, stored_tensors
from lifelong_moe.storage.opening import open_regular, read_bounded
from lifelong_moe.storage.plain import PlainError, from_plain
from lifelong_moe.storage.verified import Entry

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
MOST_BYTES = {
    CONFIG: 1 << 20,
    GENERATION_CONFIG: 1 << 20,
    TOKENIZER_CONFIG: 4 << 20,
    INDEX: 64 << 20,
    TOKENIZER: 64 << 20,
}
"""Far above published files, of which the largest tokenizers have 35 MB."""
MOST_SHARDS = 10_000


@dataclass(frozen=True)
class Vocabulary:
    """What a checkpoint's tokenizer says of itself."""

    size: int
    """One more than the largest id."""
    bos_id: int | None
    """The token that it begins a text with."""
    eos_id: int | None
    special: Mapping[int, str]
    """Names of special tokens, which no text has."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose tensors are those of its ``config.json``."""

    path: Path
    family: Family
    """Keys of its ``config.json``; where the tokenizer names a token that begins a text, with that one."""
    model: ModelConfig
    tensors: tuple[tuple[Stored, Extent], ...]
    """Each tensor, and where its numbers lie, in the order of files."""
    head_copy: Extent | None
    """A tied head that is stored nevertheless; it must equal the embedding."""
    vocabulary: Vocabulary | None
    """None without a ``tokenizer.json``."""

    @property
    def num_bytes(self) -> int:
        """Of all its numbers."""
        return sum(extent.num_bytes for _, extent in self.tensors)

    def files(self) -> dict[str, Entry]:
        """Each file of weights, hashed."""
        return {path.name: file_entry(path) for path in sorted({extent.path for _, extent in self.tensors})}

    @property
    def dtypes(self) -> set[str]:
        """Kinds of its numbers: F32, F16 or BF16."""
        return {extent.dtype for _, extent in self.tensors}


@dataclass(frozen=True)
class _Index:
    """``model.safetensors.index.json``."""

    weight_map: dict[str, str]
    """File of each tensor."""
    metadata: Any = None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what a folder holds, without its numbers.

    Every tensor of its files must be one of the model that ``config.json`` describes, and the other way round.
    An embedding may have more rows than the tokenizer has tokens, as Qwen's do, since no text has those; not fewer.

    Raises:
        CheckpointError: Something is missing, damaged, too much or of another shape; names the file and the tensor.
        ConfigError: ``config.json`` asks for something that we cannot express; names the key.
        DataError: A file is not JSON.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: a file; python -m pipelines.convert makes a folder of a GGUF file."
            if path.is_file()
            else f"{path}: no such folder; a checkpoint is a folder with {CONFIG} and {WEIGHTS}."
        )
    config, vocabulary = _read_json(path / CONFIG), _vocabulary(path)
    family = read_family(_with_separator(_with_generation(config, path), vocabulary), str(path / CONFIG))
    if vocabulary is not None and vocabulary.size > family.vocab_size:
        raise CheckpointError(
            f"{path / TOKENIZER}: ids reach {vocabulary.size - 1}, and the embedding has vocab_size="
            f"{family.vocab_size} rows."
        )
    extents, model = _extents(path), family.model()
    expected = stored_tensors(family, model, model.experts_by_layer, fused=has_fused_experts(extents))
    shapes = {name: extent.shape for name, extent in extents.items()}
    found = [(one, extents[one.name]) for one in matched(expected, shapes, model, str(path))]
    found.sort(key=lambda pair: (pair[1].path, pair[1].start))
    head_copy = extents.get("lm_head.weight") if model.tie_embeddings else None
    return Checkpoint(path, family, model, tuple(found), head_copy, vocabulary)


def _with_generation(config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """``config.json`` with the special tokens of ``generation_config.json`` where it names none itself."""
    keys = ("bos_token_id", "eos_token_id")
    if any(config.get(key) is not None for key in keys) or not (path / GENERATION_CONFIG).exists():
        return config
    found = _read_json(path / GENERATION_CONFIG)
    return {**config, **{key: found[key] for key in keys if key in found}}


def _with_separator(config: Mapping[str, Any], vocabulary: Vocabulary | None) -> Mapping[str, Any]:
    """``config.json`` with the token that begins a document: of the tokenizer, which made the text of pretraining."""
    if vocabulary is None:
        return config
    if vocabulary.bos_id is not None:
        return {**config, "bos_token_id": vocabulary.bos_id}
    # Without any BOS an EOS stands between documents; a list of them is of a model that chats.
    return config if vocabulary.eos_id is None else {**config, "eos_token_id": vocabulary.eos_id}


def _extents(path: Path) -> dict[str, Extent]:
    """Where each tensor of the folder's files lies."""
    if (path / WEIGHTS).exists():
        return _header(path / WEIGHTS)
    if not (path / INDEX).exists():
        hint = " Pickles such as pytorch_model.bin are never loaded." if any(path.glob("*.bin")) else ""
        raise CheckpointError(f"{path}: has neither {WEIGHTS} nor {INDEX}.{hint}")
    places = files_of_index(path)
    found: dict[str, Extent] = {}
    for name in sorted(set(places.values())):
        for tensor, extent in _header(path / name).items():
            if places.get(tensor) != name:
                raise CheckpointError(f"{path / name}: holds {tensor}, which {INDEX} does not place there.")
            found[tensor] = extent
    if missing := sorted(places.keys() - found.keys()):
        raise CheckpointError(f"{path / places[missing[0]]}: lacks {missing[0]}, which {INDEX} places there.")
    return found


def files_of_index(path: Path) -> Mapping[str, str]:
    """The file of each tensor of a folder with an index, which names files beside it.

    Raises:
        CheckpointError: It does not, or names too many.
        DataError: It is not JSON.
    """
    try:
        places = from_plain(_Index, _read_json(path / INDEX)).weight_map
    except PlainError as error:
        raise CheckpointError(f"{path / INDEX}: {error}.") from None
    files = sorted(set(places.values()))
    if len(files) > MOST_SHARDS:
        raise CheckpointError(f"{path / INDEX}: names {len(files):,} files; there may be at most {MOST_SHARDS:,}.")
    # A name with a folder in it could lead anywhere.
    if odd := [name for name in files if Path(name).name != name]:
        raise CheckpointError(f"{path / INDEX}: {odd[0]!a} is no name of a file beside it.")
    return places


def _header(path: Path) -> dict[str, Extent]:
    with opened(path) as file:
        return read_header(file, path)


def file_entry(path: Path) -> Entry:
    """Length and SHA-256 of a file of a checkpoint."""
    with opened(path) as file:
        return Entry(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Open a file of a checkpoint.

    Raises:
        CheckpointError: Missing, unreadable, or no regular file.
    """
    with _readable(path):
        file = open_regular(path, follow=True)
    with file:
        yield file


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from None


def _read_json(path: Path) -> dict[str, Any]:
    with _readable(path):
        data = read_bounded(path, MOST_BYTES[path.name], follow=True)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: invalid UTF-8 at byte {error.start}.") from None
    return parse_object(text, path)


def _vocabulary(path: Path) -> Vocabulary | None:
    """Read off the folder's tokenizer how many tokens it has, and which begins a text."""
    if not (path / TOKENIZER).exists():
        return None
    tokenizer = _read_json(path / TOKENIZER)
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens") or []
    words = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(words, list):  # of a Unigram model, whose ids are places
        words = {str(one[0]): i for i, one in enumerate(words) if isinstance(one, list) and one}
    if not isinstance(words, dict) or not isinstance(added, list):
        raise CheckpointError(f"{path / TOKENIZER}: has no vocabulary.")
    ids = {str(name): number for name, number in words.items()}
    ids |= {str(one.get("content")): one.get("id") for one in added if isinstance(one, dict)}
    if not ids or not all(type(number) is int and number >= 0 for number in ids.values()):
        raise CheckpointError(f"{path / TOKENIZER}: not all tokens have ids.")
    settings = _read_json(path / TOKENIZER_CONFIG) if (path / TOKENIZER_CONFIG).exists() else {}
    bos_id, eos_id = (ids.get(_content(settings.get(name))) for name in ("bos_token", "eos_token"))
    first = _put_first(tokenizer.get("post_processor"), ids)
    special = {int(one["id"]): str(one.get("content")) for one in added if isinstance(one, dict) and one.get("special")}
    return Vocabulary(max(ids.values()) + 1, bos_id if first is None else first, eos_id, special)


def _put_first(processor: object, ids: Mapping[str, int]) -> int | None:
    """The token that a post-processor puts before each text; None if it puts none there."""
    if not isinstance(processor, dict):
        return None
    if isinstance(inner := processor.get("processors"), list):  # one after the other: the last one's stands first
        return next((found for one in reversed(inner) if (found := _put_first(one, ids)) is not None), None)
    single, cls = processor.get("single"), processor.get("cls")
    if isinstance(single, list) and single and isinstance(single[0], dict):
        cls = [single[0]["SpecialToken"].get("id")] if isinstance(single[0].get("SpecialToken"), dict) else None
    return ids.get(str(cls[0])) if isinstance(cls, list) and cls else None


def _content(token: object) -> str:
    """A special token's text, of which both forms are in use; empty for none."""
    return str((token.get("content") if isinstance(token, dict) else token) or "")
