"""Bounded logits of attention against transformers'."""

from __future__ import annotations

import pytest
import torch

from lifelong_moe.config.model import ModelConfig
from lifelong_moe.model.attention import Attention, AttentionContext
from lifelong_moe.ops.rotary import inverse_frequencies, rotary_tables

transformers = pytest.importorskip("transformers", reason="parity needs the extra `transformers`")
pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH, HEADS, KV_HEADS = 16, 4, 2


def fill(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.4 * noise)


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
    cos, sin = rotary_tables(16, inverse_frequencies(WIDTH // HEADS, 10_000.0))
    mask = torch.full((16, 16), float("-inf")).triu(1).expand(2, 1, 16, 16)
    with torch.no_grad():
        found = ours(x, AttentionContext((cos, sin)))
        expected = theirs(x, (cos.expand(2, -1, -1), sin.expand(2, -1, -1)), mask)[0]
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=5e-6)
    uncapped = Attention(ModelConfig(width=WIDTH, heads=HEADS, kv_heads=KV_HEADS, context=16))
    uncapped.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert float((uncapped(x, AttentionContext((cos, sin))) - expected).abs().max()) > 0.1
