"""Parameters and floating-point operations from the shape alone. Torch-free, so that a plan costs nothing."""

from __future__ import annotations

from dataclasses import dataclass

from lifelong_moe.model.architecture import Architecture
from lifelong_moe.model.config import Activation, ModelConfig, QKNorm, SharedMix


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers a model has, uses per token, and trains."""

    total: int
    """All parameters."""
    active: int
    """Those that one token's forward pass uses: trunk, one bundle's deltas, router, ``top_k`` experts a layer."""
    trunk: int
    """Attention, norms, embedding and head."""
    per_expert: int
    """One expert."""
    unfrozen: int
    """Experts, router rows and deltas of the generations that are not frozen."""


def count_parameters(architecture: Architecture) -> ParameterCount:
    """Count parameters without building the model."""
    config = architecture.model
    head_width, layers = config.attention_width, range(config.layers)
    attention = 2 * config.width * head_width * (config.heads + config.kv_heads)
    norms = config.width * (4 if config.sandwich_norms else 2) + _qk_norm_parameters(config)
    tables = architecture.vocab_size * config.width * (1 if config.tie_embeddings else 2)
    shared = sum(_shared_parameters(architecture, layer) for layer in layers)
    trunk = config.layers * (attention + norms) + config.width + tables + shared
    per_expert = _feed_forward(config.width, config.expert_width, config.activation)
    row, per_generation = _row_parameters(architecture)
    generations = architecture.generations
    experts = [sum(generation.experts_in(layer) for layer in layers) for generation in generations]
    rest = [per_generation * sum(g.experts_in(layer) > 0 for layer in layers) for g in generations]
    used = sum(min(architecture.experts_in(layer), _used_experts(architecture, layer)) for layer in layers)
    deltas = [g.delta_rank * _delta_parameters_per_rank(architecture) for g in generations]
    training = [g for g in range(len(generations)) if architecture.trains(g)]
    return ParameterCount(
        total=trunk + sum(experts) * (per_expert + row) + sum(rest) + sum(deltas),
        active=trunk + used * per_expert + sum(experts) * row + sum(rest) + max(deltas),
        trunk=trunk,
        per_expert=per_expert,
        unfrozen=sum(experts[g] * (per_expert + row) + rest[g] + deltas[g] for g in training),
    )


def _feed_forward(width: int, hidden_width: int, activation: Activation) -> int:
    return (3 if activation.is_gated else 2) * width * hidden_width


def _used_experts(architecture: Architecture, layer: int) -> int:
    """Experts that a token uses in a layer, on average where that varies."""
    return architecture.experts_in(layer) if architecture.routing.mode == "dense" else architecture.routing.top_k


def _qk_norm_parameters(config: ModelConfig) -> int:
    heads = {QKNorm.none: 0, QKNorm.head: 2, QKNorm.full: config.heads + config.kv_heads}[config.qk_norm]
    return heads * config.attention_width


def _shared_parameters(architecture: Architecture, layer: int) -> int:
    """Of what every token uses in a layer beside attention: a dense network, or shared experts and their mix."""
    config = architecture.model
    if layer not in config.moe_layers:
        dense_width = config.dense_width or config.expert_width * architecture.routing.top_k
        return _feed_forward(config.width, dense_width, config.dense_activation)
    mix = 2 * config.width + 2 if config.shared_mix == SharedMix.learned else 0
    return _feed_forward(config.width, config.shared_experts * config.expert_width, config.activation) + mix


def _row_parameters(architecture: Architecture) -> tuple[int, int]:
    """Of a router: by expert, and besides by generation and layer."""
    routing, width = architecture.routing, architecture.model.width
    if not routing.has_rows:
        return 0, 0
    by_generation = routing.expert_groups * width if routing.mode == "hierarchical" else 0
    return (2 * width if routing.mode == "noisy_topk" else width), by_generation


def _delta_parameters_per_rank(architecture: Architecture) -> int:
    """Parameters of a bundle's deltas at rank 1: rows plus columns of every matrix that has one."""
    config = architecture.model
    wide, narrow = config.width, config.kv_heads * config.attention_width
    attention = 2 * (wide + config.heads * config.attention_width) + 2 * (wide + narrow)
    return config.layers * attention + 2 * (architecture.vocab_size + wide)


def forward_flops_per_token(architecture: Architecture) -> int:
    """Multiply-adds times two of one token's forward pass, attention over half a context included.

    The embedding, and one half of its delta, is a look-up and costs none; the head does, once for each expert that
    predicts by itself.
    """
    config = architecture.model
    count = count_parameters(architecture)
    lookup = architecture.vocab_size * (config.width + max(g.delta_rank for g in architecture.generations))
    matrices = count.active - (0 if config.tie_embeddings else lookup)
    attention = 2 * config.layers * config.heads * config.attention_width * config.context // 2
    heads = architecture.experts_in(config.layers - 1) - 1 if architecture.routing.competitive else 0
    return 2 * (matrices + attention + heads * architecture.vocab_size * config.width)


def training_flops(architecture: Architecture, tokens: int, teacher: Architecture | None, teacher_tokens: int) -> int:
    """Active FLOPs of a stage: three forward passes' worth a token, and the teacher's forward passes.

    Weight gradients that frozen experts skip are not subtracted: arms compare at what they could cost.
    """
    student = 3 * forward_flops_per_token(architecture) * tokens
    return student + (forward_flops_per_token(teacher) * teacher_tokens if teacher else 0)
