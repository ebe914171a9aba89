"""Headers of safetensors files: which tensors there are, of what kind and shape, and where. Torch-free.

Source:
    The format's description, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from lifelong_moe.data.formats.strict_json import parse_object
from lifelong_moe.errors import CheckpointError
from lifelong_moe.storage.plain import PlainError, from_plain

BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Of a number of each kind that is read; others are quantized, or no weights."""
MOST_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_PREFIX = 8


@dataclass(frozen=True)
class Extent:
    """Where a tensor's numbers lie."""

    path: Path
    start: int
    """First byte in the file."""
    dtype: str
    """A key of :data:`BYTES`."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of all numbers."""
        return BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class _Entry:
    """A tensor in a header."""

    dtype: Literal["F32", "F16", "BF16"]
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def read_header(file: BufferedReader, path: Path) -> dict[str, Extent]:
    """Read which tensors a file holds.

    Args:
        file: Open at its beginning.
        path: Its name, for messages and places.

    Raises:
        CheckpointError: It is cut off, is no such file, or holds numbers of another kind; names the tensor.
        DataError: Its header is not JSON.
    """
    size, prefix = os.fstat(file.fileno()).st_size, file.read(_PREFIX)
    length = int.from_bytes(prefix, "little")
    begin = _PREFIX + length
    if len(prefix) < _PREFIX or length > MOST_HEADER_BYTES:
        raise CheckpointError(f"{path}: not a safetensors file.")
    if begin > size:
        raise CheckpointError(f"{path}: cut off within its header, at byte {size:,}.")
    try:
        text = file.read(length).decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: not a safetensors file.") from None
    header = parse_object(text, path)
    header.pop("__metadata__", None)
    found = {name: _extent(name, entry, path, begin) for name, entry in header.items()}
    _require_whole(found, path, begin, size)
    return found


def _extent(name: str, entry: Any, path: Path, begin: int) -> Extent:
    try:
        found = from_plain(_Entry, entry)
    except PlainError as error:
        raise CheckpointError(f"{path}: {error.within(name)}.") from None
    first, end = found.data_offsets
    extent = Extent(path, begin + first, found.dtype, found.shape)
    if min(first, *found.shape, 0) < 0 or extent.num_bytes != end - first:
        raise CheckpointError(f"{path}: {name} of shape {extent.shape} takes no {end - first:,} bytes.")
    return extent


def _require_whole(found: dict[str, Extent], path: Path, begin: int, size: int) -> None:
    """Require that tensors lie one after the other, without gaps, to the end of the file."""
    at = begin
    for name, extent in sorted(found.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if extent.start != at:
            raise CheckpointError(f"{path}: {name} does not begin where the tensor before it ends.")
        at += extent.num_bytes
        if at > size:
            raise CheckpointError(f"{path}: cut off within {name}, at byte {size:,} of {at:,}.")
    if at != size:
        raise CheckpointError(f"{path}: {size - at:,} bytes after its last tensor.")
