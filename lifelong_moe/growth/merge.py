"""Consolidate: merge pairs of frozen experts under a learned router without bundles. Pure functions of tensors.

A pair is chosen so that merging changes the layer's output least: rarely used experts with similar outputs. Merging is
never exact: a token that chose both experts has a top-k slot free afterwards, which another expert takes.

Legend: E experts, N sampled tokens, D model width.

Source:
    Usage-weighted averages: M-SMoE (arXiv:2310.01334), which groups experts by router logits; we pair them by outputs.
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
    """Cosine similarity of each two experts' outputs, averaged over tokens, ``(E, E)``; 1 on the diagonal."""
    # shape: (E, N, D)
    unit_END = F.normalize(outputs_END.float(), dim=-1)
    return torch.einsum("and,bnd->ab", unit_END, unit_END) / outputs_END.shape[1]


def cheapest_pair(
    similarity_EE: Tensor, counts_E: Tensor, first: Sequence[int], second: Sequence[int]
) -> tuple[int, int]:
    """The pair that costs least to merge: the tokens affected times the change, ``min(share) * (1 - similarity)``.

    Args:
        similarity_EE: See :func:`output_similarity`.
        counts_E: Tokens assigned to each expert on the sample, ``(E,)``.
        first: Candidates to keep.
        second: Candidates to merge into a kept one.

    Returns:
        The expert to keep and the one to remove; ties go to the lower indices.

    Raises:
        ValueError: If there are no two different experts.
    """
    share_E = counts_E.double() / counts_E.sum().clamp(min=1)
    pairs = [(keep, gone) for keep in sorted(first) for gone in sorted(second) if keep != gone]
    if not pairs:
        raise ValueError(f"no two experts to merge among {list(first)} and {list(second)}")
    return min(pairs, key=lambda p: float(min(share_E[p[0]], share_E[p[1]]) * (1 - similarity_EE[p].double())))


def weighted(keep: Tensor, gone: Tensor, keep_count: int, gone_count: int) -> Tensor:
    """Average of two tensors, weighted by usage; their plain mean if neither was used."""
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
    """In each layer that has a generation, merge one of its experts into another frozen expert.

    Args:
        architecture: Of the model; learned routing without bundles.
        tensors: The model's state dictionary; not changed.
        generation: The frozen generation that shrinks; it has at least two experts.
        pairs: For each layer that has the generation, the expert to keep (any frozen one) and the one to remove (of the
            generation), by index in the layer.
        counts: For each such layer, tokens assigned to each expert on a sample, ``(E,)``.

    Returns:
        The architecture, and the tensors with later experts renumbered.

    Raises:
        ConfigError: If the router does not allow merging.
        ValueError: If the generation or a pair does not meet these conditions.
    """
    _require_mergeable(architecture, generation, pairs)
    merged = dict(tensors)
    for layer, (keep, gone) in pairs.items():
        numbers = int(counts[layer][keep]), int(counts[layer][gone])
        for matrix in ("gate_up", "down") if architecture.model.activation.is_gated else ("up", "down"):
            name = expert_tensor(layer, keep, matrix)
            merged[name] = weighted(tensors[name], tensors[expert_tensor(layer, gone, matrix)], *numbers)
        _merge_rows(architecture, merged, layer, keep, gone, numbers)
    # Only after all layers are merged: until here experts have their old numbers.
    names = {name: _renumbered(name, pairs) for name in merged}
    born = replace(architecture.generations[generation], experts=architecture.generations[generation].experts - 1)
    generations = (*architecture.generations[:generation], born, *architecture.generations[generation + 1 :])
    return replace(architecture, generations=generations), {new: merged[old] for old, new in names.items() if new}


def _merge_rows(
    architecture: Architecture, tensors: dict[str, Tensor], layer: int, keep: int, gone: int, numbers: tuple[int, int]
) -> None:
    """Average both router rows into the kept expert's, and delete the other, in ``tensors``."""
    (keep_name, keep_at), (gone_name, gone_at) = (_row(architecture, layer, expert) for expert in (keep, gone))
    row = weighted(tensors[keep_name][keep_at], tensors[gone_name][gone_at], *numbers)
    kept = tensors[keep_name].clone()  # the caller's tensor stays as it is
    kept[keep_at] = row
    tensors[keep_name] = kept
    # Read anew: both rows may be in the same tensor.
    rows = tensors[gone_name]
    tensors[gone_name] = torch.cat([rows[:gone_at], rows[gone_at + 1 :]])


def _row(architecture: Architecture, layer: int, expert: int) -> tuple[str, int]:
    """Name of the tensor that holds an expert's router row, and the row's index in it."""
    for number, generation in enumerate(architecture.generations):
        if expert < generation.experts_in(layer):
            return router_rows(layer, number), expert
        expert -= generation.experts_in(layer)
    raise ValueError(f"layer {layer} has no such expert")


def _renumbered(name: str, pairs: Mapping[int, tuple[int, int]]) -> str | None:
    """A tensor's name once the removed experts are gone: later ones move up by one; None for a removed expert's own."""
    here = TensorName.parse(name)
    if here.layer is None or here.expert is None or here.layer not in pairs:
        return name
    gone = pairs[here.layer][1]
    return None if here.expert == gone else str(replace(here, expert=here.expert - (here.expert > gone)))


def _require_mergeable(architecture: Architecture, generation: int, pairs: Mapping[int, tuple[int, int]]) -> None:
    routing, born = architecture.routing, architecture.generations[generation]
    plain = isinstance(routing, LearnedConfig) and not routing.bias_rate
    if not plain or routing.by_generation or routing.expert_groups > 1:
        raise ConfigError(
            f"routing.mode={routing.mode}, bundles={routing.bundles}: experts can be merged only under a learned "
            f"router without bundles, biases and expert groups."
        )
    if low := [g.stage for g in architecture.generations if g.rank]:
        raise ConfigError(
            f"grow.rank: experts of {', '.join(low)} are low-rank changes, which cannot be merged, nor can the experts "
            f"that they change; lifelong-moe drop removes a whole stage."
        )
    if any(g.by_layer is not None for g in architecture.generations):
        raise ConfigError("model.experts differs by layer (a pyramid): such experts cannot be merged.")
    if generation >= architecture.frozen or born.experts < 2:
        raise ValueError(f"generation {generation} ({born.stage}) must be frozen and have at least two experts")
    grown = [layer for layer in range(architecture.model.layers) if born.experts_in(layer)]
    if sorted(pairs) != grown:
        raise ValueError(f"generation {generation} has experts in layers {grown}; got pairs for layers {sorted(pairs)}")
    if generation == 0 and born.experts <= routing.top_k:
        raise ConfigError(f"the first generation must keep at least routing.top_k={routing.top_k} experts.")
    for layer, (keep, gone) in pairs.items():
        first = sum(g.experts_in(layer) for g in architecture.generations[:generation])
        frozen = sum(g.experts_in(layer) for g in architecture.generations[: architecture.frozen])
        if keep == gone or not 0 <= keep < frozen or not first <= gone < first + born.experts:
            raise ValueError(f"layer {layer}: cannot merge expert {gone} of generation {generation} into expert {keep}")
