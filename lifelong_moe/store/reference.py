"""A stage whose tensors lie in a checkpoint's own files: it holds where they are, and what the files hash to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from lifelong_moe.config.data import BaseConfig
from lifelong_moe.errors import ConfigError, CorruptError
from lifelong_moe.interop.layout.folder import CONFIG, Checkpoint
from lifelong_moe.interop.layout.place import referred_folder
from lifelong_moe.interop.layout.safetensors import BYTES
from lifelong_moe.redaction import redact
from lifelong_moe.storage.grammars import FileName
from lifelong_moe.storage.keys import content_key, text_sha256
from lifelong_moe.storage.plain import PlainError
from lifelong_moe.storage.tensors import DTYPES, fill
from lifelong_moe.storage.verified import Entry, verify_files

if TYPE_CHECKING:
    import torch
    from torch import Tensor

REFERENCE = "reference.json"
Kind = Literal["F32", "F16", "BF16"]


@dataclass(frozen=True)
class Piece:
    """Numbers that lie one after the other in a file."""

    file: FileName
    start: int
    """First byte."""
    dtype: Kind


@dataclass(frozen=True)
class Lying:
    """A tensor: equally long pieces, one after the other."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Its numbers."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a stage holds in place of its tensors."""

    path: str
    """Folder of the checkpoint when it was read, or its id on the hub."""
    revision: str | None
    """Commit on the hub; None for a folder."""
    files: Mapping[FileName, Entry]
    """Of weights."""
    dtype: Kind
    """Of all tensors in memory."""
    tensors: Mapping[str, Lying]

    def __post_init__(self) -> None:
        total = sum(one.numel for one in self.tensors.values())
        # Each number is in the files once, so that no more memory is taken than these are long.
        if not self.tensors or total * min(BYTES.values()) > sum(entry.bytes for entry in self.files.values()):
            raise PlainError("more than the files hold, or nothing", ".tensors")
        for name, one in self.tensors.items():
            if min(one.shape, default=1) < 1 or not one.pieces or one.numel % len(one.pieces):
                raise PlainError("has no such pieces", f".tensors.{name}")
            for piece in one.pieces:
                end = piece.start + one.numel // len(one.pieces) * BYTES[piece.dtype]
                if piece.start < 0 or piece.file not in self.files or end > self.files[piece.file].bytes:
                    raise PlainError(f"lies outside of {piece.file}", f".tensors.{name}")


def refer(checkpoint: Checkpoint, base: BaseConfig, shapes: Mapping[str, tuple[int, ...]]) -> Reference:
    """Say where a checkpoint's tensors lie.

    Args:
        checkpoint: The folder.
        base: Its place, as the run's configuration has it.
        shapes: Of our model's tensors.
    """
    found: dict[str, dict[int, Piece]] = {}
    for stored, extent in checkpoint.tensors:
        length = extent.num_bytes // max(1, len(stored.ours))
        for place, name in enumerate(stored.ours):
            piece = Piece(extent.path.name, extent.start + place * length, extent.dtype)  # type: ignore[arg-type]
            found.setdefault(name, {})[stored.half or 0] = piece
    kinds = checkpoint.dtypes
    return Reference(
        path=redact(str(base.path)),  # an environment's value may be secret, and what is stored is not
        revision=base.revision,
        files=checkpoint.files(),
        dtype=kinds.pop() if len(kinds) == 1 else "F32",  # type: ignore[arg-type]
        tensors={name: Lying(shapes[name], tuple(one[i] for i in sorted(one))) for name, one in found.items()},
    )


def referred_forms(reference: Reference) -> dict[str, Tensor]:
    """The tensors without memory, on the device ``meta``."""
    import torch

    dtype = getattr(torch, DTYPES[reference.dtype])
    return {name: torch.empty(one.shape, dtype=dtype, device="meta") for name, one in reference.tensors.items()}


def read_referred(
    reference: Reference, targets: Mapping[str, Tensor], config: str | None, sha256: object, source: str
) -> None:
    """Read tensors, from files that are verified before and while they are read.

    Args:
        reference: Of a stage.
        targets: Contiguous tensors on the CPU by name, into which their numbers are read.
        config: The ``config.json`` that the stage keeps of the checkpoint.
        sha256: Hash of the checkpoint, which the stage's key contains.
        source: What messages call the reference.

    Raises:
        CheckpointError: The folder is not there, or has to be named.
        CorruptError: A file is another one than it was, or the reference is none of this stage's.
    """
    import torch

    hashes = {name: entry.sha256 for name, entry in reference.files.items()}
    if config is None or content_key({CONFIG: text_sha256(config), **hashes}) != sha256:
        raise CorruptError(f"{source}: its files are not those of the checkpoint that the stage's key names.")
    try:
        base = BaseConfig(path=reference.path, revision=reference.revision, sha256=str(sha256), vocab_size=1)
    except ConfigError as error:
        raise CorruptError(f"{source}: {error}") from None
    sizes = {name: entry.bytes for name, entry in reference.files.items()}
    files = verify_files(referred_folder(str(sha256), base, sizes), reference.files, source)
    for file in reference.files:
        with files.opened(file) as path, path.open("rb") as opened:
            for name, target in targets.items():
                pieces = reference.tensors[name].pieces
                for part, piece in zip(target.view(-1).chunk(len(pieces)), pieces, strict=True):
                    if piece.file == file:
                        opened.seek(piece.start)
                        _fill(part, opened, getattr(torch, DTYPES[piece.dtype]), files.path / file, name)


def _fill(part: Tensor, file: BinaryIO, dtype: torch.dtype, path: Path, name: str) -> None:
    try:
        fill(part, file, dtype)
    except CorruptError as error:
        raise CorruptError(f"{path}: {name} {error}") from None
