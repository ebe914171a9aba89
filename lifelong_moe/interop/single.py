"""What one generation's tokens use of a model, as a model of one generation: the form that all others read.

Architecture and ``config.json`` are found without torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.parts import expert_tensor, router_rows
from lifelong_moe.config.routing.base import RoutingConfig, Score
from lifelong_moe.config.routing.topk import LearnedConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.interop.layout.writing import written_config
from lifelong_moe.plan.architecture import Architecture, first_generation

if TYPE_CHECKING:
    from torch import Tensor

HEAD, EMBEDDING = "head.weight", "embedding.weight"
MATRICES = ("gate_up", "down")


def single_architecture(architecture: Architecture, generation: int | None = None) -> Architecture:
    """The architecture of what the tokens of one generation use.

    Args:
        architecture: Of the whole model.
        generation: Counted from 0. None is all of them together, in a model without bundles or with one generation.

    Raises:
        ConfigError: No checkpoint of others has what it has; names the key.
    """
    routing, model, born = architecture.routing, architecture.model, architecture.generations
    top_k, renormalize = _require_plain(routing)
    if generation is None and routing.by_generation and len(born) > 1:
        raise ConfigError(f"routing.bundles={routing.bundles}: each token uses one of {len(born)} generations.")
    chosen = born if generation is None else (born[generation],)
    numbers = [sum(one.experts_in(layer) for one in chosen) for layer in model.moe_layers]
    if len({*numbers}) > 1:
        raise ConfigError(
            f"layers have different numbers of experts ({', '.join(map(str, numbers))}), by model.experts or "
            f"grow.layers; in all architectures that others read they have the same."
        )
    if not numbers[0]:
        raise ConfigError(f"generation {chosen[-1].stage} has no experts of its own.")
    is_alone = numbers[0] == 1  # its weight is 1 whatever the router says
    routing = LearnedConfig() if is_alone else LearnedConfig(top_k=min(top_k, numbers[0]), renormalize=renormalize)
    shape = _shape(model, numbers[0], top_k, has_deltas=any(one.delta_rank for one in chosen))
    first = (first_generation(chosen[-1].stage, shape),)
    num_tokens = architecture.tokens_of(0 if generation is None else generation)
    return Architecture(shape, routing, num_tokens, architecture.bos_id, first)


def _require_plain(routing: RoutingConfig) -> tuple[int, bool]:
    """``top_k`` and ``renormalize`` of learned routing as others have it."""
    if not isinstance(routing, LearnedConfig):
        raise ConfigError(f"routing.mode={routing.mode} is in no architecture that others read; only learned is.")
    if routing.capacity is not None:
        raise ConfigError("routing.capacity is in no architecture that others read: these drop no tokens.")
    plain = {"score": Score.softmax, "bias_rate": 0.0, "expert_groups": 1, "gate_scale": 1.0}
    for key, value in plain.items():
        if getattr(routing, key) != value:
            raise ConfigError(f"routing.{key}={getattr(routing, key)} is in no architecture that is written here.")
    return routing.top_k, routing.renormalize


def _shape(model: ModelConfig, experts: int, top_k: int, *, has_deltas: bool) -> ModelConfig:
    """The shape with as many experts; a tied head that changes apart from the embedding is a matrix of its own."""
    follows = model.head_width is not None and model.head_width * model.heads == model.width
    return dataclasses.replace(
        model,
        experts=experts,
        # Tells documents of one sequence apart, of which there is one here.
        document_mask=False,
        head_width=None if follows else model.head_width,
        dense_width=model.dense_width or model.expert_width * top_k,
        tie_embeddings=model.tie_embeddings and not has_deltas,
    ).effective()


def config_of(single: Architecture, kept: Mapping[str, Any], dtype: str = "float32") -> dict[str, Any]:
    """The ``config.json`` of a model of one generation.

    Args:
        single: The model.
        kept: The ``config.json`` of the checkpoint that it was grown from, if there was one.
        dtype: Of its numbers, such as ``float32``.
    """
    assert isinstance(single.routing, LearnedConfig)
    # A document ends where the next one begins: BOS is EOS too.
    kept = kept or {"bos_token_id": single.bos_id, "eos_token_id": single.bos_id}
    return written_config(single.model, single.routing, single.vocab_size, kept, dtype)


def single_tensors(
    architecture: Architecture, tensors: Mapping[str, Tensor], generation: int | None = None
) -> dict[str, Tensor]:
    """The tensors of :func:`single_architecture`'s model.

    Args:
        architecture: Of the whole model.
        tensors: Its state dictionary, or what a stage stores.
        generation: As for the architecture.

    Returns:
        The given ones under the names that they have there, and new ones where low-rank changes are added.
    """
    import torch

    born = architecture.generations
    numbers = range(len(born)) if generation is None else (generation,)
    found = {}
    for name, tensor in tensors.items():
        if not any(part in name for part in (".deltas.", ".added.", ".moe.banks.", ".moe.router.")):
            found[name] = tensor if generation is None else with_delta(tensors, name, generation)
    if architecture.model.tie_embeddings and any(born[number].delta_rank for number in numbers):
        found[HEAD] = with_delta({HEAD: tensors[EMBEDDING], **tensors}, HEAD, numbers[0])
    for table in (EMBEDDING, HEAD):
        # Where the head is tied, it has the embedding's rows.
        rows = [token_rows(tensors, table, n) for n in range(1, 1 + numbers[-1]) if born[n].tokens]
        if table in found and rows:
            found[table] = torch.cat([found[table], *rows])
    for layer in architecture.model.moe_layers:
        first = sum(one.experts_in(layer) for one in born[: numbers[0]])
        for new in range(sum(born[number].experts_in(layer) for number in numbers)):
            for matrix in MATRICES:
                found[expert_tensor(layer, new, matrix)] = _matrix(tensors, layer, first + new, matrix)
        found[router_rows(layer, 0)] = torch.cat([tensors[router_rows(layer, number)] for number in numbers])
    return {name: tensor for name, tensor in found.items() if not name.startswith("document_clusters.")}


def _matrix(tensors: Mapping[str, Tensor], layer: int, expert: int, matrix: str) -> Tensor:
    """A matrix of an expert: its own, or that of the expert which it changes with the change added."""
    name = expert_tensor(layer, expert, matrix)
    if name in tensors:
        return tensors[name]
    from lifelong_moe.ops.low_rank import changed

    base = int(tensors[expert_tensor(layer, expert, "base")])
    parts = (expert_tensor(layer, base, matrix), f"{name}_a", f"{name}_b")
    # As for trunks: the sum needs more bits than its parts.
    return changed(*(tensors[one].float() for one in parts))


def token_rows(tensors: Mapping[str, Tensor], table: str, generation: int) -> Tensor:
    """A generation's rows of the embedding or the head."""
    names = (f"{one.removesuffix('.weight')}.added.{generation}" for one in (table, EMBEDDING))
    return next(tensors[name] for name in names if name in tensors)


def with_delta(tensors: Mapping[str, Tensor], name: str, generation: int) -> Tensor:
    """A matrix with a generation's low-rank change added, as :class:`~lifelong_moe.model.deltas.Deltas` adds it.

    Returns:
        In float32 with a change, in which models compute; halves would round the sum.
    """
    change = f"{name.removesuffix('.weight')}.deltas.{generation}"
    up = tensors.get(f"{change}.up")
    return tensors[name] if up is None else tensors[name].float() + up.float() @ tensors[f"{change}.down"].float()
