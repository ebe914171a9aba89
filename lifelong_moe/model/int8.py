"""Weights held in 8 bits, a scale a row, and made whole on use: a view of a model, made when it is loaded.

A frozen expert's, where experts are computed in slices, are made whole again for the backward pass; other matrices are
kept whole between both passes.

What is stored never changes: the view is taken off again, and the stored bits put back, before anything is committed.

Legend: O rows, I columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lifelong_moe.model.experts import ExpertGeneration

LEVELS = 127


def quantize_rows(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of 255 evenly spaced values in each row's range.

    Args:
        weight_OI: Any finite matrix, or several: ``(E, O, I)``.

    Returns:
        int8 ``(O, I)`` and scales ``(O, 1)`` of the matrix's dtype: no value is off by more than half its row's scale,
        but for what the dtype rounds.

    Source:
        Symmetric absmax quantization by row: LLM.int8() (arXiv:2208.07339), section 2.1; Grok-1's released weights.
    """
    highest_O1 = weight_OI.float().abs().amax(dim=-1, keepdim=True)
    # Rounded to its dtype first: levels that were chosen by another scale would be off by as much as it is, 127 times.
    scale_O1 = (highest_O1 / LEVELS).to(weight_OI.dtype).clamp_min(torch.finfo(weight_OI.dtype).tiny)
    return (weight_OI.float() / scale_O1.float()).round().clamp(-LEVELS, LEVELS).to(torch.int8), scale_O1


def dequantize_rows(quantized_OI: Tensor, scale_O1: Tensor) -> Tensor:
    """The inverse of :func:`quantize_rows`, but for rounding; ``(O, I)`` in the scales' dtype."""
    return (quantized_OI.float() * scale_O1.float()).to(scale_O1.dtype)


class _Int8(nn.Module):
    """A parametrization: torch keeps what :meth:`right_inverse` gives, and a module reads what :meth:`forward` does.

    A matrix has its scales' dtype, which changes with the model's.
    """

    def forward(self, quantized_OI: Tensor, scale_O1: Tensor) -> Tensor:
        return dequantize_rows(quantized_OI, scale_O1)

    def right_inverse(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_rows(weight_OI)


def hold_in_int8(model: nn.Module, teacher: nn.Module | None = None) -> int:
    """Hold every frozen matrix of a model in 8 bits, in place; gradients still flow through to what is before it.

    Args:
        model: Matrices that train, and any that stand in several of its modules, stay whole.
        teacher: Goes on sharing what it shares with the model, and so holds it in the same 8 bits.

    Returns:
        Bytes saved.
    """
    owners, sharers = _owners(model), {} if teacher is None else _owners(teacher)
    saved = 0
    for parameter, places in owners.items():
        if parameter.requires_grad or len(places) > 1:
            continue
        rows = parameter.numel() // parameter.shape[-1]
        saved += parameter.numel() * (parameter.element_size() - 1) - parameter.element_size() * rows
        held = [*places, *sharers.get(parameter, [])]
        for module, name in held:
            parametrize.register_parametrization(module, name, _Int8(), unsafe=True)
        first, name = held[0]
        for module, other in held[1:]:
            module.parametrizations[other] = first.parametrizations[name]  # type: ignore[index, operator]
    return saved


def make_whole(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Take the view off, in place.

    Args:
        model: After :func:`hold_in_int8`; other matrices stay as they are.
        tensors: The stored tensors by name, which the matrices held in 8 bits become again, bit for bit.
    """
    held = [(prefix, m) for prefix, m in model.named_modules() if isinstance(m, parametrize.ParametrizationList)]
    for prefix, _ in held:
        owner_name, _, name = prefix.rpartition(".parametrizations.")
        owner = model.get_submodule(owner_name)
        parametrize.remove_parametrizations(owner, name)
        parameter = getattr(owner, name)
        stored = _stored(tensors, owner, owner_name, name)
        setattr(owner, name, nn.Parameter(stored.to(parameter.device), requires_grad=False))


def _stored(tensors: Mapping[str, Tensor], owner: nn.Module, owner_name: str, name: str) -> Tensor:
    """A parameter as it is stored; experts are stored one by one, under names that begin as their banks'."""
    if isinstance(owner, ExpertGeneration):
        banks = owner_name.rpartition("generations.")[0]
        return torch.stack([tensors[banks + stored] for stored in owner.stored_names(name)])
    return tensors[f"{owner_name}.{name}" if owner_name else name]


def _owners(model: nn.Module) -> dict[Tensor, list[tuple[nn.Module, str]]]:
    """Every matrix, or generation of experts' matrices, and the modules in which it stands."""
    found: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in list(model.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and parameter.numel():
                found.setdefault(parameter, []).append((module, name))
    return found
