"""Hold frozen weights in 16 or 8 bits.

Where products are in bfloat16, frozen matrices are rounded to it once, rather than cast in each pass
(:func:`round_frozen`). Elsewhere they are made whole on use: in 16 bits are those that lose nothing by it, as a
checkpoint's in bfloat16; in 8 bits, with a scale per row, all (:func:`hold_frozen`). This changes a loaded model in
memory only: the stored bits are put back before anything is committed (:func:`unround_frozen`, :func:`make_whole`).

Legend: O rows, I columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lifelong_moe.config.growth import FrozenWeights
from lifelong_moe.model.deltas import DeltaLinear, LowRank, TokenRows
from lifelong_moe.model.experts import ExpertGeneration
from lifelong_moe.model.feedforward import FeedForward

LEVELS = 127
HALVES = (torch.bfloat16, torch.float16)
PRODUCTS = (ExpertGeneration, DeltaLinear, LowRank, FeedForward)
"""Modules whose matrices multiply rows, and nothing else. Routers decide in float32, and the embedding begins the
residual stream, which stays float32."""


def quantize_rows(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Round to the nearest of 255 evenly spaced values in each row's range.

    Args:
        weight_OI: Any finite matrix, or several: ``(E, O, I)``.

    Returns:
        int8 ``(O, I)`` and scales ``(O, 1)`` in the matrix's dtype. The error is at most half the row's scale, plus the
        rounding of the dtype.

    Source:
        Symmetric absmax quantization by row: LLM.int8() (arXiv:2208.07339), section 2.1; Grok-1's released weights.
    """
    highest_O1 = weight_OI.float().abs().amax(dim=-1, keepdim=True)
    # Rounded to its dtype before it divides: a level times the error of the scale would be up to 127 times that error.
    # Not zero, or a row of zeros would become NaN.
    scale_O1 = (highest_O1 / LEVELS).to(weight_OI.dtype).clamp_min(torch.finfo(weight_OI.dtype).tiny)
    return (weight_OI.float() / scale_O1.float()).round().clamp(-LEVELS, LEVELS).to(torch.int8), scale_O1


def dequantize_rows(quantized_OI: Tensor, scale_O1: Tensor) -> Tensor:
    """The inverse of :func:`quantize_rows` up to rounding; ``(O, I)`` in the scales' dtype."""
    return (quantized_OI.float() * scale_O1.float()).to(scale_O1.dtype)


class _Int8(nn.Module):
    """A torch parametrization: stores the result of :meth:`right_inverse`, and computes the weight by :meth:`forward`.

    The weight has the dtype of the scales, which follows the model's.
    """

    def forward(self, quantized_OI: Tensor, scale_O1: Tensor) -> Tensor:
        return dequantize_rows(quantized_OI, scale_O1)

    def right_inverse(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_rows(weight_OI)


class _Half(nn.Module):
    """A parametrization that stores a weight in 16 bits, and computes it in its own type.

    Args:
        weight: Is the same in ``half`` and back.
        half: Of 16 bits.
    """

    def __init__(self, weight: Tensor, half: torch.dtype) -> None:
        super().__init__()
        self.computed, self.stored = weight.dtype, half

    def forward(self, held: Tensor) -> Tensor:
        return held.to(self.computed)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:
        # A tuple: torch lets a single tensor not change its type.
        return (weight.to(self.stored),)


def _parametrization(weight: Tensor, kind: FrozenWeights) -> nn.Module | None:
    """What holds a weight as ``kind`` says; None if it would not be smaller, or would lose by it."""
    if kind == FrozenWeights.int8:
        return _Int8()
    if weight.element_size() <= HALVES[0].itemsize:
        return None
    found = [half for half in HALVES if torch.equal(weight.to(half).to(weight.dtype), weight)]
    return _Half(weight, found[0]) if found else None


def hold_frozen(model: nn.Module, kind: FrozenWeights, teacher: nn.Module | None = None) -> int:
    """Hold every frozen matrix of a model in fewer bits, in place; gradients still flow to earlier layers.

    Matrices of experts computed in slices, and those of linear maps without changes, are made whole once more for the
    backward pass; of others autograd keeps the whole matrix from one pass to the other.

    Args:
        model: Trainable matrices, and those that several of its modules share, stay as they are.
        kind: ``half`` or ``int8``.
        teacher: Keeps sharing what it shares with the model, in the same bits.

    Returns:
        Bytes saved.
    """
    owners, sharers = _owners(model), {} if teacher is None else _owners(teacher)
    saved = 0
    for parameter, places in owners.items():
        if parameter.requires_grad or len(places) > 1:
            continue
        if (parametrization := _parametrization(parameter, kind)) is None:
            continue
        saved += parameter.numel() * parameter.element_size()
        # `unsafe`: torch would otherwise require that quantizing and dequantizing change nothing.
        held = [*places, *sharers.get(parameter, [])]
        for module, name in held:
            parametrize.register_parametrization(module, name, parametrization, unsafe=True)
        first, name = held[0]
        originals = first.parametrizations[name].parameters()  # type: ignore[index, union-attr]
        saved -= sum(one.numel() * one.element_size() for one in originals)
        for module, other in held[1:]:
            module.parametrizations[other] = first.parametrizations[name]  # type: ignore[index, operator]
    return saved


def how_held(model: nn.Module) -> dict[str, tuple[str | None, str]]:
    """How each held matrix is held, by the name that it has as a whole: the type it is stored in, and computed in.

    None for the former is 8 bits. :func:`hold_as` is the inverse.
    """
    found = {}
    for prefix, held in model.named_modules():
        if isinstance(held, parametrize.ParametrizationList):
            how = held[0]
            types = (how.stored, how.computed) if isinstance(how, _Half) else (None, held.original1.dtype)
            stored, computed = (None if one is None else str(one).removeprefix("torch.") for one in types)
            assert computed is not None
            found[prefix.replace(".parametrizations.", ".")] = stored, computed
    return found


def hold_as(model: nn.Module, held: Mapping[str, tuple[str | None, str]]) -> None:
    """Hold matrices as :func:`how_held` told of another model; the caller then sets what is stored of them.

    Args:
        model: Of the same architecture, whole; its matrices may be without memory.
        held: From :func:`how_held`.
    """
    for name, (stored, computed) in held.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        weight = getattr(owner, leaf).to(getattr(torch, computed))
        how = _Int8() if stored is None else _Half(weight, getattr(torch, stored))
        # What is held is frozen, also in a teacher, whose architecture does not say so; whole numbers have no gradient.
        getattr(owner, leaf).requires_grad_(False)
        parametrize.register_parametrization(owner, leaf, how, unsafe=True)


def round_frozen(model: nn.Module, teacher: nn.Module | None = None) -> int:
    """Round the frozen matrices of products to bfloat16, in place, as autocast to bfloat16 does in each pass.

    They stay plain Parameters. Where autocast is off they are cast to the type of the rows that they multiply.

    Args:
        model: Trainable matrices, and those that several of its modules share, stay as they are.
        teacher: Keeps sharing what it shares with the model; its own matrices are rounded too.

    Returns:
        Bytes saved.
    """
    rounded: dict[Tensor, nn.Parameter] = {}
    saved = 0
    for one in (model, teacher):
        for parameter, places in ({} if one is None else _owners(one)).items():
            if parameter.requires_grad or len(places) > 1 or not isinstance(places[0][0], PRODUCTS):
                continue
            if parameter not in rounded:
                rounded[parameter] = nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False)
                saved += parameter.nbytes - rounded[parameter].nbytes
            module, name = places[0]
            setattr(module, name, rounded[parameter])
    return saved


def unround_frozen(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Undo :func:`round_frozen`, in place.

    Args:
        model: In float32 but for what was rounded.
        tensors: The stored tensors by name; the rounded matrices become these again, bit for bit.
    """
    for owner_name, owner in model.named_modules():
        for name, parameter in [*owner.named_parameters(recurse=False)]:
            if isinstance(owner, PRODUCTS) and parameter.dtype == torch.bfloat16:
                stored = _stored(tensors, owner, owner_name, name)
                whole = stored.to(parameter.device, torch.float32)
                setattr(owner, name, nn.Parameter(whole, requires_grad=False))


def make_whole(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Undo :func:`hold_frozen`, in place.

    Args:
        model: Its other matrices stay as they are, in whatever training computes in.
        tensors: The stored tensors by name; the held matrices become these again, bit for bit.
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
    """A parameter as it is stored; experts are stored one by one."""
    if isinstance(owner, ExpertGeneration):
        banks = owner_name.rpartition("generations.")[0]
        return torch.stack([tensors[banks + stored] for stored in owner.stored_names(name)])
    return tensors[f"{owner_name}.{name}" if owner_name else name]


def _owners(model: nn.Module) -> dict[Tensor, list[tuple[nn.Module, str]]]:
    """Every matrix, or 3-D Parameter of experts, and the modules and names under which it is found."""
    found: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in list(model.modules()):
        if isinstance(module, TokenRows):  # joined to the matrix for every pass; few beside it
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and parameter.numel():
                found.setdefault(parameter, []).append((module, name))
    return found
