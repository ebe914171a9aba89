"""Experts that are a shared, frozen feed-forward network and a low-rank change of each of its matrices.

The products with shared matrices are one for all experts in a row that share them; whole matrices of each expert, which
:func:`changed` makes, are the readable reference.

Legend: N rows handed to experts, E experts, D model width, F expert width, G = 2·F where the activation is gated, F
where not, R rank, P parts of a matrix with a change each (gate and up projection: 2, else 1), I columns, O rows.

Source:
    LoRA (arXiv:2106.09685), without its scale. Experts that change one pretrained network: MixLoRA (arXiv:2404.15159).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong_moe.ops.expert_mlp import NONLINEARITIES, Weight, autocast
from lifelong_moe.ops.few_rows import linear


class Change(NamedTuple):
    """Changes ``b a`` of one of the matrices ``(O, I)`` of each expert."""

    a_EPI: Tensor
    """``(E, P·R, I)``, the parts below each other."""
    b_EOR: Tensor
    """``(E, O, R)``; a part's rows are those of the matrix that it changes."""


def changed(base_OI: Tensor, a_PI: Tensor, b_OR: Tensor) -> Tensor:
    """One expert's whole matrix ``(O, I)``: the shared one and its change."""
    parts = len(a_PI) // b_OR.shape[1]
    return base_OI + torch.cat([b @ a for a, b in zip(a_PI.chunk(parts), b_OR.chunk(parts), strict=True)])


def low_rank(
    rows_ND: Tensor,
    counts: Sequence[int],
    bases: Sequence[int],
    shared: Mapping[int, tuple[Weight, Weight]],
    changes: tuple[Change, Change],
    activation: str,
) -> Tensor:
    """Each expert's slice through the network that it shares, changed by its own factors.

    Args:
        rows_ND: Rows sorted by expert, ``(N, D)``.
        counts: Rows of each expert; they sum to N.
        bases: Which network each expert changes. Experts of one network that stand in a row share its products.
        shared: Matrices into and out of each of these networks, ``(G, D)`` and ``(D, F)``. What is made on use must not
            train; it is made once more for the backward pass.
        changes: Of both matrices.
        activation: A name in ``NONLINEARITIES``.

    Returns:
        ``(N, D)``. An expert without rows gets gradients of zero.
    """
    rows_ND, (into, down) = autocast(rows_ND), changes
    runs = [(base, sum(count for _, count in run)) for base, run in groupby(zip(bases, counts, strict=True), _base)]

    def through(x: Tensor, which: int, change: Change) -> Tensor:
        parts = zip(x.split([count for _, count in runs]), runs, strict=True)
        whole = _one([product(part, shared[base][which]) for part, (base, _) in parts])
        return whole + _one([_change(part, *one) for part, *one in zip(x.split(counts), *_each(change), strict=True)])

    hidden_NF, _ = NONLINEARITIES[activation].hidden(through(rows_ND, 0, into))
    return through(hidden_NF, 1, down)


def _base(pair: tuple[int, int]) -> int:
    return pair[0]


def _one(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def _each(change: Change) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    # Not indexed: each index would have a gradient of the size of all experts, most of it zeros.
    return change.a_EPI.unbind(), change.b_EOR.unbind()


def _change(x_NI: Tensor, a_PI: Tensor, b_OR: Tensor) -> Tensor:
    """``x (b a)^T``, ``(N, O)``."""
    parts = len(a_PI) // b_OR.shape[1]
    low_NP = F.linear(x_NI, a_PI.to(x_NI.dtype))
    halves = zip(low_NP.chunk(parts, dim=1), b_OR.to(x_NI.dtype).chunk(parts), strict=True)
    found = [F.linear(low_NR, b) for low_NR, b in halves]
    return found[0] if parts == 1 else torch.cat(found, dim=1)


def product(x_NI: Tensor, weight: Weight) -> Tensor:
    """``x W^T``; a frozen matrix that is made on use is made anew for the backward pass, and not kept until then."""
    return linear(x_NI, weight.to(x_NI.dtype)) if isinstance(weight, Tensor) else _Made.apply(x_NI, weight)


class _Made(torch.autograd.Function):
    """A product with a frozen matrix that is made on use, in both passes."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        ctx.weight = weight
        return F.linear(x_NI, weight().to(x_NI.dtype))

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, None]:
        return grad_NO @ ctx.weight().to(grad_NO.dtype), None
