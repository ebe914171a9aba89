"""Weights held in 8 bits, a scale a row, and made whole on use: a view of a model, made when it is loaded.

A frozen expert's are made whole again for the backward pass; other matrices are kept whole between both passes.

What is stored never changes: the view is taken off again, and the stored bits put back, before anything is committed.

Legend: O rows, I columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

LEVELS = 127


def quantize_rows(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of 255 evenly spaced values in each row's range.

    Args:
        weight_OI: Any finite matrix.

    Returns:
        int8 ``(O, I)`` and float32 scales ``(O, 1)``: no value is off by more than half its row's scale.

    Source:
        Symmetric absmax quantization by row: LLM.int8() (arXiv:2208.07339), section 2.1; Grok-1's released weights.
    """
    scale_O1 = (weight_OI.float().abs().amax(dim=1, keepdim=True) / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight_OI.float() / scale_O1).round().clamp(-LEVELS, LEVELS).to(torch.int8), scale_O1


def dequantize_rows(quantized_OI: Tensor, scale_O1: Tensor) -> Tensor:
    """The inverse of :func:`quantize_rows`, but for rounding; float32 ``(O, I)``."""
    return quantized_OI.float() * scale_O1


class _Int8(nn.Module):
    """A parametrization: torch keeps what :meth:`right_inverse` gives, and a module reads what :meth:`forward` does."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, quantized_OI: Tensor, scale_O1: Tensor) -> Tensor:
        return dequantize_rows(quantized_OI, scale_O1).to(self.dtype)

    def right_inverse(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_rows(weight_OI)


def hold_in_int8(model: nn.Module) -> int:
    """Hold every frozen matrix of a model in 8 bits, in place; gradients still flow through to what is before it.

    Args:
        model: Matrices that train, and any that another module shares, stay whole.

    Returns:
        Bytes saved.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module, name, parameter in _matrices(model):
        owners.setdefault(id(parameter), []).append((module, name))
    saved = 0
    for (module, name), *others in list(owners.values()):
        parameter = getattr(module, name)
        if parameter.requires_grad or others:
            continue
        saved += parameter.numel() * (parameter.element_size() - 1) - 4 * len(parameter)
        parametrize.register_parametrization(module, name, _Int8(parameter.dtype), unsafe=True)
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
        stored = tensors[f"{owner_name}.{name}" if owner_name else name]
        setattr(owner, name, nn.Parameter(stored.to(parameter.device), requires_grad=False))


def _matrices(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 2 and parameter.numel():
                yield module, name, parameter
