"""All experts of a layer on rows sorted by expert, two fast ways; calling each expert in turn is the readable one.

``slices`` (CPU) multiplies each expert's slice by that expert's own matrices, into one tensor, and keeps inputs,
pre-activations and the activation's values for the backward pass, where autograd would keep hidden units as well.
``grouped`` (CUDA) multiplies all slices in one kernel, whose borders stay on the device.

Legend: N rows handed to experts, E experts, A of them active, D model width, F expert width, G = 2·F where the
activation is gated, F where not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong_moe.ops.few_rows import are_few, matrix_first

aten = torch.ops.aten

Weight = Tensor | Callable[[], Tensor]
"""A matrix, or what makes one from the form in which it is held: whole for one product, never kept."""


@dataclass(frozen=True)
class Nonlinearity:
    """An activation and its derivative."""

    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    """From the gradient of the value, and the argument, to the argument's gradient."""
    gated: bool

    def hidden(self, pre_NG: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden units of pre-activations, and the activation's value, each ``(N, F)``; without a gate, the same."""
        if not self.gated:
            return (value_NF := self.value(pre_NG)), value_NF
        gate_NF, up_NF = pre_NG.chunk(2, dim=-1)
        value_NF = self.value(gate_NF)
        return value_NF * up_NF, value_NF

    def hidden_backward(self, grad_NF: Tensor, pre_NG: Tensor, value_NF: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of the pre-activations ``(N, G)``, and the hidden units again, which nothing has kept.

        ``grad_NF`` is used up.
        """
        if not self.gated:
            return self.backward(grad_NF, pre_NG), value_NF
        gate_NF, up_NF = pre_NG.chunk(2, dim=-1)
        grad_NG = torch.empty_like(pre_NG)
        grad_gate_NF, grad_up_NF = grad_NG.chunk(2, dim=-1)
        torch.mul(grad_NF, value_NF, out=grad_up_NF)
        grad_gate_NF.copy_(self.backward(grad_NF.mul_(up_NF), gate_NF))
        return grad_NG, value_NF * up_NF


def _gelu_tanh_backward(grad: Tensor, x: Tensor) -> Tensor:
    return aten.gelu_backward(grad, x, approximate="tanh")


NONLINEARITIES = {
    "swiglu": Nonlinearity(F.silu, aten.silu_backward, gated=True),
    "geglu": Nonlinearity(lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_backward, gated=True),
    "gelu": Nonlinearity(F.gelu, aten.gelu_backward, gated=False),
    "relu": Nonlinearity(F.relu, lambda grad, x: aten.threshold_backward(grad, x, 0), gated=False),
}


class _Slices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, counts: Sequence[int], act: Nonlinearity, *weights: Weight) -> Tensor:
        matrices = _cast(weights, rows_ND.dtype)
        pre_NG, out_ND, values = _forward(rows_ND, counts, act, matrices)
        ctx.save_for_backward(rows_ND, pre_NG, *(m if isinstance(m, Tensor) else None for m in matrices), *values)
        ctx.held = [None if isinstance(m, Tensor) else m for m in matrices]
        ctx.dtypes = [weight.dtype if isinstance(weight, Tensor) else None for weight in weights]
        ctx.counts, ctx.act = counts, act
        return out_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Any, ...]:
        rows_ND, pre_NG, *rest = ctx.saved_tensors
        kept, values = rest[: len(ctx.held)], rest[len(ctx.held) :]
        matrices = [m if held is None else held for m, held in zip(kept, ctx.held, strict=True)]
        needs = ctx.needs_input_grad
        grad_ND = grad_ND.contiguous()
        grad_rows_ND = torch.empty_like(rows_ND) if needs[0] else None
        grads: list[Tensor | None] = [
            torch.zeros_like(m, dtype=dtype) if need and not ctx.counts[i // 2] else None
            for i, (m, need, dtype) in enumerate(zip(matrices, needs[3:], ctx.dtypes, strict=True))
        ]
        for (i, part), value_NF in zip(_parts(ctx.counts), values, strict=True):
            first, second = 2 * i, 2 * i + 1
            if grad_rows_ND is None and not (needs[3 + first] or needs[3 + second]):
                continue
            grad_NG, hidden_NF = ctx.act.hidden_backward(
                grad_ND[part] @ _whole(matrices[second], rows_ND.dtype), pre_NG[part], value_NF
            )
            if needs[3 + second]:
                grads[second] = (grad_ND[part].t() @ hidden_NF).to(ctx.dtypes[second])
            if needs[3 + first]:
                grads[first] = (grad_NG.t() @ rows_ND[part]).to(ctx.dtypes[first])
            if grad_rows_ND is not None:
                torch.mm(grad_NG, _whole(matrices[first], rows_ND.dtype), out=grad_rows_ND[part])
        return grad_rows_ND, None, None, *grads


def _forward(
    rows_ND: Tensor, counts: Sequence[int], act: Nonlinearity, matrices: Sequence[Weight]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Pre-activations ``(N, G)``, outputs ``(N, D)``, and the activation's values of each expert that has rows."""
    values = []
    pre_NG, out_ND = rows_ND.new_empty(len(rows_ND), 0), rows_ND.new_empty(rows_ND.shape)
    for i, part in _parts(counts):
        into_GD = _whole(matrices[2 * i], rows_ND.dtype)
        if not pre_NG.shape[1]:  # known from the first that has rows
            pre_NG = rows_ND.new_empty(len(rows_ND), len(into_GD))
        _multiply(rows_ND[part], into_GD, pre_NG[part])
        hidden_NF, value_NF = act.hidden(pre_NG[part])
        _multiply(hidden_NF, _whole(matrices[2 * i + 1], rows_ND.dtype), out_ND[part])
        values.append(value_NF)
    return pre_NG, out_ND, values


def _cast(weights: Sequence[Weight], dtype: torch.dtype) -> list[Weight]:
    return [weight.to(dtype) if isinstance(weight, Tensor) else weight for weight in weights]


def _whole(weight: Weight, dtype: torch.dtype) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight().to(dtype)


def _multiply(rows: Tensor, matrix: Tensor, out: Tensor) -> None:
    """``rows matrix^T`` into ``out``."""
    if are_few(rows, matrix):
        out.copy_(matrix_first(rows, matrix))
    else:
        torch.mm(rows, matrix.t(), out=out)


def _parts(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """Each expert that has rows, and where they are."""
    parts, start = [], 0
    for i, count in enumerate(counts):
        if count:
            parts.append((i, slice(start, start + count)))
        start += count
    return parts


def slices(rows_ND: Tensor, counts: Sequence[int], weights: Sequence[Weight], activation: str) -> Tensor:
    """Each expert's slice through its own matrices.

    Args:
        rows_ND: Rows sorted by expert, ``(N, D)``.
        counts: Rows of each expert; they sum to N.
        weights: Of each expert the matrix into it ``(G, D)`` and the one out of it ``(D, F)``, one after the other.
            One that is made on use must not train; it is made once more for the backward pass.
        activation: A name in ``NONLINEARITIES``.

    Returns:
        ``(N, D)``. An expert without rows gets gradients of zero, and a frozen one none.
    """
    device = rows_ND.device.type
    if not (torch.is_grad_enabled() or torch.is_autocast_enabled(device)):  # in decoding what stands around costs most
        return _forward(rows_ND, counts, NONLINEARITIES[activation], _cast(weights, rows_ND.dtype))[1]
    rows_ND = _autocast(rows_ND)
    with torch.autocast(device, enabled=False):
        return _Slices.apply(rows_ND, counts, NONLINEARITIES[activation], *weights)


def _autocast(rows_ND: Tensor) -> Tensor:
    device = rows_ND.device.type
    return rows_ND.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else rows_ND


class _Grouped(torch.autograd.Function):
    """Experts that train stand first, so that a prefix of the borders is all that weight gradients need."""

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, ends_E: Tensor, in_EGD: Tensor, out_EDF: Tensor, act: Nonlinearity, *active: Tensor
    ) -> Tensor:
        pre_NG = F.grouped_mm(rows_ND, in_EGD.transpose(1, 2), offs=ends_E)
        hidden_NF, value_NF = act.hidden(pre_NG)
        out_ND = F.grouped_mm(hidden_NF, out_EDF.transpose(1, 2), offs=ends_E)
        ctx.save_for_backward(rows_ND, pre_NG, value_NF, ends_E, in_EGD, out_EDF)
        ctx.act, ctx.dtypes = act, [weight.dtype for weight in active]
        return out_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Any, ...]:
        rows_ND, pre_NG, value_NF, ends_E, in_EGD, out_EDF = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()
        grad_NF = F.grouped_mm(grad_ND, out_EDF, offs=ends_E)
        grad_NG, hidden_NF = ctx.act.hidden_backward(grad_NF, pre_NG, value_NF)
        grad_rows = F.grouped_mm(grad_NG, in_EGD, offs=ends_E) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = []
        if ctx.dtypes:
            ends_A, active = ends_E[: len(ctx.dtypes) // 2].contiguous(), len(ctx.dtypes) // 2
            for start, product in ((5, (grad_NG.t(), rows_ND)), (5 + active, (grad_ND.t(), hidden_NF))):
                wanted = any(ctx.needs_input_grad[start : start + active])
                grads += F.grouped_mm(*product, offs=ends_A).unbind() if wanted else [None] * active
        cast = (None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True))
        return (grad_rows, None, None, None, None, *cast)


def grouped(
    rows_ND: Tensor, counts_E: Tensor, ins: Sequence[Tensor], outs: Sequence[Tensor], active: int, activation: str
) -> Tensor:
    """Each expert's slice in one kernel a matrix; the host never learns where slices end.

    Args:
        rows_ND: Rows sorted by expert, ``(N, D)``; on CUDA in bfloat16, unless the kernel is to ask after all.
        counts_E: Rows of each expert, int64; they sum to N.
        ins: Of each expert the matrix into it ``(G, D)``, those that train first. They are moved into one buffer, once.
        outs: The matrix out of it ``(D, F)``.
        active: How many train (A).
        activation: A name in ``NONLINEARITIES``.

    Returns:
        ``(N, D)``. Weight gradients exist for active experts only, and are views of one tensor.
    """
    rows_ND, ends_E = _autocast(rows_ND), counts_E.cumsum(0).to(torch.int32)
    with torch.autocast(rows_ND.device.type, enabled=False):
        in_EGD, out_EDF = (in_a_row(weights).to(rows_ND.dtype) for weights in (ins, outs))
        act, trained = NONLINEARITIES[activation], (*ins[:active], *outs[:active])
        return _Grouped.apply(rows_ND, ends_E, in_EGD, out_EDF, act, *trained)


@torch.no_grad()
def in_a_row(weights: Sequence[Tensor]) -> Tensor:
    """Matrices of one shape as one tensor ``(E, ...)`` without a copy: where they do not stand in one buffer, in this
    order, they are moved there, and stay the same Parameters."""
    first, size = weights[0], weights[0].numel()
    base, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    stands = all(
        w.untyped_storage().data_ptr() == base and w.storage_offset() == offset + i * size and w.is_contiguous()
        for i, w in enumerate(weights)
    )
    if not stands:
        for weight, row in zip(weights, torch.stack([w.detach() for w in weights]).unbind(), strict=True):
            weight.data = row
    return weights[0].detach().as_strided((len(weights), *first.shape), (size, *first.stride()))
