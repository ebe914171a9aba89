"""`config.json` of a model as others read it: the architecture that has everything which the model has. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lifelong_moe.config.model import ModelConfig, RopeScaling
from lifelong_moe.config.routing.topk import LearnedConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.interop.layout.families import (
    FAMILIES,
    Family,
    Mixtral,
    Olmoe,
    Qwen2Moe,
    QwenMixture,
    read_family,
)

KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
"""Keys of an imported checkpoint that say nothing of the shape, and go out as they came in."""
BLOCK = 32
"""Numbers of a row that llama.cpp quantizes together (``QK8_0`` and ``QK4_0`` of ggml)."""


def written_config(
    model: ModelConfig, routing: LearnedConfig, vocab_size: int, kept: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """The ``config.json`` of a model of one generation, read back and found to be that model.

    Args:
        model: Its shape, alike in all layers that have experts.
        routing: Its router; of one expert it does not matter.
        vocab_size: Rows of the embedding.
        kept: ``model_type`` of the checkpoint that it was grown from, which is preferred, and keys of :data:`KEPT`.
        dtype: Of its numbers, such as ``float32``.

    Raises:
        ConfigError: No architecture has all of it; names for each what it lacks.
    """
    lacking: dict[str, list[str]] = {}
    for kind in _candidates(model, kept.get("model_type")):
        config = _keys(kind, model, routing) | {"vocab_size": vocab_size, "dtype": dtype}
        config |= {key: kept[key] for key in KEPT if key in kept}
        if not (lacks := _lacks(config, model, routing)):
            return config
        lacking[kind.class_name] = lacks
    said = "; ".join(f"{name} lacks {', '.join(lacks)}" for name, lacks in lacking.items())
    raise ConfigError(f"no architecture that others read has all of this model: {said}.")


def _candidates(model: ModelConfig, preferred: object) -> list[type[Family]]:
    """Architectures in the order of preference: the checkpoint's own, then the simplest."""
    is_mixture = model.most_experts > 1 or len(model.moe_layers) < model.layers
    kinds = [kind for kind in FAMILIES.values() if kind.is_mixture == is_mixture]
    return sorted(kinds, key=lambda kind: kind.model_type != preferred)


def _lacks(config: Mapping[str, Any], model: ModelConfig, routing: LearnedConfig) -> list[str]:
    """Keys of ours that a ``config.json`` does not express, with their values."""
    try:
        family = read_family(config, "its config.json")
    except ConfigError:
        # Mixtral's gates sum to 1, which is refused for a single expert.
        if routing.top_k > 1 or routing.renormalize:
            raise
        return [f"routing.renormalize={routing.renormalize} with top_k={routing.top_k}"]
    # A run's own context may be shorter than that of its checkpoint, which goes out again.
    model = dataclasses.replace(model, context=family.max_position_embeddings)
    pairs: list[tuple[str, Any, Any]] = [("model", family.model().effective(), model.effective())]
    if model.most_experts > 1:
        wanted = LearnedConfig(top_k=routing.top_k, renormalize=routing.renormalize)
        pairs.append(("routing", family.routing(), wanted))
    return [
        f"{section}.{field.name}={getattr(wanted, field.name)}"
        for section, found, wanted in pairs
        for field in dataclasses.fields(wanted)
        if getattr(found, field.name) != getattr(wanted, field.name)
    ]


def _keys(kind: type[Family], model: ModelConfig, routing: LearnedConfig) -> dict[str, Any]:
    """Keys of an architecture, as close to a model as it comes."""
    keys = {
        "architectures": [kind.class_name],
        "model_type": kind.model_type,
        "hidden_size": model.width,
        "intermediate_size": model.expert_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.attention_width,
        "hidden_act": "silu",
        "max_position_embeddings": model.context,
        "rms_norm_eps": model.norm_eps,
        # In the form before transformers 5, which 5 reads too.
        "rope_theta": model.rope_base,
        "rope_scaling": _rope(model.rope_scaling),
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
    }
    if kind.has_window:
        keys["sliding_window"] = model.window
        names = {field.name for field in dataclasses.fields(kind)}
        keys |= {"use_sliding_window": model.window is not None} if "use_sliding_window" in names else {}
        keys |= {"max_window_layers": 0} if "max_window_layers" in names else {}
        if kind is Qwen2Moe and model.window is not None:  # whose layers take turns otherwise
            keys |= {"layer_types": ["sliding_attention"] * model.layers}
    return keys | _mixture_keys(kind, model, routing)


def _rope(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    given = {field.name: (getattr(scaling, field.name), field.default) for field in dataclasses.fields(scaling)}
    needed = {"rope_type", "factor"}
    needed |= {"low_freq_factor", "high_freq_factor"} if scaling.rope_type == "llama3" else set()
    kept = {key: value for key, (value, default) in given.items() if key in needed or value != default}
    return kept | {"rope_type": str(scaling.rope_type)}


def _mixture_keys(kind: type[Family], model: ModelConfig, routing: LearnedConfig) -> dict[str, Any]:
    if not kind.is_mixture:
        return {}
    keys: dict[str, Any] = {"num_experts_per_tok": min(routing.top_k, model.most_experts)}
    if kind is Mixtral:
        return keys | {"num_local_experts": model.most_experts}
    keys |= {"num_experts": model.most_experts, "norm_topk_prob": routing.renormalize}
    if kind is Olmoe:
        return keys | {"clip_qkv": model.qkv_clip}
    if kind is Qwen2Moe:
        keys |= {"qkv_bias": model.attention_bias, "shared_expert_intermediate_size": BLOCK}
    if issubclass(kind, QwenMixture):
        keys |= {"moe_intermediate_size": model.expert_width, "decoder_sparse_step": model.moe_every}
        keys |= {"intermediate_size": model.dense_width or model.expert_width}
        keys |= {"mlp_only_layers": list(range(model.dense_layers))}
    return keys


def unread(config: Mapping[str, Any]) -> list[str]:
    """What some programs that read checkpoints cannot do with this one, a sentence each, by the name of its key."""
    said = []
    rows = ("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim")
    odd = [f"{key}={config[key]}" for key in rows if config.get(key, 0) % BLOCK]
    if odd:
        said.append(f"llama.cpp cannot quantize rows that are no multiples of {BLOCK}: {', '.join(odd)}.")
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) > 1:
        said.append("llama.cpp has Qwen's experts in every layer: mlp_only_layers, decoder_sparse_step.")
    if config.get("qkv_bias") is False:
        said.append("not every program reads a Qwen2-MoE without biases: qkv_bias=False.")
    if config.get("clip_qkv") is not None:
        said.append(
            f"not every program cuts queries, keys and values as transformers does: clip_qkv={config['clip_qkv']}."
        )
    return said
