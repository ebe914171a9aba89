"""Parameters and floating-point operations from the shape alone. Torch-free, so that a plan costs nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lifelong_moe.config.model import Activation, ModelConfig, QKNorm, SharedMix
from lifelong_moe.config.parts import Part
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.products import Text, TokenProducts, group_rows, nothing, pass_products, rows_an_expert


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of a model's parameters: all, active, trainable."""

    total: int
    """All parameters."""
    active: int
    """Used in one token's forward pass: trunk, one generation's deltas, router, ``top_k`` experts per layer."""
    trunk: int
    """Attention, norms, embedding and head."""
    per_expert: int
    """One whole expert."""
    unfrozen: int
    """Experts, router rows and deltas of the generations that are not frozen."""


def parameters_by_part(architecture: Architecture) -> dict[tuple[Part, int | None], int]:
    """Parameters of each part of a model and of each generation; None is shared by all generations."""
    config = architecture.model
    head_width, mixtures = config.attention_width, len(config.moe_layers)
    attention = 2 * config.width * head_width * (config.heads + config.kv_heads) + _qk_norm_parameters(config)
    attention += head_width * (config.heads + 2 * config.kv_heads) if config.attention_bias else 0
    table = architecture.vocab_size * config.width
    counts: Counter[tuple[Part, int | None]] = Counter()
    counts[Part.embedding, None] = table
    # A tied head is the embedding, which is counted already.
    counts[Part.head, None] = 0 if config.tie_embeddings else table
    counts[Part.attention, None] = config.layers * attention
    # Two norms per layer, four with sandwich norms, and the last one.
    counts[Part.norm, None] = config.width * (config.layers * (4 if config.sandwich_norms else 2) + 1)
    # Multiplied and not summed: a thousand layers times a thousand generations would take minutes.
    counts[Part.shared, None] = mixtures * _shared_parameters(architecture)
    counts[Part.dense, None] = (config.layers - mixtures) * _dense_parameters(architecture)
    per_expert = _feed_forward(config.width, config.expert_width, config.activation)
    row = rows_an_expert(architecture)
    for g, generation in enumerate(architecture.generations):
        experts = generation.experts_by_layer(config.layers)
        counts[Part.expert, g] = sum(experts) * (_factors(architecture, generation.rank) or per_expert)
        counts[Part.router, g] = (sum(experts) * row + group_rows(architecture, experts)) * config.width
        for part, numbers in _delta_parameters_per_rank(architecture).items():
            counts[part, g] = generation.delta_rank * numbers
        rows = generation.tokens * config.width
        counts[Part.embedding, g] += rows
        counts[Part.head, g] += 0 if config.tie_embeddings else rows
    return dict(counts)


def count_parameters(architecture: Architecture) -> ParameterCount:
    """Count parameters without building the model."""
    config, counts = architecture.model, parameters_by_part(architecture)
    trunk = sum(num for (_, generation), num in counts.items() if generation is None)
    routers = sum(num for (part, _), num in counts.items() if part == Part.router)
    deltas = [
        sum(num for (part, one), num in counts.items() if one == g and not part.is_routed)
        for g in range(len(architecture.generations))
    ]
    per_expert = _feed_forward(config.width, config.expert_width, config.activation)
    used = [min(architecture.experts_in(layer), _used_experts(architecture, layer)) for layer in range(config.layers)]
    # Low-rank experts are used with the whole ones that they change, of which several may change the same one.
    whole = [
        sum(one.experts_in(layer) for one in architecture.generations if not one.rank) for layer in range(config.layers)
    ]
    experts = sum(min(u, w) for u, w in zip(used, whole, strict=True)) * per_expert
    # Those of the largest rank count here.
    changes = [
        max(_factors(architecture, one.rank) for one in architecture.generations if one.experts_in(layer) or not num)
        for layer, num in enumerate(used)
    ]
    return ParameterCount(
        total=sum(counts.values()),
        # A token uses one generation's deltas: those of the largest rank.
        active=trunk + experts + sum(u * c for u, c in zip(used, changes, strict=True)) + routers + max(deltas),
        trunk=trunk,
        per_expert=per_expert,
        unfrozen=sum(num for (_, g), num in counts.items() if g is not None and architecture.trains(g)),
    )


def _feed_forward(width: int, hidden_width: int, activation: Activation) -> int:
    return (3 if activation.is_gated else 2) * width * hidden_width


def _factors(architecture: Architecture, rank: int) -> int:
    """Parameters of a low-rank expert: rows and columns of each of the matrices that it changes."""
    config = architecture.model
    return (3 if config.activation.is_gated else 2) * rank * (config.width + config.expert_width)


def _used_experts(architecture: Architecture, layer: int) -> int:
    """Experts that a token uses in a layer, on average if that varies."""
    return architecture.experts_in(layer) if architecture.routing.mode == "dense" else architecture.routing.top_k


def _qk_norm_parameters(config: ModelConfig) -> int:
    heads = {QKNorm.none: 0, QKNorm.head: 2, QKNorm.full: config.heads + config.kv_heads}[config.qk_norm]
    return heads * config.attention_width


def _dense_parameters(architecture: Architecture) -> int:
    """Parameters of the network of a layer without experts."""
    config = architecture.model
    dense_width = config.dense_width or config.expert_width * architecture.routing.top_k
    return _feed_forward(config.width, dense_width, config.dense_activation)


def _shared_parameters(architecture: Architecture) -> int:
    """Parameters of a layer with experts that every token uses: shared experts and their mix with the routed ones."""
    config = architecture.model
    mix = 2 * config.width + 2 if config.shared_mix == SharedMix.learned else 0
    return _feed_forward(config.width, config.shared_experts * config.expert_width, config.activation) + mix


def _delta_parameters_per_rank(architecture: Architecture) -> dict[Part, int]:
    """Parameters of a generation's deltas at rank 1: rows plus columns of every matrix that has one."""
    config = architecture.model
    wide, narrow = config.width, config.kv_heads * config.attention_width
    attention = 2 * (wide + config.heads * config.attention_width) + 2 * (wide + narrow)
    table = architecture.vocab_size + wide
    return {Part.embedding: table, Part.attention: config.layers * attention, Part.head: table}


def forward_flops_per_token(architecture: Architecture, first_block: int = 0) -> int:
    """Multiply-adds times two of one token's forward pass from a block on, attention over half a context included.

    Low-rank changes of the trunk cost by pass and not by token: see :func:`pass_flops`.
    """
    # An upper bound with model.document_mask, for the lengths of documents are not known here.
    return round(2 * TokenProducts(architecture, nothing, Text.of(architecture), first_block).total)


def pass_flops(architecture: Architecture, text: Text) -> int:
    """FLOPs of one forward pass that do not depend on its tokens: each low-rank change is added to its matrix once.

    A pass without gradients over few tokens takes less: :meth:`lifelong_moe.model.deltas.Deltas.product`.
    """
    return round(2 * pass_products(architecture, nothing, text))


def training_flops(architecture: Architecture, tokens: int, teacher: Architecture | None, teacher_tokens: int) -> int:
    """Three forward passes per token, and the teacher's: an estimate without regard to frozen parameters.

    :func:`lifelong_moe.plan.flops.stage_flops` is exact.
    """
    student = 3 * forward_flops_per_token(architecture) * tokens
    return student + (forward_flops_per_token(teacher) * teacher_tokens if teacher else 0)
