"""Published decoders in our model: the same logits as transformers', from weights that it made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lifelong_moe.config.model import ModelConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.interop.checkpoint import from_checkpoint
from lifelong_moe.interop.layout.rope import RopeKeys
from lifelong_moe.model.attention import position_tables
from lifelong_moe.model.cache import KeyValueCache
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from tests.checkpoints import CHECKPOINTS, CONTEXT, LLAMA3, VOCAB, YARN, made

transformers = pytest.importorskip("transformers", reason="parity needs the extra `transformers`")


def ours_of(theirs: Any) -> LanguageModel:
    return from_checkpoint(theirs.config.to_dict(), theirs.state_dict()).eval()


def logits(model: LanguageModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.head.logits(model(TokenBatch(ids)).hidden_BSD)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_same_logits(name: str) -> None:
    theirs = made(name)
    ours, ids = ours_of(theirs), torch.randint(VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
    assert expected.std() > 0.3  # otherwise equality within 1e-5 says little
    torch.testing.assert_close(logits(ours, ids), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["mistral", "llama_yarn", "qwen2"])
def test_the_same_logits_one_token_at_a_time(name: str) -> None:
    ours, ids = ours_of(made(name)), torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    whole, cache = logits(ours, ids), KeyValueCache(3, 20)
    with torch.no_grad():
        parts = [ids[:, :9], *ids[:, 9:].split(1, dim=1)]
        found = [ours.head.logits(ours(TokenBatch(part), cache=cache).hidden_BSD) for part in parts]
    torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=1e-5, rtol=0)


def test_a_window_and_documents_hold_together() -> None:
    ours, ids = ours_of(made("mistral")), torch.randint(VOCAB, (1, 20), generator=torch.Generator().manual_seed(1))
    ours.separates_documents = True
    documents = (torch.arange(20) >= 8).long().unsqueeze(0)
    with torch.no_grad():
        found = ours.head.logits(ours(TokenBatch(ids, document_ids_BS=documents)).hidden_BSD)
    apart = torch.cat([logits(ours, ids[:, :8]), logits(ours, ids[:, 8:])], dim=1)
    torch.testing.assert_close(found, apart, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "llama3", **LLAMA3},
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", **YARN},
        {"rope_type": "yarn", **YARN, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 1.3},
        {"rope_type": "yarn", **YARN, "mscale": 0.8, "mscale_all_dim": 1.1},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    ],
)
def test_frequencies_are_those_of_transformers(rope: dict[str, Any]) -> None:
    width, context = 64, 8192
    config = transformers.LlamaConfig(
        hidden_size=width,
        num_attention_heads=1,
        max_position_embeddings=context,
        rope_parameters={"rope_theta": 5e5, **rope},
    )
    inverse, factor = 1.0 / 5e5 ** (torch.arange(0, width, 2) / width), 1.0
    if rope["rope_type"] != "default":
        inverse, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, None)
    scaling = RopeKeys(**rope).scaling(context)
    ours = ModelConfig(width=width, heads=1, kv_heads=1, rope_base=5e5, rope_scaling=scaling)
    cos, sin = position_tables(ours, 3, torch.device("cpu"))
    angles = torch.cat([inverse, inverse]).double()
    for position in range(3):
        torch.testing.assert_close(cos[position].double(), (angles * position).cos() * factor, atol=1e-6, rtol=0)
        torch.testing.assert_close(sin[position].double(), (angles * position).sin() * factor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"model_type": "gpt2"}, "model_type=gpt2 is not supported; there are llama, mistral"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: must be one of silu, swish, not 'gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias: must be false, not true"),
        ("llama", {"mlp_bias": True}, "mlp_bias: must be false, not true"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: must be null, not .*'bits': 4"),
        ("llama", {"auto_map": {"AutoModel": "own.Model"}}, "auto_map: .*own.Model"),
        ("llama", {"hidden_size": "24"}, "hidden_size: must be a whole number, not '24'"),
        ("llama", {"hidden_size": 10**9}, "model.width=1000000000 must be at most"),
        ("llama", {"num_attention_heads": 0}, "model.heads=0 must be at least 1"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: must be 1"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters.rope_type: .*dynamic"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor: missing"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "ntk"}}, "rope_scaling.type: .*ntk"),
        ("llama", {"rope_parameters": {"mrope_section": [1, 1]}}, "rope_parameters.mrope_section: no such field"),
        ("llama", {"bos_token_id": None, "eos_token_id": None}, "bos_token_id: null, and so is eos_token_id"),
        ("llama", {"bos_token_id": 61, "eos_token_id": None}, "bos_token_id: 61 is no token of 61"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 4, "layer_types": None, "max_window_layers": 1},
            "use_sliding_window: some",
        ),
        ("olmoe", {"norm_topk_prob": 1}, "norm_topk_prob: must be true or false, not 1"),
        ("olmoe", {"num_experts_per_tok": 7}, "num_experts_per_tok: must be at most 6, not 7"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok: 1, and gates that sum to 1 are then all 1"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers: must be the lowest layers, not .1."),
    ],
)
def test_what_we_cannot_express_is_named(name: str, change: dict[str, Any], message: str) -> None:
    theirs = made(name)
    with pytest.raises(ConfigError, match=rf"^config\.json: {message}") as caught:
        from_checkpoint({**theirs.config.to_dict(), **change}, theirs.state_dict())
    assert "\n" not in str(caught.value)
