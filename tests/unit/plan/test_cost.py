from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture, Generation
from lifelong_moe.plan.cost import count_parameters, forward_flops_per_token, pass_flops, training_flops
from lifelong_moe.plan.products import Text

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
def test_counts_are_those_of_the_model(make_model: Make, top_k_kind: str, shape: dict[str, Any]) -> None:
    model = make_model(top_k_kind, **shape)
    count = count_parameters(model.architecture)
    layers = list(model.moe_layers())
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.trunk == sum(p.numel() for p in model.trunk_parameters().values())
    assert count.per_expert == sum(matrix.numel() for matrix in layers[0].banks.matrices()[0])
    rows = sum(p.numel() for layer in layers for p in layer.router.parameters())
    active = model.architecture.routing.top_k * count.per_expert * len(layers)
    assert count.active == count.trunk + rows + active
    assert count.unfrozen == sum(p.numel() for layer in layers for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize(
    ("kind", "second", "third"),
    [
        ("labelled_bundles", {"delta_rank": 3}, {"delta_rank": 5}),
        ("label", {"delta_rank": 5}, {"delta_rank": 2}),
        ("learned", {"layers": (1,)}, {"layers": (0, 2)}),
        ("labelled_bundles", {"layers": (2,), "delta_rank": 1}, {}),
        ("labelled_bundles", {"rank": 2, "delta_rank": 1}, {"rank": 3}),
        ("learned", {"layers": (2,)}, {"rank": 1}),
    ],
)
def test_counts_of_deltas_and_of_layers_that_did_not_grow(
    make_architecture: Callable[..., Architecture],
    kind: str,
    second: dict[str, Any],
    third: dict[str, Any],
    frozen: int,
    tied: bool,
) -> None:
    born = (4, Generation("s1", 2, **second), Generation("s2", 3, **third))
    shape = {"layers": 3, "kv_heads": 1, "tie_embeddings": tied}
    architecture = replace(make_architecture(kind, born, model=shape), frozen=frozen)
    model, count = LanguageModel(architecture), count_parameters(architecture)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.trunk == sum(p.numel() for p in model.trunk_parameters().values())
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert count.trunk + count.unfrozen == sum(trained.values())
    deltas = [sum(p.numel() for n, p in model.named_parameters() if f".deltas.{g}." in n) for g in range(3)]
    rows = sum(p.numel() for layer in model.moe_layers() for p in layer.router.parameters())
    factors = 3 * max(one.get("rank", 0) for one in (second, third)) * (16 + 8)
    assert count.active == count.trunk + rows + 3 * 2 * (count.per_expert + factors) + max(deltas)


def test_deltas_by_hand(make_architecture: Callable[..., Architecture]) -> None:
    # Rank 3; query and output 16 x 16, key and value 8 x 16 in two layers; embedding and head 61 x 16.
    plain, changed = (
        make_architecture("labelled_bundles", (4, Generation("s1", 2, delta_rank=rank))) for rank in (0, 3)
    )
    numbers = 3 * (2 * (2 * 32 + 2 * 24) + 2 * (61 + 16))
    assert count_parameters(changed).total - count_parameters(plain).total == numbers
    # By token only the embedding's delta: what is looked up, 61 x 3, costs nothing, and a product with 3 x 16 the rest.
    assert forward_flops_per_token(changed) - forward_flops_per_token(plain) == 2 * 3 * 16
    # By pass each of the other matrices and its change are added up once: 3 x 16 x 16 and so on; the embedding is not.
    products = 3 * (2 * 2 * (16 * 16 + 8 * 16) + 61 * 16)
    assert pass_flops(changed, Text.of(changed)) == 2 * products and pass_flops(plain, Text.of(plain)) == 0


def test_trainable_after_growth_is_trunk_and_what_is_not_frozen(make_model: Make) -> None:
    model = make_model("learned", (4, 2))
    count = count_parameters(model.architecture)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count.trunk + count.unfrozen


def test_flops_by_hand(make_architecture: Callable[..., Architecture]) -> None:
    # One layer, D 4, one head of 4, F 3, two experts of which one runs, V 61, context 8.
    shape = {"layers": 1, "width": 4, "heads": 1, "kv_heads": 1, "expert_width": 3, "experts": 2, "context": 8}
    routing = {"top_k": 1, "renormalize": False}
    architecture = make_architecture("learned", (2,), model=shape, routing=routing)
    attention, expert, rows, head = 4 * 16, 3 * 12, 2 * 4, 61 * 4
    scores = 2 * 4 * 8 // 2  # query times keys and weights times values over half a context
    assert forward_flops_per_token(architecture) == 2 * (attention + expert + rows + head + scores)
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
        model.head.logits(model(TokenBatch(ids)).hidden_BSD)
    # Torch's attention looks at a whole context, not at half of it.
    ours = forward_flops_per_token(model.architecture)
    attention = 2 * 2 * 16 * 16
    assert counter.get_total_flops() == 16 * (ours + attention // 2)


def test_what_low_rank_experts_share_is_active_once(make_model: Callable[..., LanguageModel]) -> None:
    """Of a dense model that has grown: two experts a token, each a change of its only feed-forward network."""
    count = count_parameters(make_model("learned", (1, Generation("s1", 4, rank=2))).architecture)
    config = make_model("learned", (1,)).architecture.model
    factors, rows = 3 * 2 * (config.width + config.expert_width), config.layers * 5 * config.width
    assert count.active == count.trunk + rows + config.layers * (count.per_expert + 2 * factors) < count.total
