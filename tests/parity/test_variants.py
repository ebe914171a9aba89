"""Whole models against transformers' where a class exists: normalized queries, wide heads, bounded logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lifelong_moe.config.model import ModelConfig, QKNorm
from lifelong_moe.model.attention import Attention, AttentionContext, rotary_tables
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture, Generation
from tests.conftest import routing_of

transformers = pytest.importorskip("transformers", reason="parity needs the extra `transformers`")
pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH, HEADS, KV_HEADS, HIDDEN, EXPERTS, LAYERS, VOCAB = 16, 4, 2, 12, 8, 2, 50
SHARED: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}


def fill(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.4 * noise)


def tensors(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their numbers under our names."""
    ours = {
        "embedding.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.norm.weight"],
        "head.weight": theirs["lm_head.weight"],
    }
    names = {
        "input_layernorm.weight": "attention_norm.weight",
        "post_attention_layernorm.weight": "moe_norm.weight",
        "self_attn.q_proj.weight": "attention.query.weight",
        "self_attn.k_proj.weight": "attention.key.weight",
        "self_attn.v_proj.weight": "attention.value.weight",
        "self_attn.o_proj.weight": "attention.output.weight",
        "self_attn.q_norm.weight": "attention.query_norm.weight",
        "self_attn.k_norm.weight": "attention.key_norm.weight",
        "mlp.gate.weight": "moe.router.rows.0",
    }
    for layer in range(LAYERS):
        for theirs_name, our_name in names.items():
            ours[f"blocks.{layer}.{our_name}"] = theirs[f"model.layers.{layer}.{theirs_name}"]
        for expert in range(EXPERTS):
            for part, name in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
                stacked = theirs[f"model.layers.{layer}.mlp.experts.{part}"]
                ours[f"blocks.{layer}.moe.banks.experts.{expert}.{name}"] = stacked[expert]
    return ours


@pytest.mark.parametrize(
    ("kind", "more", "model", "renormalize"),
    [
        ("Olmoe", {"intermediate_size": HIDDEN, "norm_topk_prob": False}, {"qk_norm": QKNorm.full}, False),
        (
            "Qwen3Moe",
            {
                "moe_intermediate_size": HIDDEN,
                "norm_topk_prob": True,
                "head_dim": 6,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            },
            {"qk_norm": QKNorm.head, "head_width": 6},
            True,
        ),
    ],
)
def test_whole_models(kind: str, more: dict[str, Any], model: dict[str, Any], renormalize: bool) -> None:
    theirs = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**SHARED, **more)
    ).eval()
    fill(theirs)
    shape = ModelConfig(
        layers=LAYERS,
        width=WIDTH,
        heads=HEADS,
        kv_heads=KV_HEADS,
        expert_width=HIDDEN,
        experts=EXPERTS,
        context=16,
        **model,
    )
    routing = routing_of(top_k=3, renormalize=renormalize)
    ours = LanguageModel(Architecture(shape, routing, VOCAB, 0, (Generation("a", EXPERTS),))).eval()
    ours.load_state_dict(tensors(dict(theirs.state_dict())))
    ids = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = ours.head.logits(ours(TokenBatch(ids)).hidden_BSD), theirs(ids).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)  # of logits around 3 after two layers


def test_bounded_attention() -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention

    settings = transformers.Gemma2Config(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=WIDTH // HEADS,
        query_pre_attn_scalar=WIDTH // HEADS,
        attn_logit_softcapping=2.0,
        sliding_window=64,
        attn_implementation="eager",
    )
    theirs = Gemma2Attention(settings, layer_idx=1).eval()
    fill(theirs)
    ours = Attention(ModelConfig(width=WIDTH, heads=HEADS, kv_heads=KV_HEADS, attention_softcap=2.0, context=16)).eval()
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    ours.load_state_dict({f"{a}.weight": theirs.state_dict()[f"{b}.weight"] for a, b in names.items()})
    x = torch.randn(2, 16, WIDTH, generator=torch.Generator().manual_seed(1)) * 3
    cos, sin = rotary_tables(16, WIDTH // HEADS, 10_000.0, torch.device("cpu"))
    mask = torch.full((16, 16), float("-inf")).triu(1).expand(2, 1, 16, 16)
    with torch.no_grad():
        found = ours(x, AttentionContext((cos, sin)))
        expected = theirs(x, (cos.expand(2, -1, -1), sin.expand(2, -1, -1)), mask)[0]
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=5e-6)
    uncapped = Attention(ModelConfig(width=WIDTH, heads=HEADS, kv_heads=KV_HEADS, context=16))
    uncapped.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert float((uncapped(x, AttentionContext((cos, sin))) - expected).abs().max()) > 0.1
