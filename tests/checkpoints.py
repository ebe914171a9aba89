"""Tiny random checkpoints of published architectures, made by transformers, which is imported on use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lifelong_moe.data.tokens.tokenizer import train_tokenizer
from lifelong_moe.model.transformer import LanguageModel
from tests.tiny import tiny_config

VOCAB, CONTEXT = 61, 48
SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": CONTEXT,
    # Larger weights make larger logits, which differ by more than 1e-5 through rounding alone.
    "initializer_range": 0.1,
    "bos_token_id": 1,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 12}
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-4}),
    "llama_wide_heads": ("Llama", {"head_dim": 10, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama_llama3": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 900.0, **LLAMA3}}),
    "llama_linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama_yarn": ("Llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **YARN}}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral_without_window": ("Mistral", {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    "qwen3": ("Qwen3", {"head_dim": 6}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3}),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "clip_qkv": 0.5, "norm_topk_prob": False}),
    "olmoe_renormalized": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 6,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
        },
    ),
    # Its class adds a shared expert, which we have none of.
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "qwen3_moe_some_dense": (
        "Qwen3Moe",
        {
            "head_dim": 4,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "norm_topk_prob": False,
            "mlp_only_layers": [0],
        },
    ),
}


def made(name: str, **more: Any) -> Any:
    """A random model of transformers; norms and biases are random as well."""
    import transformers

    kind, keys = CHECKPOINTS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SHARED, **keys, **more})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
        for name, parameter in model.named_parameters():
            if ".shared_expert" in name:
                parameter.zero_()
    return model


def write_checkpoint(
    name: str, folder: str = "ck", dtype: torch.dtype = torch.float32, texts: list[str] | None = None, **more: Any
) -> None:
    """Write one with a tokenizer, by default trained on ``fruit.jsonl``."""
    if texts is None:
        texts = [json.loads(line)["text"] for line in Path("fruit.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer = train_tokenizer(texts, 300)
    # More rows than tokens, as Qwen has.
    theirs = made(name, **{"vocab_size": 304, "bos_token_id": 0, "max_position_embeddings": 64, **more}).to(dtype)
    theirs.save_pretrained(folder)
    tokenizer.save(Path(folder) / "tokenizer.json")


def config_of(*, bundles: bool = False) -> dict[str, Any]:
    """Two stages after a checkpoint; with bundles, old text is read by the checkpoint alone, whatever they learn."""
    config = tiny_config()
    config |= {"tokenizer": {}, "routing": {"bundles": "label"} if bundles else {}}
    config["model"] = {"from": "ck", "context": 32, "document_mask": bundles}
    config["stage_defaults"] |= {
        "grow": {"experts": 3, "sample_tokens": 512},
        "replay": {"fraction": 0.0},
        "distill": {"text": "new", "weight": 0.0 if bundles else 0.5},
        "trunk": {"train": "frozen" if bundles else "gentle"},
    }
    return config


def fill_changes(model: LanguageModel) -> None:
    """Random changes of low-rank experts, which begin as changes of zero."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".banks." in name and name.endswith("_b"):
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
