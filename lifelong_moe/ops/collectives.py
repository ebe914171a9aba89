"""Sums over the processes that take a step together. With one process they do nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Sum(torch.autograd.Function):
    """A sum over all ranks, on which every rank's loss depends in the same way."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Each rank passes on what its own values did to the common loss, and DDP averages over ranks what must be
        # added up.
        return grad * dist.get_world_size()


def num_ranks() -> int:
    """Processes that take a step together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over all ranks, the same bits on each; the values themselves where there is one process.

    Gradients are right once DDP has averaged them over the ranks, for losses that are the same on each.
    """
    if not dist.is_initialized():
        return values
    total: Tensor = _Sum.apply(values)
    return total


def sums_over_ranks(*values: Tensor) -> tuple[Tensor, ...]:
    """:func:`sum_over_ranks` of several tensors of one dtype, in one message."""
    if not dist.is_initialized():
        return values
    # One message: for sums this small latency is the whole cost.
    total = sum_over_ranks(torch.cat([value.flatten() for value in values]))
    parts = total.split([value.numel() for value in values])
    return tuple(part.view_as(value) for part, value in zip(parts, values, strict=True))
