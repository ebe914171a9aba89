from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lifelong_moe.model.architecture import Architecture
from lifelong_moe.model.cost import count_parameters, forward_flops_per_token, training_flops
from lifelong_moe.model.transformer import LanguageModel

Make = Callable[..., LanguageModel]
SHAPES: list[dict[str, Any]] = [
    {},
    {"model": {"tie_embeddings": True}},
    {"model": {"kv_heads": 4, "layers": 3}},
    {"model": {"kv_heads": 1, "expert_width": 20}, "routing": {"top_k": 1, "renormalize": False}},
    {"generations": (4, 2)},
    {"generations": (2, 3, 1), "model": {"tie_embeddings": True}},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_counts_are_those_of_the_model(make_model: Make, router_kind: str, shape: dict[str, Any]) -> None:
    model = make_model(router_kind, **shape)
    count = count_parameters(model.architecture)
    layers = list(model.moe_layers())
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.trunk == sum(p.numel() for p in model.trunk_parameters().values())
    assert count.per_expert == sum(p.numel() for p in layers[0].banks.experts[0].parameters())
    rows = sum(p.numel() for layer in layers for p in layer.router.parameters())
    active = model.architecture.routing.top_k * count.per_expert * len(layers)
    assert count.active == count.trunk + rows + active
    newest = sum(p.numel() for layer in layers for expert in layer.banks.active for p in expert.parameters())
    newest += sum(p.numel() for layer in layers for p in list(layer.router.parameters())[-1:])
    assert count.newest == newest


def test_trainable_after_growth_is_trunk_and_newest(make_model: Make) -> None:
    model = make_model("learned", (4, 2))
    count = count_parameters(model.architecture)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count.trunk + count.newest


def test_flops_by_hand(make_architecture: Callable[..., Architecture]) -> None:
    # One layer, D 4, one head of 4, F 3, two experts of which one runs, V 61, context 8.
    shape = {"layers": 1, "width": 4, "heads": 1, "kv_heads": 1, "expert_width": 3, "experts": 2, "context": 8}
    routing = {"top_k": 1, "renormalize": False}
    architecture = make_architecture("learned", (2,), model=shape, routing=routing)
    attention, expert, rows, norms, head = 4 * 16, 3 * 12, 2 * 4, 3 * 4, 61 * 4
    scores = 2 * 4 * 8 // 2  # query times keys and weights times values over half a context
    assert forward_flops_per_token(architecture) == 2 * (attention + expert + rows + norms + head + scores)
    tied = make_architecture("learned", (2,), model=shape | {"tie_embeddings": True}, routing=routing)
    assert forward_flops_per_token(tied) == forward_flops_per_token(architecture)


def test_flops_do_not_grow_with_experts_but_for_router_rows(make_architecture: Callable[..., Architecture]) -> None:
    small, large = (forward_flops_per_token(make_architecture("learned", g)) for g in ((4,), (4, 4)))
    assert large - small == 2 * 2 * 4 * 16  # two a multiply-add, two layers, four rows of 16
    same = [forward_flops_per_token(make_architecture("label", g)) for g in ((4,), (4, 4))]
    assert same[0] == same[1]


def test_training_costs_three_forward_passes_and_the_teacher_s(make_architecture: Callable[..., Architecture]) -> None:
    student, teacher = make_architecture("learned", (4, 2)), make_architecture("learned", (4,))
    alone = training_flops(student, 100, None, 0)
    assert alone == 300 * forward_flops_per_token(student)
    assert training_flops(student, 100, teacher, 7) == alone + 7 * forward_flops_per_token(teacher)


def test_attention_flops_are_those_that_torch_counts(make_model: Make) -> None:
    model = make_model("label", (2,), model={"layers": 1}).eval()
    ids = torch.randint(1, 61, (1, 16))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.logits(model(ids).hidden_BSD)
    # Norm weights are 2 D + D of our count, and torch's attention looks at a whole context, not at half of it.
    ours = forward_flops_per_token(model.architecture) - 2 * 3 * 16
    attention = 2 * 2 * 16 * 16
    assert counter.get_total_flops() == 16 * (ours + attention // 2)
