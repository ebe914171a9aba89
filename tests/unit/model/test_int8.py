"""Eight bits a weight: bounded error, gradients that pass through, and stored bits that come back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lifelong_moe.config.growth import FrozenWeights
from lifelong_moe.model.deltas import DeltaLinear
from lifelong_moe.model.int8 import dequantize_rows, hold_frozen, make_whole, quantize_rows
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.retention.teacher import make_teacher

Make = Callable[..., LanguageModel]


@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e6]))
def test_no_weight_is_off_by_more_than_half_a_step(seed: int, scale: float) -> None:
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(seed)) * scale
    weight[2] = 0
    quantized, scales = quantize_rows(weight)
    error = (dequantize_rows(quantized, scales) - weight).abs()
    assert quantized.dtype == torch.int8 and scales.shape == (5, 1)
    assert bool((error <= scales * 0.5 * (1 + 1e-5)).all()) and bool((error[2] == 0).all())
    again, _ = quantize_rows(dequantize_rows(quantized, scales))
    assert torch.equal(again, quantized)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_weight_becomes_the_nearest_that_there_is(dtype: torch.dtype) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    quantized, scales = quantize_rows(weight)
    found = dequantize_rows(quantized, scales)
    assert scales.dtype == found.dtype == dtype
    levels = (torch.arange(-127, 128).view(1, 1, -1) * scales.double().unsqueeze(2)).to(dtype).double()
    least = (levels - weight.double().unsqueeze(2)).abs().amin(dim=2)
    # By half a step at most, and where the highest value's level is rounded, by what the dtype rounds.
    step, rounding = scales.double(), weight.double().abs() * torch.finfo(dtype).eps / 2
    off = (found.double() - weight.double()).abs()
    assert bool((off <= step / 2 * (1 + 1e-6) + rounding).all())
    assert float(((off - least) / step).max()) < 0.26  # no other level would be nearer, but for what is rounded


def test_frozen_matrices_are_held_and_come_back(make_model: Make) -> None:
    model = make_model("learned", (4, 2))
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(1, 61, (2, 16), generator=torch.Generator().manual_seed(0))
    whole = model.eval()(TokenBatch(ids)).hidden_BSD.detach()
    saved = hold_frozen(model, FrozenWeights.int8)
    held = {n: p for n, p in model.named_parameters() if p.dtype == torch.int8}
    assert len(held) == 2 * 2 + 2  # gate_up and down of the first generation in two layers, and the router's rows
    assert saved == sum(3 * p.numel() - 4 * p[..., 0].numel() for p in held.values())
    hidden = model(TokenBatch(ids)).hidden_BSD
    drift = float((hidden - whole).abs().max().detach())
    assert 0 < drift < 0.1  # of hidden states of size 1
    model.head.logits(hidden).square().sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and p.numel()}
    assert all(p.grad is not None for p in trained.values())  # those before a frozen expert too
    make_whole(model, stored)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    assert set(model.state_dict()) == set(stored)
    assert torch.equal(model(TokenBatch(ids)).hidden_BSD, whole)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".generations.0." in n)


def test_what_is_made_whole_of_an_expert_is_not_kept_for_the_backward_pass(make_model: Make) -> None:
    model = make_model("learned", (4, 2))
    ids = torch.randint(1, 61, (4, 32), generator=torch.Generator().manual_seed(0))
    shape = next(model.moe_layers()).banks.matrices()[0][1].shape

    def kept() -> int:
        seen = {}

        def note(tensor: Tensor) -> Tensor:
            size = tensor.untyped_storage().nbytes()
            if tensor.shape in (shape, shape[::-1]) and size == 4 * 4 * shape.numel():  # of four experts' numbers
                seen[tensor.data_ptr()] = tensor
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            model.head.logits(model(TokenBatch(ids)).hidden_BSD).square().mean().backward()
        return len(seen)

    whole = kept()
    hold_frozen(model, FrozenWeights.int8)
    assert whole - kept() == 2 * 4  # of each layer's frozen experts the matrix out of them


def test_a_teacher_shares_the_same_eight_bits(make_model: Make) -> None:
    model = make_model("learned", (4, 2))
    teacher = make_teacher(model, [p for p in model.parameters() if not p.requires_grad])
    hold_frozen(model, FrozenWeights.int8, teacher)
    shared = {id(p): p for p in model.parameters() if p.dtype == torch.int8}
    held = [p for p in teacher.parameters() if p.dtype == torch.int8]
    assert len(held) == len(shared) and all(id(p) in shared for p in held)
    assert len({id(p) for p in [*model.parameters(), *teacher.parameters()] if not p.requires_grad}) == (
        sum(not p.requires_grad for p in teacher.parameters())
    )  # nothing frozen in the model stands beside it whole
    ids = torch.randint(1, 61, (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.eval()(TokenBatch(ids)).hidden_BSD, teacher(TokenBatch(ids)).hidden_BSD)


def test_what_is_made_whole_has_the_model_s_type(make_model: Make) -> None:
    model = make_model().eval().requires_grad_(False)
    hold_frozen(model, FrozenWeights.int8)
    model.to(torch.bfloat16)
    ids = torch.randint(1, 61, (2, 16), generator=torch.Generator().manual_seed(0))
    assert model.embedding.weight.dtype == model(TokenBatch(ids)).hidden_BSD.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_model_in_eight_bits(make_model: Make, tied: bool) -> None:
    model = make_model(model={"tie_embeddings": tied}).eval().requires_grad_(False)
    ids = torch.randint(1, 61, (2, 16), generator=torch.Generator().manual_seed(0))
    before = model.head.logits(model(TokenBatch(ids)).hidden_BSD)
    hold_frozen(model, FrozenWeights.int8)
    floats = [n for n, p in model.named_parameters() if p.dim() == 2 and p.dtype != torch.int8 and p.shape[1] > 1]
    assert floats == (["embedding.weight"] if tied else [])  # what two modules share stays whole
    after = model.head.logits(model(TokenBatch(ids)).hidden_BSD)
    assert 0 < float((after - before).abs().mean()) < 0.03 * float(before.abs().mean())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_in_half_nothing_is_lost(make_model: Make, half: torch.dtype) -> None:
    """Results and gradients are the same, bit for bit, and frozen matrices that have more bits stay as they are."""
    model = make_model("learned", (4, 2))
    frozen = [p for p in model.parameters() if not p.requires_grad and p.dim() >= 2]
    with torch.no_grad():
        for parameter in frozen[1:]:
            parameter.copy_(parameter.to(half))
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(1, 61, (2, 16), generator=torch.Generator().manual_seed(0))
    whole, gradients = _outputs(model, ids)
    saved = hold_frozen(model, FrozenWeights.half)
    held = [p for p in model.parameters() if p.dtype == half]
    assert len(held) == len(frozen) - 1 and saved == sum(2 * p.numel() for p in held)
    again, same = _outputs(model, ids)
    assert torch.equal(again, whole) and gradients.keys() == same.keys()
    assert all(torch.equal(gradient, same[name]) for name, gradient in gradients.items())
    make_whole(model, stored)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def _outputs(model: LanguageModel, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model.head.logits(model.eval()(TokenBatch(ids)).hidden_BSD)
    logits.square().sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_linear_map_in_half_keeps_no_whole_matrix_for_the_backward_pass() -> None:
    layer = DeltaLinear(64, 32).requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.half())
    x = torch.randn(3, 64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    expected = layer(x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    hold_frozen(layer, FrozenWeights.half)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = layer(x)
    assert torch.equal(found, expected) and torch.equal(torch.autograd.grad(found.sum(), x)[0], gradient)
    assert not [tensor for tensor in kept if tensor.numel() == layer.weight.numel()]
