"""Experts that are a shared, frozen feed-forward network and a low-rank change of each of its matrices.

The products with shared matrices are one for all experts in a row that share them; whole matrices of each expert, which
:func:`changed` makes, are the readable reference.

Legend: N rows handed to experts, E experts, D model width, F expert width, G = 2·F where the activation is gated, F
where not, R rank, P parts of a matrix with a change each (gate and up projection: 2, else 1), I columns, O rows.

Source:
    LoRA (arXiv:2106.09685), without its scale. Experts that change one pretrained network: MixLoRA (arXiv:2404.15159).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong_moe.ops.expert_mlp import NONLINEARITIES, Nonlinearity, Weight, autocast, multiply_transposed, whole
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
    device, act = rows_ND.device.type, NONLINEARITIES[activation]
    runs = _runs(counts, bases)
    matrices = [shared[base][which] for which in (0, 1) for base, _ in runs]
    # What is made on use is no tensor, and autograd need not know of it.
    tensors = [*changes[0], *changes[1], *(m if isinstance(m, Tensor) else None for m in matrices)]
    made = [None if isinstance(m, Tensor) else m for m in matrices]
    layout = _Layout(counts, [rows for _, rows in runs], made, act)
    # As in `slices`: decoding has too few rows for the cost of either.
    if not (torch.is_grad_enabled() or torch.is_autocast_enabled(device)):
        return _forward(rows_ND, layout, tensors)[-1]
    rows_ND = autocast(rows_ND)
    with torch.autocast(device, enabled=False):
        return _LowRank.apply(rows_ND, layout, *tensors)


def _runs(counts: Sequence[int], bases: Sequence[int]) -> list[tuple[int, slice]]:
    """Shared networks, and the rows of the experts in a row that change them; no network without rows."""
    runs, start = [], 0
    for base, run in groupby(zip(bases, counts, strict=True), lambda pair: pair[0]):
        stop = start + sum(count for _, count in run)
        if stop > start:
            runs.append((base, slice(start, stop)))
        start = stop
    return runs


class _Layout(NamedTuple):
    """Which rows go where."""

    counts: Sequence[int]
    rows: Sequence[slice]
    """Of each shared network."""
    made: Sequence[Callable[[], Tensor] | None]
    """Of the matrices into the networks, then of those out of them: a function where they are made on use."""
    act: Nonlinearity

    def products(self, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[_Product, _Product]:
        """With the matrices into experts and with those out of them."""
        factors, given = tensors[:4], zip(tensors[4:], self.made, strict=True)
        weights: list[Any] = [made if tensor is None else tensor.to(dtype) for tensor, made in given]
        into, down = weights[: len(self.rows)], weights[len(self.rows) :]
        a, b, c, d = (factor.to(dtype) for factor in factors if factor is not None)
        shared = [[*zip(self.rows, which, strict=True)] for which in (into, down)]
        return _Product(self.counts, shared[0], Change(a, b)), _Product(self.counts, shared[1], Change(c, d))


class _Product(NamedTuple):
    """The products of rows sorted by expert with one changed matrix of each expert."""

    counts: Sequence[int]
    shared: Sequence[tuple[slice, Weight]]
    change: Change

    def forward(self, x_NI: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``x (W + b a)^T``, ``(N, O)``, and ``x a^T`` of each expert, ``(n, P·R)``."""
        out_NO, lows = x_NI.new_empty(len(x_NI), self.change.b_EOR.shape[1]), []
        for rows, weight in self.shared:
            multiply_transposed(x_NI[rows], whole(weight, x_NI.dtype), out_NO[rows])
        for x, out, a_PI, b_OR in zip(*self._each(x_NI, out_NO), *self.change, strict=True):
            lows.append(x @ a_PI.t())
            # Added to what the shared matrix gave: nothing as large is made beside it.
            for out_part, low_nR, b_part in _parts(out, lows[-1], b_OR):
                out_part.addmm_(low_nR, b_part.t())
        return out_NO, lows

    def low_gradients(self, grad_NO: Tensor) -> list[Tensor]:
        """Gradients of each expert's low products."""
        lows = []
        for grad, a_PI, b_OR in zip(*self._each(grad_NO), *self.change, strict=True):
            lows.append(grad.new_empty(len(grad), len(a_PI)))
            for grad_part, low_nR, b_part in _parts(grad, lows[-1], b_OR):
                torch.mm(grad_part, b_part, out=low_nR)
        return lows

    def input_gradient(self, grad_NO: Tensor, grad_lows: Sequence[Tensor]) -> Tensor:
        """Gradient of the rows, ``(N, I)``."""
        grad_NI = grad_NO.new_empty(len(grad_NO), self.change.a_EPI.shape[2])
        for rows, weight in self.shared:
            torch.mm(grad_NO[rows], whole(weight, grad_NO.dtype), out=grad_NI[rows])
        for grad, low_nP, a_PI in zip(*self._each(grad_NI), grad_lows, self.change.a_EPI, strict=True):
            grad.addmm_(low_nP, a_PI)
        return grad_NI

    def change_gradients(
        self, x_NI: Tensor, lows: Sequence[Tensor], grad_NO: Tensor, grad_lows: Sequence[Tensor]
    ) -> Change:
        """Gradients of both factors; zero for an expert without rows."""
        grads = Change(*(torch.empty_like(factor) for factor in self.change))
        parts = zip(*self._each(x_NI, grad_NO), lows, grad_lows, *grads, strict=True)
        for x, grad, low_nP, grad_low_nP, grad_a, grad_b in parts:
            torch.mm(grad_low_nP.t(), x, out=grad_a)
            for grad_part, low_nR, grad_b_part in _parts(grad, low_nP, grad_b):
                torch.mm(grad_part.t(), low_nR, out=grad_b_part)
        return grads

    def shared_gradients(self, x_NI: Tensor, grad_NO: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of the shared matrices that train."""
        pairs = zip(self.shared, needed, strict=True)
        return [grad_NO[rows].t() @ x_NI[rows] if is_needed else None for (rows, _), is_needed in pairs]

    def _each(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Each expert's rows of each tensor."""
        return [tensor.split(self.counts) for tensor in tensors]


def _parts(out_NO: Tensor, low_NP: Tensor, b_OR: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Columns of the outputs and of the low products, and rows of the second factor, that belong together."""
    num = low_NP.shape[1] // b_OR.shape[1]
    return zip(out_NO.chunk(num, dim=1), low_NP.chunk(num, dim=1), b_OR.chunk(num), strict=True)


def _forward(
    rows_ND: Tensor, layout: _Layout, tensors: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Pre-activations ``(N, G)``, low products of both matrices, and outputs ``(N, D)``."""
    into, down = layout.products(tensors, rows_ND.dtype)
    pre_NG, into_lows = into.forward(rows_ND)
    out_ND, down_lows = down.forward(layout.act.hidden(pre_NG)[0])
    return pre_NG, into_lows, down_lows, out_ND


class _LowRank(torch.autograd.Function):
    """Keeps rows, pre-activations and low products. Hidden units, which autograd would keep twice, are made again."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, layout: _Layout, *tensors: Tensor | None) -> Tensor:
        pre_NG, into_lows, down_lows, out_ND = _forward(rows_ND, layout, tensors)
        ctx.save_for_backward(rows_ND, pre_NG, *into_lows, *down_lows, *tensors)
        ctx.layout = layout
        return out_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Any, ...]:
        layout, num, (rows_ND, pre_NG, *rest) = ctx.layout, len(ctx.layout.counts), ctx.saved_tensors
        into_lows, down_lows, tensors = rest[:num], rest[num : 2 * num], rest[2 * num :]
        into, down = layout.products(tensors, rows_ND.dtype)
        grad_ND, num_shared = grad_ND.contiguous(), len(layout.rows)
        needs_into, needs_down = ctx.needs_input_grad[6 : 6 + num_shared], ctx.needs_input_grad[6 + num_shared :]
        grad_down_lows = down.low_gradients(grad_ND)
        grad_NF = down.input_gradient(grad_ND, grad_down_lows)
        grad_NG, hidden_NF = layout.act.hidden_backward(grad_NF, pre_NG, layout.act.hidden(pre_NG)[1])
        grad_into_lows = into.low_gradients(grad_NG)
        # The lowest layer's rows need none where all below is frozen.
        grad_rows_ND = into.input_gradient(grad_NG, grad_into_lows) if ctx.needs_input_grad[0] else None
        # Factors of a frozen generation, which old text may still reach, need none.
        grads: list[Tensor | None] = [None] * 4
        if any(ctx.needs_input_grad[2:6]):
            grads = [
                *into.change_gradients(rows_ND, into_lows, grad_NG, grad_into_lows),
                *down.change_gradients(hidden_NF, down_lows, grad_ND, grad_down_lows),
            ]
        grads += [
            *into.shared_gradients(rows_ND, grad_NG, needs_into),
            *down.shared_gradients(hidden_NF, grad_ND, needs_down),
        ]
        cast = (None if g is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True))
        return (grad_rows_ND, None, *cast)


def product(x_NI: Tensor, weight: Weight) -> Tensor:
    """``x W^T``; a frozen matrix that is made on use is made anew for the backward pass, and not kept until then."""
    return linear(x_NI, weight) if isinstance(weight, Tensor) else _Made.apply(x_NI, weight)


class _Made(torch.autograd.Function):
    """A product with a frozen matrix that is made on use, in both passes."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        ctx.weight = weight
        return F.linear(x_NI, weight().to(x_NI.dtype))

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, None]:
        return grad_NO @ ctx.weight().to(grad_NO.dtype), None
