"""Read and write safetensors files, the only format of weights that is loaded: a pickle could execute code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from safetensors import SafetensorError, safe_open

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.verified import Entry, VerifiedDirectory

if TYPE_CHECKING:  # commands that only list stages do without torch
    import torch
    from torch import Tensor

CHUNK = 1 << 18
"""Numbers that are read, converted and looked at in one go."""
WRITTEN_BYTES = 16 << 20
"""That are written and hashed in one go."""
_PREFIX = 8
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
"""Torch's names of the kinds of numbers."""


@dataclass(frozen=True)
class _Extent:
    """Where a tensor's numbers lie."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


def load_weights(directory: VerifiedDirectory, name: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped: a number is read when it is first used.

    Raises:
        CorruptError: If it is something else.
    """
    from safetensors.torch import load_file

    with directory.opened(name) as path:
        try:
            return load_file(path)
        except SafetensorError as error:
            raise _no_safetensors(directory, name, error) from None


def names_of(directory: VerifiedDirectory, name: str) -> frozenset[str]:
    """Names of the tensors in a safetensors file; reads its header alone, without torch.

    Raises:
        CorruptError: If it is something else.
    """
    with directory.opened(name) as path:
        try:
            with safe_open(path, framework="np") as file:
                return frozenset(file.keys())
        except SafetensorError as error:
            raise _no_safetensors(directory, name, error) from None


def forms_of(directory: VerifiedDirectory, name: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file without memory, on the device ``meta``; reads its header alone.

    Raises:
        CorruptError: If it is something else.
    """
    import torch

    names_of(directory, name)  # refuses what is no such file
    with directory.opened(name) as path, path.open("rb") as file:
        extents = _extents(file)
    return {one: torch.empty(at.shape, dtype=at.dtype, device="meta") for one, at in extents.items()}


def read_into(directory: VerifiedDirectory, name: str, targets: Mapping[str, Tensor]) -> None:
    """Read tensors of a safetensors file into memory that is there, so that none of them is held twice.

    Read, not mapped: what is mapped counts as this process's memory for as long as one tensor of the file is there,
    and could be another file's bytes by the time it is looked at.

    Args:
        directory: The file's.
        name: Its name.
        targets: Tensors on the CPU by name, of the stored shapes; numbers of another kind are converted.

    Raises:
        CorruptError: If a number is not finite.
    """
    with directory.opened(name) as path, path.open("rb") as file:
        extents = _extents(file)
        for one in sorted(targets, key=lambda one: extents[one].start):
            target = targets[one]
            # A router of the user's own may hold a matrix transposed.
            place = target if target.is_contiguous() else target.new_empty(target.shape)
            file.seek(extents[one].start)
            try:
                fill(place, file, extents[one].dtype)
            except CorruptError as error:
                raise CorruptError(f"{directory.path / name}: tensor {one} {error}") from None
            if place is not target:
                target.copy_(place)


def fill(target: Tensor, file: BinaryIO, dtype: torch.dtype) -> None:
    """Read the next numbers of a file into a contiguous tensor on the CPU, some at a time.

    Raises:
        CorruptError: If one is not finite, or the file ends before.
    """
    import torch

    for part in target.view(-1).split(CHUNK):
        stored = part if part.dtype == dtype else part.new_empty(len(part), dtype=dtype)
        into = stored.view(torch.uint8).numpy()  # raw bytes: NumPy has no bfloat16
        if file.readinto(into.data) != into.size:  # type: ignore[attr-defined]
            raise CorruptError("became shorter while it was read.")
        if stored is not part:
            part.copy_(stored)
        # Numbers of 8 bits have no products.
        numbers = part.float() if part.is_floating_point() and part.element_size() == 1 else part
        # Zero times what is not finite is NaN: a tenth of the time of `isfinite`.
        if numbers.is_floating_point() and not float((numbers * 0).sum()) == 0:
            raise CorruptError("holds a number that is not finite.")


def write_hashed(tensors: Mapping[str, Tensor], path: Path) -> Entry:
    """Write a safetensors file, and hash it as it is written.

    Neither holds Python's lock, so that a thread which writes leaves the others their time.

    Args:
        tensors: Contiguous, on the CPU.
        path: The file; there is none yet.
    """
    import torch

    kinds = {getattr(torch, word): kind for kind, word in DTYPES.items()}
    # The largest numbers first: then each tensor begins at a multiple of its numbers' size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, end = {}, 0
    for name, one in ordered:
        header[name] = {"dtype": kinds[one.dtype], "shape": [*one.shape], "data_offsets": [end, end + one.nbytes]}
        end += one.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _PREFIX)
    hashed = hashlib.sha256()
    parts = (memoryview(len(text).to_bytes(_PREFIX, "little") + text), *(_raw(one) for _, one in ordered))
    with path.open("xb") as file:
        for data in parts:
            for start in range(0, len(data), WRITTEN_BYTES):
                part = data[start : start + WRITTEN_BYTES]
                file.write(part)
                hashed.update(part)
        return Entry(file.tell(), hashed.hexdigest())


def _raw(tensor: Tensor) -> memoryview:
    import torch

    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _extents(file: BinaryIO) -> dict[str, _Extent]:
    """By name; of a file whose header safetensors itself has accepted."""
    import torch

    length = int.from_bytes(file.read(_PREFIX), "little")
    header: dict[str, dict[str, list[int]]] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, one in header.items():
        if (kind := str(one["dtype"])) not in DTYPES:
            raise CorruptError(f"tensor {name} holds numbers of the kind {kind}, which no model of ours does.")
        start = _PREFIX + length + one["data_offsets"][0]
        found[name] = _Extent(getattr(torch, DTYPES[kind]), tuple(one["shape"]), start)
    return found


def _no_safetensors(directory: VerifiedDirectory, name: str, error: SafetensorError) -> CorruptError:
    return CorruptError(f"{directory.path / name}: not a safetensors file ({error}).")
