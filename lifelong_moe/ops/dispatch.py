"""Reorder tokens by expert and sum the experts' outputs back: a fast way, and a readable one to check it against.

Legend: T tokens, K experts chosen per token, N = rows handed to experts (T·K when every token chooses K),
E experts, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


def sort_by_expert(expert_idx_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Order assignments by expert, stably.

    Args:
        expert_idx_N: Expert of each assignment, int64 ``(N,)``.
        num_experts: E.

    Returns:
        ``order_N``, the assignments sorted by expert and then by position, and ``counts_E``, int64 assignments
        per expert. Nothing is asked of the device.
    """
    sorted_N, order_N = torch.sort(expert_idx_N, stable=True)
    # Not bincount: on CUDA it reads the largest value back, and the host would wait for the device.
    ends_E = torch.searchsorted(sorted_N, torch.arange(num_experts, device=sorted_N.device), right=True)
    return order_N, torch.diff(ends_E, prepend=ends_E.new_zeros(1))


@dataclass(frozen=True)
class ExpertOrder:
    """Choices of tokens sorted by expert: the one order of dispatch, experts and combine."""

    order_N: Tensor
    """Choices ``token * K + choice``, int64 ``(N,)``; without those that are none."""
    counts_E: Tensor
    """Choices of each expert by index, int64 ``(E,)``."""

    @classmethod
    def of(cls, expert_ids_TK: Tensor, num_experts: int, *, ragged: bool) -> ExpertOrder:
        """Sort, from expert 0 on; where tokens use different numbers of experts, -1 is none."""
        ids_N = expert_ids_TK.reshape(-1)
        if not ragged:
            return cls(*sort_by_expert(ids_N, num_experts))
        # The number of choices left is known to the device alone, so this waits for it.
        kept_N = (ids_N >= 0).nonzero().squeeze(1)
        order_N, counts_E = sort_by_expert(ids_N[kept_N], num_experts)
        return cls(kept_N[order_N], counts_E)

    def starting_at(self, expert: int) -> ExpertOrder:
        """The same order from this expert on and around."""
        # Where an expert's slice begins is known to the device alone, and need not be known to anyone else.
        places_N = torch.arange(len(self.order_N), device=self.order_N.device) + self.counts_E[:expert].sum()
        return ExpertOrder(self.order_N[places_N % max(1, len(places_N))], self.counts_E)

    @cached_property
    def inverse_N(self) -> Tensor:  # noqa: N802 - named as the tensor that it is
        """The permutation that undoes the order of N = T·K choices, int64 ``(N,)``."""
        return inverse_permutation(self.order_N)


class _GatherTokens(torch.autograd.Function):
    """``x[order // K]``, whose backward gathers and sums; autograd's own would scatter with ``index_add``."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.top_k = top_k
        return x_TD.index_select(0, order_N // top_k if top_k > 1 else order_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_N,) = ctx.saved_tensors
        grad_TKD = grad_ND.index_select(0, inverse_N).view(-1, ctx.top_k, grad_ND.shape[-1])
        return grad_TKD.sum(dim=1), None, None, None


class _WeightAndSum(torch.autograd.Function):
    """Gather and add one choice of every token at a time, so that ``(T, K, D)`` never exists."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, weights_TK: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(rows_ND, weights_TK, order_N, inverse_N)
        # shape: (K, T), the row of each token's k-th choice
        where_KT = inverse_N.view(weights_TK.shape).t()
        out_TD = rows_ND.index_select(0, where_KT[0]).mul_(weights_TK[:, :1])
        for k in range(1, weights_TK.shape[1]):
            out_TD.addcmul_(rows_ND.index_select(0, where_KT[k]), weights_TK[:, k : k + 1])
        return out_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        rows_ND, weights_TK, order_N, inverse_N = ctx.saved_tensors
        grad_ND = grad_TD.index_select(0, order_N // weights_TK.shape[1])
        grad_weights_TK = None
        if ctx.needs_input_grad[1]:
            grad_weights_TK = (grad_ND * rows_ND).sum(dim=1).index_select(0, inverse_N).view_as(weights_TK)
        # In place, and only after the weights' gradient, which needs the unweighted rows' gradient.
        grad_ND.mul_(weights_TK.flatten().index_select(0, order_N).unsqueeze(1))
        return grad_ND, grad_weights_TK, None, None


class _Permute(torch.autograd.Function):
    """``rows[permutation]``; the backward gathers by the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, permutation_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        return rows_ND.index_select(0, permutation_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_N,) = ctx.saved_tensors
        return grad_ND.index_select(0, inverse_N), None, None


def inverse_permutation(order_N: Tensor) -> Tensor:
    """The permutation that undoes ``order_N``, int64 ``(N,)``."""
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    return inverse_N


def dispatch(x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, top_k: int) -> Tensor:
    """Rows for the experts, sorted by expert.

    Args:
        x_TD: Tokens ``(T, D)``.
        order_N: From :func:`sort_by_expert` over the flattened ``(T, K)`` choices, so that ``order // K`` is a token.
        inverse_N: Its inverse.
        top_k: K.

    Returns:
        ``(T·K, D)``; deterministic in the backward pass too.
    """
    return _GatherTokens.apply(x_TD, order_N, inverse_N, top_k)


def combine(rows_ND: Tensor, weights_TK: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
    """Weighted sum of each token's expert outputs, ``(T, D)``; the inverse of :func:`dispatch`."""
    return _WeightAndSum.apply(rows_ND, weights_TK.to(rows_ND.dtype), order_N, inverse_N)


def permute(rows_ND: Tensor, permutation_N: Tensor, inverse_N: Tensor) -> Tensor:
    """``rows[permutation]`` with a backward pass that gathers by ``inverse_N``, the permutation's inverse."""
    return _Permute.apply(rows_ND, permutation_N, inverse_N)


def mixture_readable(
    x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, experts: Sequence[Callable[[Tensor], Tensor]]
) -> Tensor:
    """What dispatch, experts and combine compute together, one token at a time.

    Args:
        x_TD: Tokens ``(T, D)``.
        expert_ids_TK: Chosen experts, int64 ``(T, K)``.
        weights_TK: Gate weights ``(T, K)``.
        experts: One function from ``(n, D)`` to ``(n, D)`` each.

    Returns:
        ``(T, D)``. The oracle of the fast path; slow.
    """
    out = []
    for x_D, expert_ids_K, weights_K in zip(x_TD, expert_ids_TK.tolist(), weights_TK, strict=True):
        outputs = [w * experts[e](x_D.unsqueeze(0)).squeeze(0) for e, w in zip(expert_ids_K, weights_K, strict=True)]
        out.append(torch.stack(outputs).sum(dim=0))
    return torch.stack(out) if out else x_TD.new_zeros(x_TD.shape)
