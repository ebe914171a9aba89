"""Models as Mixtral checkpoints, which transformers, vLLM and lm-evaluation-harness read."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lifelong_moe.config.model import LATER, ModelConfig
from lifelong_moe.config.routing.topk import LearnedConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.interop.checkpoint import tensors_of, written
from lifelong_moe.interop.layout.families import read_family
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture

ONLY_PLAIN = (
    "activation", "moe_every", "dense_layers", "shared_experts", "head_width", "qk_norm", "attention_softcap",
    "embedding_scale", "logit_scale", "sandwich_norms", *LATER,
)  # fmt: skip
"""Keys of ``model`` that must have their defaults, since Mixtral lacks these features."""


def to_mixtral(model: LanguageModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert a model to the ``config.json`` and the tensors of a ``MixtralForCausalLM``.

    Args:
        model: With learned routing; not changed.

    Returns:
        JSON data, and copies of the weights on the CPU, ready for ``safetensors.torch.save_file``.

    Raises:
        ConfigError: If Mixtral cannot express the model.
    """
    _require_expressible(model.architecture)
    config, ours = _mixtral_config(model.architecture), model.state_dict()
    # Experts of all generations in order of creation, as their rows.
    family = read_family(config, "Mixtral's form of this model")
    return config, {one.name: written(one, ours) for one in tensors_of(model, family)}


def _require_expressible(architecture: Architecture) -> None:
    """Raise :class:`ConfigError` for what Mixtral does not have."""
    routing = architecture.routing
    if not isinstance(routing, LearnedConfig):
        raise ConfigError(f"routing.mode={routing.mode} has no Mixtral form; only learned routing can be exported.")
    if routing.by_generation and len(architecture.generations) > 1:
        raise ConfigError(
            f"routing.bundles={routing.bundles} has no Mixtral form: in Mixtral every token may use any expert."
        )
    if any(g.layers is not None or g.by_layer is not None for g in architecture.generations):
        raise ConfigError("grow.layers has no Mixtral form: in Mixtral all layers have the same number of experts.")
    if routing.score != "softmax" or routing.bias_rate or routing.expert_groups > 1 or routing.gate_scale != 1:
        raise ConfigError(
            "routing.score, bias_rate, expert_groups and gate_scale have no Mixtral form; leave them at their defaults."
        )
    plain = ModelConfig()
    for key in ONLY_PLAIN:
        if getattr(architecture.model, key) != getattr(plain, key):
            raise ConfigError(f"model.{key}={getattr(architecture.model, key)} has no Mixtral form.")
    if routing.capacity is not None:
        raise ConfigError("routing.capacity has no Mixtral form: Mixtral drops no tokens.")
    if not routing.renormalize:
        raise ConfigError("routing.renormalize=false has no Mixtral form: Mixtral always renormalizes gate weights.")


def _mixtral_config(architecture: Architecture) -> dict[str, Any]:
    model = architecture.model
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": architecture.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.expert_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "num_local_experts": architecture.num_experts,
        "num_experts_per_tok": architecture.routing.top_k,
        "hidden_act": "silu",
        "max_position_embeddings": model.context,
        "sliding_window": None,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_base,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        # A document ends where the next one begins: BOS is EOS too.
        "bos_token_id": architecture.bos_id,
        "eos_token_id": architecture.bos_id,
        "dtype": "float32",
    }
