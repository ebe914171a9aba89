"""Consolidate: merge two frozen experts of a layer into one, under a learned router without bundles. Pure functions.

Which pair: the one whose merger should change the layer's output least, the less used and the more alike the better.
One expert in place of two never is exact: where both were chosen, one slot of the top-k is free for another expert.

Legend: E experts, N sampled tokens, D model width.

Source:
    Weights averaged by usage: M-SMoE (arXiv:2310.01334), there within groups found by router logits; here pairs found
    by the experts' outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong_moe.config.parts import TensorName, expert_tensor, router_rows
from lifelong_moe.config.routing.topk import LearnedConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.architecture import Architecture


def output_similarity(outputs_END: Tensor) -> Tensor:
    """Mean cosine over tokens between the outputs of each two experts, ``(E, E)``, 1 on the diagonal."""
    unit_END = F.normalize(outputs_END.float(), dim=-1)
    return torch.einsum("and,bnd->ab", unit_END, unit_END) / outputs_END.shape[1]


def closest_pair(
    similarity_EE: Tensor, counts_E: Tensor, first: Sequence[int], second: Sequence[int]
) -> tuple[int, int]:
    """The pair with the smallest ``min(share) * (1 - similarity)``: how many tokens change expert, and by how much.

    Args:
        similarity_EE: See :func:`output_similarity`.
        counts_E: Assignments that each expert received on the sample, ``(E,)``.
        first: Experts that may stay.
        second: Experts that may go into one that stays.

    Returns:
        Who stays and who goes; ties to the lower indices.

    Raises:
        ValueError: If there are no two different experts.
    """
    share_E = counts_E.double() / counts_E.sum().clamp(min=1)
    pairs = [(keep, gone) for keep in sorted(first) for gone in sorted(second) if keep != gone]
    if not pairs:
        raise ValueError(f"no two experts to merge among {list(first)} and {list(second)}")
    return min(pairs, key=lambda p: float(min(share_E[p[0]], share_E[p[1]]) * (1 - similarity_EE[p].double())))


def weighted(keep: Tensor, gone: Tensor, keep_count: int, gone_count: int) -> Tensor:
    """Average of two tensors by usage; their plain mean if neither was used."""
    total = keep_count + gone_count
    share = gone_count / total if total else 0.5
    return torch.lerp(keep, gone, share)


def merge_experts(
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    generation: int,
    pairs: Mapping[int, tuple[int, int]],
    counts: Mapping[int, Tensor],
) -> tuple[Architecture, dict[str, Tensor]]:
    """Take one expert of a generation out of each of its layers, and merge it into another frozen one.

    Args:
        architecture: Of the model: learned routing without bundles.
        tensors: All of its tensors by name, as in its state dictionary; not changed.
        generation: Which one shrinks; frozen, with at least two experts.
        pairs: For each layer that has the generation, who stays (any frozen expert) and who goes (one of the
            generation), by index in the layer.
        counts: For each such layer, assignments of each expert on a sample, ``(E,)``.

    Returns:
        The architecture and the tensors, later experts one index lower.

    Raises:
        ConfigError: If the routing cannot be merged.
        ValueError: If the generation or a pair is not as described.
    """
    _require_mergeable(architecture, generation, pairs)
    merged = dict(tensors)
    for layer, (keep, gone) in pairs.items():
        numbers = int(counts[layer][keep]), int(counts[layer][gone])
        for matrix in ("gate_up", "down") if architecture.model.activation.is_gated else ("up", "down"):
            name = expert_tensor(layer, keep, matrix)
            merged[name] = weighted(tensors[name], tensors[expert_tensor(layer, gone, matrix)], *numbers)
        _merge_rows(architecture, merged, layer, keep, gone, numbers)
    names = {name: _renumbered(name, pairs) for name in merged}
    born = replace(architecture.generations[generation], experts=architecture.generations[generation].experts - 1)
    generations = (*architecture.generations[:generation], born, *architecture.generations[generation + 1 :])
    return replace(architecture, generations=generations), {new: merged[old] for old, new in names.items() if new}


def _merge_rows(
    architecture: Architecture, tensors: dict[str, Tensor], layer: int, keep: int, gone: int, numbers: tuple[int, int]
) -> None:
    """The router row likewise."""
    (keep_name, keep_at), (gone_name, gone_at) = (_row(architecture, layer, expert) for expert in (keep, gone))
    row = weighted(tensors[keep_name][keep_at], tensors[gone_name][gone_at], *numbers)
    kept = tensors[keep_name].clone()
    kept[keep_at] = row
    tensors[keep_name] = kept
    rows = tensors[gone_name]
    tensors[gone_name] = torch.cat([rows[:gone_at], rows[gone_at + 1 :]])


def _row(architecture: Architecture, layer: int, expert: int) -> tuple[str, int]:
    """Tensor and place of an expert's router row."""
    for number, generation in enumerate(architecture.generations):
        if expert < generation.experts_in(layer):
            return router_rows(layer, number), expert
        expert -= generation.experts_in(layer)
    raise ValueError(f"layer {layer} has no such expert")


def _renumbered(name: str, pairs: Mapping[int, tuple[int, int]]) -> str | None:
    here = TensorName.parse(name)
    if here.layer is None or here.expert is None or here.layer not in pairs:
        return name
    gone = pairs[here.layer][1]
    return None if here.expert == gone else str(replace(here, expert=here.expert - (here.expert > gone)))


def _require_mergeable(architecture: Architecture, generation: int, pairs: Mapping[int, tuple[int, int]]) -> None:
    routing, born = architecture.routing, architecture.generations[generation]
    plain = isinstance(routing, LearnedConfig) and not routing.bias_rate
    if not plain or routing.has_bundles or routing.expert_groups > 1:
        raise ConfigError(
            f"routing.mode={routing.mode}, bundles={routing.bundles}: experts merge only under a learned router "
            f"without bundles, biases and groups; another one would send them text that they did not learn from."
        )
    if any(g.by_layer is not None for g in architecture.generations):
        raise ConfigError("model.experts differs by layer: experts of a pyramid cannot be merged.")
    if generation >= architecture.frozen or born.experts < 2:
        raise ValueError(f"generation {generation} ({born.stage}) must be frozen and have two experts to lose one")
    grown = [layer for layer in range(architecture.model.layers) if born.experts_in(layer)]
    if sorted(pairs) != grown:
        raise ValueError(f"generation {generation} is in layers {grown}; got pairs for {sorted(pairs)}")
    if generation == 0 and born.experts <= routing.top_k:
        raise ConfigError(f"routing.top_k={routing.top_k} experts must be left.")
    for layer, (keep, gone) in pairs.items():
        first = sum(g.experts_in(layer) for g in architecture.generations[:generation])
        frozen = sum(g.experts_in(layer) for g in architecture.generations[: architecture.frozen])
        if keep == gone or not 0 <= keep < frozen or not first <= gone < first + born.experts:
            raise ValueError(f"layer {layer}: expert {gone} of generation {generation} cannot go into expert {keep}")
