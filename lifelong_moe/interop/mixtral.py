"""Convert to and from Mixtral checkpoints, as transformers, vLLM and lm-evaluation-harness read them from disk.

Both directions work on plain data and do not need transformers. In memory, transformers 5 fuses a layer's experts into
3-D tensors; on disk, each expert has its own ``w1`` (gate), ``w2`` (down) and ``w3`` (up).

Legend: D model width, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.routing.topk import LearnedConfig
from lifelong_moe.errors import CheckpointError, ConfigError
from lifelong_moe.model.moe import MoELayer
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture, Generation

BLOCK_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "moe_norm.weight": "post_attention_layernorm.weight",
}
"""Name of a block's tensor here → in Mixtral."""
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
    "bos_token_id",
)
"""Keys that a Mixtral config must have; all are integers."""
ONLY_PLAIN = (
    "activation", "moe_every", "dense_layers", "shared_experts", "head_width", "qk_norm", "attention_softcap",
    "embedding_scale", "logit_scale", "sandwich_norms",
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
    tensors = {name: _copy(tensor) for name, tensor in _shared_tensors(model)}
    for i, layer in enumerate(model.moe_layers()):
        # Experts of all generations in order of creation, as their rows.
        tensors[f"{_moe_prefix(i)}.gate.weight"] = _copy(torch.cat(list(layer.router.rows)))  # type: ignore[arg-type]
        tensors |= {name: _copy(tensor) for name, tensor in _expert_tensors(i, layer)}
    return _mixtral_config(model.architecture), tensors


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


def from_mixtral(config: Mapping[str, Any], state_dict: Mapping[str, Tensor], stage: str = "mixtral") -> LanguageModel:
    """Convert a Mixtral checkpoint to a model whose experts are all of the first generation.

    Args:
        config: The checkpoint's ``config.json``.
        state_dict: Its tensors under their names on disk, any floating-point type; the model is float32.
        stage: Name of the stage that the experts are attributed to.

    Returns:
        A model on the CPU, all of it trainable.

    Raises:
        ConfigError: If the config needs a feature that our decoder lacks.
        CheckpointError: If a tensor is missing, unknown or of the wrong shape.
    """
    model = LanguageModel(_architecture(config, stage))
    # Views of the model's own parameters, under the names that the checkpoint must have.
    expected = dict(_shared_tensors(model))
    found = dict(state_dict)
    if model.architecture.model.tie_embeddings:
        found.pop("lm_head.weight", None)  # some writers store the copy
    for i, layer in enumerate(model.moe_layers()):
        expected[f"{_moe_prefix(i)}.gate.weight"] = layer.router.rows[0]  # type: ignore[index]
        expected |= _expert_tensors(i, layer)
    # Names before shapes: a missing tensor explains more than a wrong one.
    _check_names(set(expected), set(found))
    with torch.no_grad():
        for name, target in expected.items():
            if found[name].shape != target.shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(found[name].shape)}, but its config asks for {tuple(target.shape)}."
                )
            target.copy_(found[name])
    return model


def _shared_tensors(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Tensors of everything but experts and routers, under Mixtral's names."""
    yield "model.embed_tokens.weight", model.embedding.weight
    for i, block in enumerate(model.blocks):
        for ours, theirs in BLOCK_NAMES.items():
            yield f"model.layers.{i}.{theirs}", block.get_parameter(ours)
    yield "model.norm.weight", model.norm.weight
    if not model.architecture.model.tie_embeddings:
        yield "lm_head.weight", model.head.weight


def _moe_prefix(layer: int) -> str:
    return f"model.layers.{layer}.block_sparse_moe"


def _expert_tensors(index: int, layer: MoELayer) -> Iterator[tuple[str, Tensor]]:
    """A layer's expert matrices under Mixtral's names: views of our own."""
    for e, (gate_up, down_DF) in enumerate(layer.banks.matrices()):
        # Our gate and up projections are one matrix, gate first.
        gate_FD, up_FD = gate_up.chunk(2)
        for name, tensor in (("w1", gate_FD), ("w2", down_DF), ("w3", up_FD)):
            yield f"{_moe_prefix(index)}.experts.{e}.{name}.weight", tensor


def _copy(tensor: Tensor) -> Tensor:
    # Contiguous: safetensors refuses views.
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


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


def _architecture(config: Mapping[str, Any], stage: str) -> Architecture:
    """The architecture of a Mixtral config; every key that changes the computation is checked."""
    for key, wanted in {"model_type": "mixtral", "hidden_act": "silu"}.items():
        if config.get(key) != wanted:
            raise ConfigError(f"Mixtral config: {key}={config.get(key)} is not supported; only {wanted} is.")
    # Ignoring either of these would load, and compute something else.
    for key in ("sliding_window", "quantization_config"):
        if config.get(key) is not None:
            raise ConfigError(f"Mixtral config: {key}={config[key]} is not supported; it must be null.")
    for key in REQUIRED:
        if not isinstance(config.get(key), int):
            raise ConfigError(f"Mixtral config: {key}={config.get(key)} must be an integer.")
    head_width = config["hidden_size"] // config["num_attention_heads"]
    if config.get("head_dim") not in (None, head_width):
        raise ConfigError(
            f"Mixtral config: head_dim={config['head_dim']} is not supported; it must be hidden_size / "
            f"num_attention_heads = {head_width}."
        )
    return Architecture(
        model=ModelConfig(
            layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            expert_width=config["intermediate_size"],
            experts=config["num_local_experts"],
            context=config["max_position_embeddings"],
            rope_base=_rope_base(config),
            norm_eps=config.get("rms_norm_eps", 1e-5),
            tie_embeddings=config.get("tie_word_embeddings", False),
            init_std=config.get("initializer_range", 0.02),
        ),
        routing=LearnedConfig(top_k=config["num_experts_per_tok"]),
        vocab_size=config["vocab_size"],
        bos_id=config["bos_token_id"],
        generations=(Generation(stage, config["num_local_experts"]),),
    )


def _rope_base(config: Mapping[str, Any]) -> float:
    """The rotary base."""
    # Transformers 5 writes ``rope_parameters``, earlier versions ``rope_theta`` and ``rope_scaling``.
    rope = config.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    scaling = config.get("rope_scaling")
    if kind != "default" or (scaling and scaling.get("rope_type", scaling.get("type")) != "default"):
        raise ConfigError(f"Mixtral config: rotary scaling {scaling or rope} is not supported; it must be the default.")
    return float(rope.get("rope_theta", config.get("rope_theta", 1e6)))


def _check_names(expected: set[str], found: set[str]) -> None:
    if missing := sorted(expected - found):
        fused = any(".mlp.experts." in name for name in found)
        hint = " Its experts are fused, as in memory; pass the tensors of a saved checkpoint." if fused else ""
        raise CheckpointError(f"{len(missing)} of {len(expected)} tensors are missing, such as {missing[0]}.{hint}")
    if unknown := sorted(found - expected):
        raise CheckpointError(f"{unknown[0]} is not a tensor of a Mixtral with this config.")
