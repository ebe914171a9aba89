"""Sums over the processes that take a step together. With one process they do nothing."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over all ranks, the same bits on each; the values themselves where there is one process."""
    if not dist.is_initialized():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total
