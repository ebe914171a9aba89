"""All experts of a layer on rows sorted by expert, two fast ways; calling each expert in turn is the readable one.

``slices`` (CPU) multiplies each expert's slice by that expert's own matrices, into one tensor, and keeps inputs,
pre-activations and the activation's values for the backward pass, where autograd would keep hidden units as well.
``grouped`` (CUDA) multiplies all slices in one kernel, whose borders stay on the device.

Legend: N rows handed to experts, E experts, A of them trainable, D model width, F expert width, G = 2·F where the
activation is gated, F where not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong_moe.ops.few_rows import are_few, matrix_first

aten = torch.ops.aten

Weight = Tensor | Callable[[], Tensor]
"""A matrix, or a function that makes it from a smaller form (8 bits, offloaded), anew for each product."""
Weights = Tensor | Sequence[Callable[[], Tensor]]
"""One of a generation's matrices, of each of its experts."""


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
        # Two halves of one tensor, so that the product with the input matrix is one call.
        grad_gate_NF, grad_up_NF = grad_NG.chunk(2, dim=-1)
        # The up half first: the next line uses up grad_NF.
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
    def forward(ctx: Any, rows_ND: Tensor, counts: Sequence[int], act: Nonlinearity, *weights: Weights) -> Tensor:
        used = _used(counts, weights)
        matrices = _matrices(used, weights, rows_ND.dtype)
        pre_NG, out_ND, values = _forward(rows_ND, used, act, matrices)
        # Functions that make a matrix on use (8 bits, offloaded) are no tensors: they are kept apart, and called
        # again.
        ctx.save_for_backward(rows_ND, pre_NG, *(m if isinstance(m, Tensor) else None for m in matrices), *values)
        ctx.held = [None if isinstance(m, Tensor) else m for m in matrices]
        ctx.like = [(w.shape, w.dtype) if isinstance(w, Tensor) else None for w in weights]
        ctx.used, ctx.act = used, act
        return out_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Any, ...]:
        rows_ND, pre_NG, *rest = ctx.saved_tensors
        kept, values = rest[: len(ctx.held)], rest[len(ctx.held) :]
        matrices = [m if held is None else held for m, held in zip(kept, ctx.held, strict=True)]
        grad_ND = grad_ND.contiguous()
        grad_rows_ND = torch.empty_like(rows_ND) if ctx.needs_input_grad[0] else None
        # Empty, not zeros: experts with rows write all of their slice, and `_zero_unused` fills the others.
        grads = [
            rows_ND.new_empty(like[0], dtype=like[1]) if needed else None
            for like, needed in zip(ctx.like, ctx.needs_input_grad[3:], strict=True)
        ]
        for i, (where, value_NF) in enumerate(zip(ctx.used, values, strict=True)):
            part, (into, down) = where.rows, (grads[2 * where.generation], grads[2 * where.generation + 1])
            # A frozen expert whose input needs no gradient either has nothing to compute.
            if grad_rows_ND is None and into is None and down is None:
                continue
            grad_NG, hidden_NF = ctx.act.hidden_backward(
                grad_ND[part] @ whole(matrices[2 * i + 1], rows_ND.dtype), pre_NG[part], value_NF
            )
            if down is not None:
                _multiply(grad_ND[part].t(), hidden_NF, out=down[where.expert])
            if into is not None:
                _multiply(grad_NG.t(), rows_ND[part], out=into[where.expert])
            if grad_rows_ND is not None:
                torch.mm(grad_NG, whole(matrices[2 * i], rows_ND.dtype), out=grad_rows_ND[part])
        _zero_unused(grads, ctx.used)
        return grad_rows_ND, None, None, *grads


class _Used(NamedTuple):
    """An expert that has rows."""

    generation: int
    expert: int
    """Index within its generation."""
    rows: slice


def _used(counts: Sequence[int], weights: Sequence[Weights]) -> list[_Used]:
    used, start = [], 0
    experts = ((g, e) for g, into in enumerate(weights[::2]) for e in range(len(into)))
    for (generation, expert), count in zip(experts, counts, strict=True):
        if count:
            used.append(_Used(generation, expert, slice(start, start + count)))
        start += count
    return used


def _matrices(used: Sequence[_Used], weights: Sequence[Weights], dtype: torch.dtype) -> list[Weight]:
    """The two matrices of each expert that has rows; no others are cast."""
    found = (weights[2 * one.generation + i][one.expert] for one in used for i in (0, 1))
    return [weight.to(dtype) if isinstance(weight, Tensor) else weight for weight in found]


def _forward(
    rows_ND: Tensor, used: Sequence[_Used], act: Nonlinearity, matrices: Sequence[Weight]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Pre-activations ``(N, G)``, outputs ``(N, D)``, and the activation's values of each expert that has rows."""
    values = []
    pre_NG, out_ND = rows_ND.new_empty(len(rows_ND), 0), rows_ND.new_empty(rows_ND.shape)
    for i, (_, _, part) in enumerate(used):
        into_GD = whole(matrices[2 * i], rows_ND.dtype)
        if not pre_NG.shape[1]:  # known from the first that has rows
            pre_NG = rows_ND.new_empty(len(rows_ND), len(into_GD))
        multiply_transposed(rows_ND[part], into_GD, pre_NG[part])
        hidden_NF, value_NF = act.hidden(pre_NG[part])
        multiply_transposed(hidden_NF, whole(matrices[2 * i + 1], rows_ND.dtype), out_ND[part])
        values.append(value_NF)
    return pre_NG, out_ND, values


def whole(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A matrix, made first where it is made on use."""
    return weight if isinstance(weight, Tensor) else weight().to(dtype)


def multiply_transposed(rows: Tensor, matrix: Tensor, out: Tensor) -> None:
    """``rows matrix^T`` into ``out``."""
    if are_few(rows, matrix):
        out.copy_(matrix_first(rows, matrix))
    else:
        torch.mm(rows, matrix.t(), out=out)


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """``left right`` into ``out``, perhaps of another dtype."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def _zero_unused(grads: Sequence[Tensor | None], used: Sequence[_Used]) -> None:
    """Fill what no product was written to: the gradients of experts without rows."""
    filled = {(one.generation, one.expert) for one in used}
    for i, grad in enumerate(grads):
        for expert in range(0 if grad is None else len(grad)):
            if (i // 2, expert) not in filled:
                grad[expert].zero_()  # type: ignore[index]


def slices(rows_ND: Tensor, counts: Sequence[int], weights: Sequence[Weights], activation: str) -> Tensor:
    """Each expert's slice through its own matrices.

    Args:
        rows_ND: Rows sorted by expert, ``(N, D)``.
        counts: Rows of each expert; they sum to N.
        weights: Of each generation the matrices into its experts ``(E, G, D)`` and those out of them ``(E, D, F)``, one
            after the other. What is made on use must not train; it is made once more for the backward pass.
        activation: A name in ``NONLINEARITIES``.

    Returns:
        ``(N, D)``. An expert without rows gets gradients of zero, and a frozen one none.
    """
    device, act = rows_ND.device.type, NONLINEARITIES[activation]
    # Decoding has so few rows that an autograd function and an autocast context would cost more than the products.
    if not (torch.is_grad_enabled() or torch.is_autocast_enabled(device)):
        used = _used(counts, weights)
        return _forward(rows_ND, used, act, _matrices(used, weights, rows_ND.dtype))[1]
    rows_ND = autocast(rows_ND)
    with torch.autocast(device, enabled=False):
        return _Slices.apply(rows_ND, counts, act, *weights)


def autocast(rows_ND: Tensor) -> Tensor:
    """Rows in the type that autocast computes in, if it is on."""
    device = rows_ND.device.type
    return rows_ND.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else rows_ND


class _Grouped(torch.autograd.Function):
    """Experts that train stand first, so that a prefix of the borders is all that weight gradients need."""

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, ends_E: Tensor, in_EGD: Tensor, out_EDF: Tensor, act: Nonlinearity, *trained: Tensor
    ) -> Tensor:
        pre_NG = F.grouped_mm(rows_ND, in_EGD.transpose(1, 2), offs=ends_E)
        hidden_NF, value_NF = act.hidden(pre_NG)
        out_ND = F.grouped_mm(hidden_NF, out_EDF.transpose(1, 2), offs=ends_E)
        ctx.save_for_backward(rows_ND, pre_NG, value_NF, ends_E, in_EGD, out_EDF)
        ctx.act, ctx.like = act, [(len(weights), weights.dtype) for weights in trained]
        return out_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Any, ...]:
        rows_ND, pre_NG, value_NF, ends_E, in_EGD, out_EDF = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()
        grad_NF = F.grouped_mm(grad_ND, out_EDF, offs=ends_E)
        grad_NG, hidden_NF = ctx.act.hidden_backward(grad_NF, pre_NG, value_NF)
        grad_rows = F.grouped_mm(grad_NG, in_EGD, offs=ends_E) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = []
        num_trained = len(ctx.like) // 2
        sizes = [num for num, _ in ctx.like[:num_trained]]
        ends_A = ends_E[: sum(sizes)].contiguous()
        # 5 inputs of `forward` precede the weights in `needs_input_grad`.
        for start, product in ((5, (grad_NG.t(), rows_ND)), (5 + num_trained, (grad_ND.t(), hidden_NF))):
            wanted = any(ctx.needs_input_grad[start : start + num_trained])
            grads += F.grouped_mm(*product, offs=ends_A).split(sizes) if wanted else [None] * num_trained
        cast = (None if grad is None else grad.to(dtype) for grad, (_, dtype) in zip(grads, ctx.like, strict=True))
        return (grad_rows, None, None, None, None, *cast)


def grouped(
    rows_ND: Tensor, counts_E: Tensor, ins: Sequence[Tensor], outs: Sequence[Tensor], num_trained: int, activation: str
) -> Tensor:
    """Each expert's slice in one kernel a matrix; the host never learns where slices end.

    Args:
        rows_ND: Rows sorted by expert, ``(N, D)``. On CUDA in bfloat16; with other types the kernel waits for the host.
        counts_E: Rows of each expert, int64; they sum to N.
        ins: Of each generation the matrices into its experts ``(E, G, D)``, those that train first. Those of several
            generations are copied unless they stand in one buffer (:func:`join`).
        outs: The matrices out of them ``(E, D, F)``.
        num_trained: How many generations train.
        activation: A name in ``NONLINEARITIES``.

    Returns:
        ``(N, D)``. Weight gradients exist for the trained generations only, and are views of one tensor.
    """
    # int32 is the only type that `grouped_mm` takes for offsets.
    rows_ND, ends_E = autocast(rows_ND), counts_E.cumsum(0).to(torch.int32)
    with torch.autocast(rows_ND.device.type, enabled=False):
        in_EGD, out_EDF = (as_one_tensor(weights, rows_ND.dtype) for weights in (ins, outs))
        act, trained = NONLINEARITIES[activation], (*ins[:num_trained], *outs[:num_trained])
        return _Grouped.apply(rows_ND, ends_E, in_EGD, out_EDF, act, *trained)


@torch.no_grad()
def as_one_tensor(generations: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Generations' matrices as one tensor ``(E, ...)`` of a type; those that stand in one buffer are not copied.

    Where the buffer has this type and some generations have not, which train in float32, these are cast into their
    places there.
    """
    held = [one for one in generations if one.dtype == dtype] or [*generations]
    if not are_joined(generations, held):
        # Never moved here: whoever shards or gathers parameters would go on with the memory that they had.
        return torch.cat([one.to(dtype) for one in generations])
    first, before = held[0], _numbers_before(generations, held[0])
    shape = sum(len(one) for one in generations), *first.shape[1:]
    whole_E = first.detach().as_strided(shape, first.stride(), first.storage_offset() - before)
    for place, one in zip(whole_E.split([len(one) for one in generations]), generations, strict=True):
        if one.dtype != whole_E.dtype:
            place.copy_(one)
    return whole_E.to(dtype)


def are_joined(generations: Sequence[Tensor], held: Sequence[Tensor]) -> bool:
    """Whether those of the generations' matrices that are ``held`` so stand in one buffer, which has room for all."""
    first = held[0]
    start = first.data_ptr() - _numbers_before(generations, first) * first.element_size()
    if len(held) < len(generations):
        # Places of others must be no other tensor's: the buffer is theirs alone if it is as large as all of them.
        room = first.untyped_storage()
        numbers = sum(one.numel() for one in generations)
        if start != room.data_ptr() or room.nbytes() != numbers * first.element_size():
            return False
    for one in held:
        at = start + _numbers_before(generations, one) * first.element_size()
        # Neighbouring addresses alone prove nothing: two storages may lie side by side.
        if one.data_ptr() != at or one.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return False
    return True


def _numbers_before(generations: Sequence[Tensor], one: Tensor) -> int:
    """Numbers in the matrices that precede a generation's."""
    place = next(i for i, other in enumerate(generations) if other is one)
    return sum(other.numel() for other in generations[:place])


@torch.no_grad()
def join(generations: Sequence[Tensor]) -> None:
    """Move generations' matrices into one buffer, in this order; they stay the same Parameters.

    Of several types, those of the narrowest are moved, and the others have places there for their casts.
    """
    dtype = min((one.dtype for one in generations), key=lambda one: one.itemsize)
    held = [one for one in generations if one.dtype == dtype]
    if not are_joined(generations, held):
        sizes = [len(weights) for weights in generations]
        joint = torch.cat([one.to(dtype) for one in generations])
        for weights, rows in zip(generations, joint.split(sizes), strict=True):
            if weights.dtype == dtype:
                # `.data`: optimizer and hooks keep the Parameter that they know.
                weights.data = rows
