"""Variants of the transformer: what they compute by hand, and that costs count what there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lifelong_moe.config.model import Activation, ModelConfig, QKNorm, RopeScaling, RopeType, SharedMix
from lifelong_moe.errors import ConfigError
from lifelong_moe.model.attention import softcapped_attention
from lifelong_moe.model.cache import KeyValueCache
from lifelong_moe.model.feedforward import FeedForward, feed_forward
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel, initialize
from lifelong_moe.ops.window import window_mask
from lifelong_moe.plan.architecture import Architecture, Generation, first_generation
from lifelong_moe.plan.cost import count_parameters, forward_flops_per_token
from tests.conftest import VOCAB, routing_of

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "every other layer": {"moe_every": 2, "dense_activation": Activation.geglu, "dense_width": 12},
    "dense at the bottom": {"dense_layers": 1},
    "pyramid": {"experts": [2, 2, 4, 6]},
    "pyramid every other layer": {"experts": [2, 5], "moe_every": 2},
    "not gated": {"activation": Activation.gelu},
    "shared": {"shared_experts": 2},
    "residual": {"shared_experts": 1, "shared_mix": SharedMix.learned, "activation": Activation.relu},
    "wide heads": {"head_width": 6, "qk_norm": QKNorm.head},
    "normalized queries": {"qk_norm": QKNorm.full},
    "biases": {"attention_bias": True},
    "cut queries": {"qk_norm": QKNorm.full, "qkv_clip": 0.7},
    "window": {"window": 5},
    "window and bounds": {"window": 3, "attention_softcap": 5.0},
    "longer context": {
        "rope_scaling": RopeScaling(rope_type=RopeType.yarn, factor=4.0, original_max_position_embeddings=8)
    },
    "grok": {
        "activation": Activation.geglu,
        "attention_softcap": 30.0,
        "embedding_scale": 4.0,
        "logit_scale": 0.577,
        "sandwich_norms": True,
    },
}
ROUTINGS: dict[str, dict[str, Any]] = {
    "learned": {},
    "noisy": {"mode": "noisy_topk"},
    "vmoe": {"mode": "vmoe"},
    "hierarchical": {"mode": "hierarchical", "top_k": 4, "expert_groups": 2, "top_groups": 2},
    "dense": {"mode": "dense"},
    "hash": {"mode": "hash"},
}


def architecture(shape: dict[str, Any], routing: dict[str, Any] | None = None, *, grown: int = 0) -> Architecture:
    """Four layers of width 16, perhaps with a second generation in those that have a mixture."""
    sizes: dict[str, Any] = {"layers": 4, "width": 16, "heads": 4, "kv_heads": 2, "expert_width": 8, "context": 16}
    model = ModelConfig(**(sizes | {"init_std": 0.3} | shape))
    first = first_generation("s0", model)
    made = Architecture(model, routing_of(**(routing or {})), VOCAB, 0, (first,))
    return made.grown(Generation("s1", grown, model.moe_layers)) if grown else made


def model_of(made: Architecture) -> LanguageModel:
    model = LanguageModel(made)
    initialize(model, 0)
    return model.eval()


def tokens() -> torch.Tensor:
    return torch.randint(1, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grown", [0, 2])
def test_parameters_are_counted_as_they_are(shape: str, grown: int) -> None:
    made = architecture(SHAPES[shape], grown=grown)
    with torch.device("meta"):
        model = LanguageModel(made)
    counted = count_parameters(made)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.trunk == sum(p.numel() for p in model.trunk_parameters().values())
    assert counted.unfrozen == sum(
        p.numel() for n, p in model.named_parameters() if p.requires_grad and n not in model.trunk_parameters()
    )
    assert 0 < counted.active <= counted.total and forward_flops_per_token(made) > 0


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    "shape", [{"experts": 8}, {"experts": 8, "moe_every": 2}, {"experts": [6, 8], "moe_every": 2}], ids=str
)
@pytest.mark.parametrize("grown", [0, 2, 4])
def test_routers_are_counted_as_they_are(routing: str, shape: dict[str, Any], grown: int) -> None:
    made = architecture(shape, ROUTINGS[routing], grown=grown)
    with torch.device("meta"):
        model = LanguageModel(made)
    counted = count_parameters(made)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert (counted.active == counted.total) == (routing == "dense")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_survives_json_runs_and_learns(shape: str) -> None:
    made = architecture(SHAPES[shape], grown=2)
    assert Architecture.from_json(made.to_json()) == made
    model = model_of(made).train()
    output = model(TokenBatch(tokens()))
    assert [r.num_experts for r in output.routings] == [made.experts_in(layer) for layer in range(4)]
    loss = model.head.cross_entropy(output.hidden_BSD[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.numel():
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("shape", SHAPES)
def test_a_cache_changes_nothing(shape: str) -> None:
    model = model_of(architecture(SHAPES[shape]))
    with torch.no_grad():
        whole = model(TokenBatch(tokens())).hidden_BSD
        cache = KeyValueCache(len(model.blocks), 16)
        model(TokenBatch(tokens()[:, :9]), cache=cache)
        for position in range(9, 16):
            output = model(TokenBatch(tokens()[:, position : position + 1]), cache=cache)
    torch.testing.assert_close(output.hidden_BSD[:, 0], whole[:, -1], atol=2e-5, rtol=0)


def test_feed_forward_by_hand() -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    functions: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
        Activation.swiglu: F.silu,
        Activation.geglu: lambda z: 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
        Activation.gelu: lambda z: z * torch.special.ndtr(z),
        Activation.relu: lambda z: z.clamp(min=0),
    }
    for activation, function in functions.items():
        network = FeedForward(4, 3, activation)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        if activation.is_gated:
            gate, up = network.gate_up.split(3)
            expected = (function(x @ gate.t()) * (x @ up.t())) @ network.down.t()
        else:
            expected = function(x @ network.up.t()) @ network.down.t()
        torch.testing.assert_close(network(x), expected)
        into_GD = network.gate_up if activation.is_gated else network.up
        torch.manual_seed(0)
        dropped, again = (
            feed_forward(x, into_GD=into_GD, down_DF=network.down, activation=activation, dropout=0.5) for _ in range(2)
        )
        assert not torch.equal(dropped, again)


def test_residual_layer_by_hand() -> None:
    model = model_of(architecture(SHAPES["residual"]))
    layer = next(iter(model.moe_layers()))
    assert layer.shared is not None and layer.mix is not None
    x, context = (
        torch.randn(32, 16, generator=torch.Generator().manual_seed(0)),
        model._routing_context(TokenBatch(tokens()), None),
    )
    routing = layer.router(x, context)
    routed = routing.combine(layer.banks(routing.dispatch(x), routing.counts_E))
    share = (x @ layer.mix.weight.t() + layer.mix.bias).softmax(dim=1)
    torch.testing.assert_close(layer(x, context)[0], share[:, :1] * routed + share[:, 1:] * layer.shared(x))


def test_softcap_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 4, generator=generator) * 20 for _ in range(3))
    found = softcapped_attention(query, key, value, None, 3.0, is_causal=True)
    for head in range(2):
        for position in range(5):
            logits = 3 * torch.tanh(key[0, head, : position + 1] @ query[0, head, position] / 2 / 3)
            expected = logits.softmax(0) @ value[0, head, : position + 1]
            torch.testing.assert_close(found[0, head, position], expected)
    wide = softcapped_attention(query, key, value, None, 1e6, is_causal=True)
    torch.testing.assert_close(
        wide, F.scaled_dot_product_attention(query, key, value, is_causal=True), atol=1e-3, rtol=1e-3
    )


def test_scales_scale() -> None:
    plain, scaled = model_of(architecture({})), model_of(architecture({"logit_scale": 0.5, "embedding_scale": 3.0}))
    with torch.no_grad():
        scaled.embedding.weight /= 3
        found, expected = (m.head.logits(m(TokenBatch(tokens())).hidden_BSD) for m in (scaled, plain))
        torch.testing.assert_close(found, expected / 2)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"moe_every": 9}, r"model\.moe_every=9 .* leaves none of 4 layers"),
        ({"experts": [2, 2]}, r"model\.experts=\[2, 2\] must name a number for each of the 4 layers"),
        ({"experts": 2.5}, r"model\.experts=2\.5 must be a whole number"),
        ({"experts": [2, 2, 0, 2]}, "must be at least 1"),
        ({"head_width": 5}, r"model\.head_width=5 must be even"),
        ({"shared_mix": SharedMix.learned}, r"set model\.shared_experts above 0"),
        ({"attention_softcap": 0.0}, r"model\.attention_softcap=0\.0 must be positive"),
        ({"dense_width": 0}, r"model\.dense_width=0 must be at least 1"),
        ({"qkv_clip": 0.0}, r"model\.qkv_clip=0\.0 must be positive"),
        ({"window": 0}, r"model\.window=0 must be positive"),
    ],
)
def test_mistakes(shape: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        architecture(shape)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"factor": 0.5}, r"model\.rope_scaling\.factor=0\.5 must be at least 1"),
        ({"factor": float("nan")}, r"model\.rope_scaling\.factor=nan must be positive"),
        ({"rope_type": RopeType.llama3}, "rope_type=llama3 needs original_max_position_embeddings"),
        ({"truncate": False}, r"rope_scaling\.truncate=False has no effect on linear"),
        ({"rope_type": RopeType.llama3, "beta_fast": 9.0}, r"rope_scaling\.beta_fast=9\.0 has no effect on llama3"),
        (
            {"rope_type": RopeType.yarn, "original_max_position_embeddings": 8, "beta_slow": 40.0},
            r"rope_scaling\.beta_slow=40\.0 must be below beta_fast",
        ),
    ],
)
def test_mistakes_of_a_longer_context(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RopeScaling(**keys)


def test_biases_begin_at_zero() -> None:
    model = model_of(architecture({"attention_bias": True}))
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("before", [0, 4])
def test_a_window_by_hand(before: int) -> None:
    mask = window_mask(3, 3 + before, 2, torch.device("cpu"))
    assert mask.shape == (1, 1, 3, 3 + before)
    for query in range(3):
        seen = mask[0, 0, query].nonzero().flatten().tolist()
        assert seen == [at for at in (before + query - 1, before + query) if at >= 0]


def test_a_window_as_long_as_the_text_changes_no_bit() -> None:
    plain, wide = (model_of(architecture(shape)) for shape in ({}, {"window": 16}))
    with torch.no_grad():
        assert torch.equal(plain(TokenBatch(tokens())).hidden_BSD, wide(TokenBatch(tokens())).hidden_BSD)
