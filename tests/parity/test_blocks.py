"""One layer, configured as each system, against transformers' block of that name: float32, within 2e-6."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lifelong_moe.config.load import read_config
from lifelong_moe.config.routing.base import Score
from lifelong_moe.config.routing.capacity import CapacityConfig, Priority
from lifelong_moe.model.experts import ExpertBanks
from lifelong_moe.model.moe import MoELayer
from lifelong_moe.ops.router_losses import load_balancing_loss, router_z_loss
from lifelong_moe.routing.base import RoutingContext
from lifelong_moe.routing.registry import build_router
from tests.conftest import routing_of

transformers = pytest.importorskip("transformers", reason="parity needs the extra `transformers`")

TOLERANCE = 2e-6
PRESETS = Path(__file__).parents[2] / "configs" / "presets"
WIDTH, HIDDEN, BATCH, LENGTH = 16, 12, 3, 20


def context(batch: int = BATCH, length: int = LENGTH) -> RoutingContext:
    ids_T = torch.arange(batch * length)
    return RoutingContext(
        ids_T,
        torch.ones_like(ids_T, dtype=torch.bool),
        torch.zeros_like(ids_T),
        num_sequences=batch,
        full_length=length,
    )


def fill(module: nn.Module, seed: int = 0) -> None:
    """Random numbers of deviation 0.5 everywhere; transformers' own parameters may be empty memory."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def layer_of(rows_ED: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, **routing: Any) -> MoELayer:
    """Our layer with these numbers."""
    router = build_router(routing_of(**routing), width=WIDTH, layer=0, causal=False)
    layer = MoELayer(router, ExpertBanks(WIDTH, HIDDEN))
    layer.add_experts(len(rows_ED))
    router.set_rows(rows_ED)
    with torch.no_grad():
        for (gate_up, down), *theirs in zip(layer.banks.matrices(), gate_up_EGD, down_EDF, strict=True):
            gate_up.copy_(theirs[0])
            down.copy_(theirs[1])
    return layer.eval()


def inputs() -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same(theirs: Callable[[Tensor], Any], layer: MoELayer) -> None:
    expected = theirs(inputs())
    expected = expected[0] if isinstance(expected, tuple) else expected
    found_TD, _ = layer(inputs().flatten(0, 1), context())
    torch.testing.assert_close(found_TD, expected.flatten(0, 1), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("module", "config", "block", "renormalize"),
    [
        ("mixtral", "MixtralConfig", "MixtralSparseMoeBlock", True),
        ("olmoe", "OlmoeConfig", "OlmoeSparseMoeBlock", False),
        ("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock", True),
    ],
)
def test_softmax_blocks(module: str, config: str, block: str, renormalize: bool) -> None:
    modeling = __import__(f"transformers.models.{module}.modeling_{module}", fromlist=[block])
    settings = getattr(transformers, config)(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        moe_intermediate_size=HIDDEN,
        num_experts=16,
        num_local_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=renormalize,
    )
    theirs = getattr(modeling, block)(settings).eval()
    fill(theirs)
    layer = layer_of(
        theirs.gate.weight, theirs.experts.gate_up_proj, theirs.experts.down_proj, top_k=4, renormalize=renormalize
    )
    assert_same(theirs, layer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("groups", [1, 4])
def test_deepseek_v3(groups: int) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    settings = transformers.DeepseekV3Config(
        hidden_size=WIDTH,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=groups,
        topk_group=max(1, groups // 2),
        routed_scaling_factor=2.5,
    )
    theirs = DeepseekV3MoE(settings).eval()
    fill(theirs)
    bias_E = torch.randn(16, generator=torch.Generator().manual_seed(3)) * 0.2
    theirs.gate.e_score_correction_bias.copy_(bias_E)
    layer = layer_of(
        theirs.gate.weight,
        theirs.experts.gate_up_proj,
        theirs.experts.down_proj,
        top_k=4,
        score=Score.sigmoid,
        bias_rate=0.001,
        gate_scale=2.5,
        expert_groups=groups,
        top_groups=max(1, groups // 2),
    )
    layer.router.bias_0.copy_(bias_E)  # type: ignore[operator]
    assert_same(lambda x: theirs(x) - theirs.shared_experts(x), layer)
    layer.router.bias_0.zero_()  # type: ignore[operator]
    with pytest.raises(AssertionError):  # it is not without effect
        assert_same(lambda x: theirs(x) - theirs.shared_experts(x), layer)


@pytest.mark.parametrize("top_groups", [1, 2])
def test_deepseek_v2(top_groups: int) -> None:
    """Groups without biases."""
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    settings = transformers.DeepseekV2Config(
        hidden_size=WIDTH,
        num_attention_heads=2,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=top_groups,
        topk_method="group_limited_greedy",
        routed_scaling_factor=16.0,
    )
    theirs = DeepseekV2Moe(settings).eval()
    fill(theirs)
    layer = layer_of(
        theirs.gate.weight,
        theirs.experts.gate_up_proj,
        theirs.experts.down_proj,
        top_k=4,
        renormalize=False,
        gate_scale=16.0,
        expert_groups=4,
        top_groups=top_groups,
    )
    assert_same(lambda x: theirs(x) - theirs.shared_experts(x), layer)


@pytest.mark.parametrize("capacity", [2, 4, LENGTH])
def test_switch(capacity: int) -> None:
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    settings = transformers.SwitchTransformersConfig(
        d_model=WIDTH, d_ff=HIDDEN, num_experts=5, expert_capacity=capacity, router_dtype="float32", dropout_rate=0.0
    )
    theirs = SwitchTransformersSparseMLP(settings).eval()
    fill(theirs)
    router = build_router(
        routing_of(
            mode="switch",
            top_k=1,
            renormalize=False,
            jitter=0.01,
            capacity=CapacityConfig(eval_factor=capacity * 5 / LENGTH),
        ),
        width=WIDTH,
        layer=0,
    ).eval()
    router.add_experts(5)
    router.set_rows(theirs.router.classifier.weight)
    x_TD = inputs().flatten(0, 1)
    with torch.no_grad():
        routing = router(x_TD, context())
        experts = [theirs.experts[name] for name in theirs.experts]
        rows = [
            e(part) for e, part in zip(experts, routing.dispatch(x_TD).split(routing.counts_E.tolist()), strict=True)
        ]
        found_TD, expected_TD = routing.combine(torch.cat(rows)), theirs(inputs()).flatten(0, 1)
    torch.testing.assert_close(found_TD, expected_TD, atol=TOLERANCE, rtol=TOLERANCE)
    dropped_T = (routing.expert_ids_TK < 0).squeeze(1)
    assert bool((found_TD[dropped_T] == 0).all()) and bool(dropped_T.any()) == (capacity < LENGTH)
    assert bool((routing.counts_E <= BATCH * capacity).all())


@pytest.mark.parametrize("by_batch", [False, True])
@pytest.mark.parametrize("fraction", [0.1, 0.2, 1.0])
def test_gshard_against_nllbs_router(fraction: float, by_batch: bool) -> None:
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

    settings = transformers.NllbMoeConfig(
        d_model=WIDTH,
        num_experts=6,
        router_dtype="float32",
        router_bias=False,
        second_expert_policy="all",
        normalize_router_prob_before_dropping=True,
        batch_prioritized_routing=by_batch,
        moe_eval_capacity_token_fraction=fraction,
    )
    theirs = NllbMoeTop2Router(settings).eval()
    fill(theirs)
    tokens = BATCH * LENGTH  # one group of all tokens
    capacity = CapacityConfig(
        eval_factor=fraction * 6, priority=Priority.batch if by_batch else Priority.choice, least=1
    )
    router = build_router(routing_of(mode="gshard", capacity=capacity), width=WIDTH, layer=0, causal=False).eval()
    router.add_experts(6)
    router.set_rows(theirs.classifier.weight)
    x_TD = inputs().flatten(0, 1)
    with torch.no_grad():
        routing, (_, expected_TE, _) = router(x_TD, context(1, tokens)), theirs(x_TD)
    kept_TK = routing.expert_ids_TK >= 0
    found_TE = torch.zeros(tokens, 6).scatter_add(
        1, routing.expert_ids_TK.clamp_min(0), routing.weights_TK.masked_fill(~kept_TK, 0.0)
    )
    torch.testing.assert_close(found_TE, expected_TE, atol=TOLERANCE, rtol=TOLERANCE)
    assert bool(kept_TK.all()) == (fraction == 1.0)


def test_z_loss() -> None:
    from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

    logits_TE = torch.randn(30, 7, generator=torch.Generator().manual_seed(0)) * 3
    expected = router_z_loss_func(logits_TE.unsqueeze(0))
    torch.testing.assert_close(router_z_loss(logits_TE, torch.ones(30, dtype=torch.bool)), expected)


def test_balance_loss() -> None:
    """Theirs is K times ours: it does not divide by K, and pools layers before the product."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits_TE = torch.randn(30, 7, generator=torch.Generator().manual_seed(0))
    probs_TE = logits_TE.softmax(1)
    ours = load_balancing_loss(probs_TE, probs_TE.topk(2).indices, torch.ones(30, dtype=torch.bool))
    torch.testing.assert_close(load_balancing_loss_func((logits_TE,), 7, 2), 2 * ours)


@pytest.mark.parametrize(("preset", "published"), [("mixtral", 0.001), ("qwen3_moe", 0.001)])
def test_a_preset_presses_as_transformers_does(preset: str, published: float) -> None:
    """Where layers route alike: pooled before the product, each layer gets its share of one product's gradient."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = read_config(PRESETS / f"{preset}.yaml").config
    logits_TE = torch.randn(30, config.model.experts, generator=torch.Generator().manual_seed(0)).requires_grad_()
    layers, top_k = config.model.layers, config.routing.top_k
    pooled: Any = load_balancing_loss_func((logits_TE,) * layers, config.model.experts, top_k)  # type: ignore[arg-type]
    theirs = published * pooled
    probs_TE = logits_TE.softmax(1)
    ours = load_balancing_loss(probs_TE, probs_TE.topk(top_k).indices, torch.ones(30, dtype=torch.bool))
    found = [torch.autograd.grad(loss, logits_TE, retain_graph=True)[0] for loss in (layers * ours, theirs)]
    torch.testing.assert_close(config.routing.balance_loss * found[0], found[1])


def test_olmoe_presses_as_megablocks_does() -> None:
    """``layers/moe.py`` and ``layers/router.py`` there: 0.01 and 0.001, divided by layers, in float64."""
    config, mask_T = read_config(PRESETS / "olmoe.yaml").config, torch.ones(30, dtype=torch.bool)
    experts, top_k, layers = config.model.experts, config.routing.top_k, config.model.layers
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(30, experts, generator=generator).double().requires_grad_() for _ in range(layers)]
    scores = torch.cat([one.softmax(1) for one in logits], dim=1).mean(0)
    counts = torch.cat([torch.bincount(one.topk(top_k).indices.flatten(), minlength=experts) for one in logits])
    theirs = 0.01 * experts / (layers * 30 * top_k) * (counts.double() * scores).sum()
    theirs = theirs + 0.001 / layers * torch.stack([one.logsumexp(1).square().mean() for one in logits]).sum()
    ours = torch.zeros((), dtype=torch.float64)
    for one in logits:
        balance = load_balancing_loss(one.softmax(1), one.topk(top_k).indices, mask_T)
        ours = ours + config.routing.balance_loss * balance + config.routing.z_loss * router_z_loss(one, mask_T)
    torch.testing.assert_close(ours, theirs)
