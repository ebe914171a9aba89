"""Tensors of which each of several processes has a part: to write its own, and to read what any number have written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Held:
    """What one process holds along the dimension that is divided: every ``step``-th index from ``begin`` on."""

    rank: int
    begin: int
    step: int = 1


@dataclass(frozen=True)
class Layout:
    """How a tensor is divided."""

    name: str
    """Of each part, in the file of its process."""
    shape: tuple[int, ...]
    """Of the whole."""
    dim: int
    """The dimension that is divided."""
    held: tuple[Held, ...]
    """Each index is in one of these."""


@dataclass(frozen=True)
class Part:
    """A tensor as one of several processes has it."""

    layout: Layout
    """The same in each of them."""
    here: Tensor | None
    """What this process writes; None if others write all of it."""


@dataclass(frozen=True)
class Divided:
    """A stored tensor, maybe in several parts, of which a number is read when it is asked for."""

    shape: tuple[int, ...]
    dim: int
    """The dimension that is divided."""
    parts: Sequence[tuple[range, Tensor]]
    """Indices along it, and what is there."""

    @classmethod
    def of(cls, value: Any) -> Divided:
        """Also of a tensor that is not divided.

        Raises:
            TypeError: If it is something else.
        """
        if isinstance(value, Tensor):
            return cls(tuple(value.shape), 0, [(range(len(value) if value.dim() else 1), value)])
        if not isinstance(value, cls):
            raise TypeError(f"{type(value).__name__} is no tensor")
        return value

    def whole(self) -> Tensor:
        """All of it, as a new tensor."""
        return self.taken(self.dim, range(self.shape[self.dim]))

    def taken(self, dim: int, indices: range) -> Tensor:
        """What is at some indices of a dimension, as a new tensor; no other number is read."""
        shape = [*self.shape]
        shape[dim] = len(indices)
        found = self.parts[0][1].new_empty(shape)
        for there, part in self.parts:
            if dim == self.dim:
                both = [index for index in indices if index in there]
                here, mine = (torch.tensor([one.index(i) for i in both], dtype=torch.int64) for one in (indices, there))
                found.index_copy_(dim, here, part.index_select(dim, mine))
            else:
                found[_at(self.dim, there)] = part[_at(dim, indices)]
        return found


def parts_in(value: Any) -> Iterator[Part]:
    """The parts within lists and mappings."""
    if isinstance(value, Part):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from parts_in(one)


def put_together(layout: Layout, files: Mapping[int, dict[str, Tensor]]) -> Divided:
    """A tensor from its parts.

    Args:
        layout: As it is stored, maybe by somebody else.
        files: By rank, the tensors that it has written. A part is taken out: it belongs to one tensor, or a short text
            could ask for more memory than there are bytes in the files.

    Raises:
        KeyError: If there is no such part.
        ValueError: If the parts are not those of one tensor of this shape, each index once.
    """
    name, shape, dim = layout.name, layout.shape, layout.dim
    if not 0 <= dim < len(shape) or not layout.held:
        raise ValueError(f"{name} is divided along dimension {dim} of {len(shape)}, in {len(layout.held)} parts")
    parts = list[tuple[range, Tensor]]()
    for held in layout.held:
        part = files[held.rank].pop(name)
        # No part is empty, so that a dimension is no longer than the numbers in the files.
        if not part.numel() or (*part.shape[:dim], shape[dim], *part.shape[dim + 1 :]) != shape:
            raise ValueError(f"{name} of rank {held.rank} is of shape {tuple(part.shape)}, in a whole of {shape}")
        if held.begin < 0 or held.step < 1 or held.begin + (part.shape[dim] - 1) * held.step >= shape[dim]:
            raise ValueError(f"{name} of rank {held.rank} lies outside of the whole")
        parts.append((range(held.begin, held.begin + part.shape[dim] * held.step, held.step), part))
    if len({part.dtype for _, part in parts}) > 1 or sum(len(there) for there, _ in parts) != shape[dim]:
        raise ValueError(f"{name} has parts of several kinds, or too few or too many")
    # As many as there are, and none twice: all of them.
    seen = bytearray(shape[dim])
    for there, _ in parts:
        place = slice(there.start, there.stop, there.step)
        if any(seen[place]):
            raise ValueError(f"{name} has parts that overlap")
        seen[place] = b"\1" * len(there)
    return Divided(shape, dim, parts)


def whole(value: Any) -> Any:
    """The same lists and mappings with whole tensors."""
    if isinstance(value, Divided):
        return value.whole()
    if isinstance(value, dict):
        return {key: whole(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(one) for one in value)
    return value


def _at(dim: int, indices: range) -> tuple[slice, ...]:
    return (*[slice(None)] * dim, slice(indices.start, indices.stop, indices.step))
