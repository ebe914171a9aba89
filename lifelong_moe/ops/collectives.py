"""Messages among the processes that take a step together: sums, and rows on the way to experts and back.

Legend: N rows handed to experts, D model width, E experts of a layer, R ranks that share them, L experts of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from lifelong_moe.ops.dispatch import inverse_permutation, permute
from lifelong_moe.ops.expert_mlp import autocast


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


@dataclass(frozen=True)
class ExpertPlacement:
    """The ranks that hold a layer's experts: expert i of each generation is on rank ``i % R``.

    So striped, each generation is even work. Contiguous, the newest one's text would be work for few ranks.
    """

    group: dist.ProcessGroup
    """The R ranks."""
    experts_RL: Tensor
    """Index in the layer of each rank's experts, ascending, int64 ``(R, L)``."""

    @classmethod
    def of(cls, generations: Sequence[range], group: dist.ProcessGroup, device: torch.device) -> ExpertPlacement:
        """Stripe generations of experts, whose numbers R divides."""
        ranks = group.size()
        return cls(
            group, torch.tensor([[i for g in generations for i in g[r::ranks]] for r in range(ranks)]).to(device)
        )


def parallel_experts(
    rows_ND: Tensor,
    counts_E: Tensor,
    placement: ExpertPlacement,
    experts: Callable[[Tensor, Tensor], Tensor],
    first: int = 0,
) -> Tensor:
    """Each row through its expert, on the rank that has it. All ranks of the group must call this together.

    Args:
        rows_ND: This rank's rows, sorted by expert ``(N, D)``.
        counts_E: Rows of each expert by index, int64 ``(E,)``; they sum to N.
        placement: Where the experts are.
        experts: This rank's, from rows sorted by expert and counts ``(L,)`` to outputs; what ``rows_ND`` and
            ``counts_E`` would be given to if this rank had all experts.
        first: The expert of this rank whose rows come first; the others follow, and those before it come last.

    Returns:
        ``(N, D)``. Gradients of this rank's experts are sums over the losses of all ranks of the group.
    """
    ranks, num_here = placement.experts_RL.shape
    # In the type that experts compute in, whether or not a rank has rows for any.
    rows_ND = autocast(rows_ND)
    # All ranks must call the backward pass, too, though a rank's own text may train nothing below this layer.
    if torch.is_grad_enabled() and not rows_ND.requires_grad:
        rows_ND = rows_ND.detach().requires_grad_()
    sent_RL = counts_E[placement.experts_RL]
    got_RL = torch.empty_like(sent_RL)
    dist.all_to_all_single(got_RL, sent_RL, group=placement.group)
    # The host waits for the device here, and nowhere else.
    sent, got = torch.stack([sent_RL.sum(dim=1), got_RL.sum(dim=1)]).tolist()
    # From the order of experts to that of ranks; what arrives is ordered by rank, then by expert.
    there_N = moved_blocks(counts_E, placement.experts_RL.flatten(), len(rows_ND))
    by_expert_B = torch.arange(got_RL.numel(), device=got_RL.device).view(ranks, num_here).roll(-first, dims=1).t()
    here_M = moved_blocks(got_RL.flatten(), by_expert_B.flatten(), sum(got))
    back_N, back_M = inverse_permutation(there_N), inverse_permutation(here_M)
    arrived_MD = all_to_all_single_autograd(permute(rows_ND, there_N, back_N), got, sent, placement.group)
    out_MD = experts(permute(arrived_MD, here_M, back_M), got_RL.sum(dim=0))
    returned_ND = all_to_all_single_autograd(permute(out_MD, back_M, here_M), sent, got, placement.group)
    return permute(returned_ND, back_N, there_N)


def moved_blocks(sizes_B: Tensor, order_B: Tensor, num_rows: int) -> Tensor:
    """The permutation ``(N,)`` that brings blocks of rows into another order, without asking the device.

    Args:
        sizes_B: Rows of each block, int64.
        order_B: The blocks in their new order.
        num_rows: N, the sum of the sizes.
    """
    moved_B, starts_B = sizes_B[order_B], sizes_B.cumsum(0) - sizes_B
    shift_B = starts_B[order_B] - (moved_B.cumsum(0) - moved_B)
    shift_N = shift_B.repeat_interleave(moved_B, output_size=num_rows)
    return torch.arange(num_rows, device=sizes_B.device) + shift_N
