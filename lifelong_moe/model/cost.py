"""Parameters and floating-point operations from the shape alone. Torch-free, so that a plan costs nothing."""

from __future__ import annotations

from dataclasses import dataclass

from lifelong_moe.model.architecture import Architecture


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
    config, top_k = architecture.model, architecture.routing.top_k
    head_width = config.width // config.heads
    attention = 2 * config.width * head_width * (config.heads + config.kv_heads)
    norms = 2 * config.width
    tables = architecture.vocab_size * config.width * (1 if config.tie_embeddings else 2)
    trunk = config.layers * (attention + norms) + config.width + tables
    per_expert = 3 * config.width * config.expert_width
    row = config.width if architecture.routing.has_rows else 0
    layers, generations = range(config.layers), architecture.generations
    experts = [sum(generation.experts_in(layer) for layer in layers) for generation in generations]
    used = architecture.num_experts if architecture.routing.mode == "dense" else top_k
    deltas = [g.delta_rank * _delta_parameters_per_rank(architecture) for g in generations]
    training = [g for g in range(len(generations)) if architecture.trains(g)]
    return ParameterCount(
        total=trunk + sum(experts) * (per_expert + row) + sum(deltas),
        active=trunk + config.layers * used * per_expert + sum(experts) * row + max(deltas),
        trunk=trunk,
        per_expert=per_expert,
        unfrozen=sum(experts[g] * (per_expert + row) + deltas[g] for g in training),
    )


def _delta_parameters_per_rank(architecture: Architecture) -> int:
    """Parameters of a bundle's deltas at rank 1: rows plus columns of every matrix that has one."""
    config = architecture.model
    wide, narrow = config.width, config.kv_heads * (config.width // config.heads)
    attention = 2 * (wide + wide) + 2 * (wide + narrow)
    return config.layers * attention + 2 * (architecture.vocab_size + wide)


def forward_flops_per_token(architecture: Architecture) -> int:
    """Multiply-adds times two of one token's forward pass, attention over half a context included.

    The embedding, and one half of its delta, is a look-up and costs none; the head does.
    """
    config = architecture.model
    count = count_parameters(architecture)
    lookup = architecture.vocab_size * (config.width + max(g.delta_rank for g in architecture.generations))
    matrices = count.active - (0 if config.tie_embeddings else lookup)
    attention = 2 * config.layers * config.width * config.context // 2
    return 2 * (matrices + attention)


def training_flops(architecture: Architecture, tokens: int, teacher: Architecture | None, teacher_tokens: int) -> int:
    """Active FLOPs of a stage: three forward passes' worth a token, and the teacher's forward passes.

    Weight gradients that frozen experts skip are not subtracted: arms compare at what they could cost.
    """
    student = 3 * forward_flops_per_token(architecture) * tokens
    return student + (forward_flops_per_token(teacher) * teacher_tokens if teacher else 0)
