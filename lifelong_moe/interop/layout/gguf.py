"""Headers of GGUF files: their keys, and which tensors there are, of what kind and shape, and where. Torch-free.

The package ``gguf`` has a reader as well. Ours is bounded by the file: no count in it costs more than the file is long.

Source:
    The format's description, ``docs/gguf.md`` of https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lifelong_moe.errors import CheckpointError
from lifelong_moe.interop.layout.folder import opened

Scalar = int | float | bool | str
MAGIC, VERSIONS = b"GGUF", (2, 3)
_CODES = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")
"""Of :mod:`struct`, by the number of a kind of value; strings and arrays have none."""
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_ALIGNMENT = 32


@dataclass(frozen=True)
class Block:
    """Where a tensor's numbers begin."""

    start: int
    """First byte in the file."""
    kind: int
    """Number of ``ggml_type``."""
    shape: tuple[int, ...]
    """Slowest dimension first, as in safetensors; the file has them the other way round."""

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Gguf:
    """A file that is mapped."""

    path: Path
    keys: Mapping[str, Scalar | list[Scalar]]
    tensors: Mapping[str, Block]
    data: mmap.mmap
    """The whole file."""


def read_gguf(path: Path) -> Gguf:
    """Read a file's header, and map its tensors.

    Raises:
        CheckpointError: It is missing, is no such file, or is cut off.
    """
    with opened(path) as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise CheckpointError(f"{path}: not a GGUF file.")
        # Mapped for as long as somebody looks at it: tensors are views of it.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _read(path, data)
    except struct.error:
        raise CheckpointError(f"{path}: cut off within its header, at byte {len(data):,}.") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: invalid UTF-8 in its header.") from None


def _read(path: Path, data: mmap.mmap) -> Gguf:
    cursor = _Cursor(path, data, len(MAGIC))
    if (version := cursor.number("I")) not in VERSIONS:
        raise CheckpointError(f"{path}: version {version} of GGUF; there are {VERSIONS}, in little-endian order.")
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    keys, tensors = {}, {}
    for _ in range(num_keys):
        name = cursor.text()
        keys[name] = cursor.value()
    found = [cursor.tensor() for _ in _counted(num_tensors)]
    align = keys.get("general.alignment", _ALIGNMENT)
    if type(align) is not int or align < 1:
        raise CheckpointError(f"{path}: general.alignment={align} must be a positive number.")
    begin = -(-cursor.at // align) * align
    for name, block in found:
        if name in tensors:
            raise CheckpointError(f"{path}: has {name} twice.")
        tensors[name] = Block(begin + block.start, block.kind, block.shape)
    return Gguf(path, keys, tensors, data)


def _counted(number: int) -> Iterator[int]:
    """As ``range``, also above ``sys.maxsize``."""
    at = 0
    while at < number:
        yield at
        at += 1


class _Cursor:
    """Reads one thing after the other; what would lie beyond the end is a ``struct.error``."""

    def __init__(self, path: Path, data: mmap.mmap, at: int) -> None:
        self.path, self.data, self.at = path, data, at

    def number(self, code: str) -> int:
        """One number."""
        return int(self._scalars(code, 1)[0])

    def text(self) -> str:
        """A string, which its length precedes."""
        length = self.number("Q")
        first, self.at = self.at, self.at + length
        if self.at > len(self.data):
            raise struct.error
        return self.data[first : self.at].decode("utf-8")

    def value(self) -> Scalar | list[Scalar]:
        """The value of a key, which its kind precedes."""
        kind = self.number("I")
        if kind != _ARRAY:
            return self._values(kind, 1)[0]
        kind, length = self.number("I"), self.number("Q")
        return self._values(kind, length)

    def tensor(self) -> tuple[str, Block]:
        """A tensor's name and what it is, its place counted from the first one."""
        name, dimensions = self.text(), self.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise CheckpointError(f"{self.path}: {name} has {dimensions} dimensions.")
        shape = tuple(int(number) for number in reversed(self._scalars("Q", dimensions)))
        kind, start = self.number("I"), self.number("Q")
        return name, Block(start, kind, shape)

    def _values(self, kind: int, length: int) -> list[Scalar]:
        if kind == _STRING:
            return [self.text() for _ in _counted(length)]
        # Arrays of arrays are in the format and in no file of a model.
        code = _CODES[kind] if kind < len(_CODES) else None
        if code is None:
            raise CheckpointError(f"{self.path}: has a value of kind {kind}, which is not known.")
        return self._scalars(code, length)

    def _scalars(self, code: str, length: int) -> list[Scalar]:
        size = struct.calcsize(f"<{code}")
        # Before memory is taken for it.
        if length > (len(self.data) - self.at) // size:
            raise struct.error
        found = struct.unpack_from(f"<{length}{code}", self.data, self.at)
        self.at += length * size
        return list(found)
