"""Probe a model as it reads: the routing of each token, the outputs of experts, the loss when experts swap places.

Legend: T tokens read, K experts chosen per token, N sampled inputs, D model width, E experts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.data.tokens.windows import EvaluationSet, evaluation_windows
from lifelong_moe.evaluation.reading import WindowBatch, forward_selected, read_windows
from lifelong_moe.evaluation.specialization import derangement, output_similarity
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.routing.base import Routing

BATCH_TOKENS = 8192
"""Tokens a forward pass; changes memory and speed, not results."""


@dataclass(frozen=True, eq=False)
class Observation:
    """The routing of a text. Each token stands once, in reading order."""

    document_T: NDArray[np.int64]
    """Document in its shard."""
    position_T: NDArray[np.int64]
    """Position in the document; BOS is 0."""
    token_ids_T: NDArray[np.int64]
    expert_ids: list[NDArray[np.int64]]
    """For each layer the chosen experts ``(T, K)``."""
    weights: list[NDArray[np.float32]]
    """For each layer their gate weights ``(T, K)``."""
    shares_TG: NDArray[np.float64] | None = None
    """In a mixture the weight of each generation in the prediction of the next token; experts are then those of the
    generation that weighs most."""

    def __len__(self) -> int:
        return len(self.token_ids_T)

    def rows(self, chosen: NDArray[np.bool_]) -> Observation:
        """Only the tokens where ``chosen`` (bool, ``(T,)``) is True."""
        return Observation(
            self.document_T[chosen],
            self.position_T[chosen],
            self.token_ids_T[chosen],
            [ids[chosen] for ids in self.expert_ids],
            [weights[chosen] for weights in self.weights],
            None if self.shares_TG is None else self.shares_TG[chosen],
        )


def expert_names(architecture: Architecture, layer: int) -> list[str]:
    """``STAGE/L<layer>/E<index>`` of each expert of a layer, by index."""
    return [f"{birth}/L{layer}/E{index}" for index, birth in enumerate(architecture.expert_births(layer))]


def observe(model: LanguageModel, windows: EvaluationSet, *, distribution: str | None) -> Observation:
    """Read held-out windows and record the routing of each token that predicts a next one.

    These are the tokens whose assignments :func:`lifelong_moe.evaluation.loss.evaluate` counts: all but the last of
    each document, each in the window with the most text before it.

    Args:
        model: On any device; left as it was.
        windows: Overlapping windows, each beginning with BOS.
        distribution: The text's distribution if it is known; only routing by label looks at it.
    """
    parts: list[Observation] = []
    for batch in read_windows(model, windows, distribution=distribution, batch_tokens=BATCH_TOKENS):
        scored, tokens = batch.arrays["scored"].cpu(), batch.arrays["token_ids"].cpu()
        rows, offsets = (place.numpy() for place in scored.nonzero(as_tuple=True))
        of_T = batch.places_B[rows]
        expert_ids, weights = zip(*(_chosen(batch, layer) for layer in range(len(model.blocks))), strict=True)
        parts.append(
            Observation(
                windows.document[of_T],
                windows.start[of_T] + offsets - 1,  # inputs lie one position before their targets
                tokens[scored].numpy(),
                list(expert_ids),
                list(weights),
                None if batch.weights_TG is None else batch.weights_TG.cpu().numpy(),
            )
        )
    return _in_reading_order(parts)


def _chosen(batch: WindowBatch, layer: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Experts and gate weights of each scored token in a layer, ``(T, K)``, by the member that weighs most for it."""
    shape = len(batch.nats_T), batch.members[0].output.routings[layer].expert_ids_TK.shape[1]
    expert_ids, weights = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.float32)
    heaviest = np.zeros(len(batch.nats_T))
    for member, has_part_RP, places in batch.shares:
        routing, mask = member.output.routings[layer], has_part_RP.flatten()
        weight, of = member.weights_RP[has_part_RP].double().cpu().numpy(), places.cpu().numpy()
        more = weight > heaviest[of]
        gates_TK = routing.weights_TK.masked_fill(routing.expert_ids_TK < 0, 0)[mask].float()
        expert_ids[of[more]] = routing.expert_ids_TK[mask].cpu().numpy()[more]
        weights[of[more]], heaviest[of[more]] = gates_TK.cpu().numpy()[more], weight[more]
    return expert_ids, weights


def observe_text(model: LanguageModel, token_ids: Sequence[int], *, distribution: str | None) -> Observation:
    """The same for one text without BOS, its last token included.

    Raises:
        ValueError: If the text has no token.
    """
    if not token_ids:
        raise ValueError("the text has no token")
    bos = model.architecture.bos_id
    # A closing BOS gives the last token a target, so it is scored; no earlier token can see it.
    document = np.array([bos, *token_ids, bos], dtype=np.int64)
    shard = TokenShard(document, np.array([0, len(document)]), np.zeros(1, dtype=np.int64))
    windows = evaluation_windows(shard, model.architecture.model.context, sys.maxsize)
    seen = observe(model, windows, distribution=distribution)
    return seen.rows(seen.position_T > 0)  # without BOS


def routing_columns(
    architecture: Architecture, seen: Observation, distribution: str, name_token: Callable[[int], str]
) -> Iterator[dict[str, ArrayLike]]:
    """Yield an observation as columns of a table, layer by layer, with one row per token.

    Args:
        architecture: Of the model that was observed.
        seen: What was observed.
        distribution: Name in the column of that name.
        name_token: Text of a token id.
    """
    ids_J, token_T = np.unique(seen.token_ids_T, return_inverse=True)
    # Tokenizers decode slowly: each distinct token once.
    texts_J = [name_token(int(token_id)) for token_id in ids_J]
    for layer, (ids_TK, weights_TK) in enumerate(zip(seen.expert_ids, seen.weights, strict=True)):
        if not ids_TK.shape[1]:
            continue  # a dense layer
        yield {
            "distribution": [distribution] * len(seen),
            "document": seen.document_T,
            "position": seen.position_T,
            "token_id": seen.token_ids_T,
            "token": [texts_J[token] for token in token_T],
            "layer": np.full(len(seen), layer),
            "expert_ids": ids_TK,
            "weights": weights_TK,
            "experts": np.array([*expert_names(architecture, layer), ""])[ids_TK],  # -1, the last, is no expert
        }


@torch.no_grad()
def expert_similarities(
    model: LanguageModel, texts: Sequence[tuple[EvaluationSet, str | None]], num_inputs: int = 512
) -> list[NDArray[np.floating[Any]]]:
    """Similarity of the experts of each layer on the same inputs, whether or not they were routed there.

    Args:
        model: On any device; left as it was.
        texts: Held-out windows with their distribution; each contributes equally many inputs.
        num_inputs: Inputs a layer, rounded up; fewer if the texts are shorter.

    Returns:
        For each layer :func:`~lifelong_moe.evaluation.specialization.output_similarity`, ``(E, E)``; empty for a dense
        one.
    """
    inputs = _layer_inputs(model, texts, -(-num_inputs // len(texts)))
    similarities: list[NDArray[np.floating[Any]]] = []
    for layer, x_ND in zip(model.moe_layers(), inputs, strict=True):
        if not len(layer.banks):
            similarities.append(np.zeros((0, 0)))
            continue
        outputs_END = torch.stack([expert(x_ND) for expert in layer.banks.networks()])
        similarities.append(output_similarity(outputs_END.float().cpu().numpy()))
    return similarities


@contextmanager
def shuffled_experts(model: LanguageModel, seed: int = 0) -> Iterator[None]:
    """Within this context the experts of each layer swap places; gate weights stay.

    No expert keeps its place, unless it is alone in its layer.
    """
    # Hooks rewrite the outputs of routers, so the model itself never changes.
    rng, hooks = np.random.default_rng(seed), []
    try:
        for layer in model.moe_layers():
            if not layer.router.num_experts:
                continue
            moved_E = torch.from_numpy(derangement(layer.router.num_experts, rng)).to(model.embedding.weight.device)
            hooks.append(layer.router.register_forward_hook(partial(_moved, moved_E)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _moved(moved_E: Tensor, router: nn.Module, arguments: tuple[Any, ...], routing: Routing) -> Routing:
    # -1 marks a choice without an expert, and stays.
    ids_TK = routing.expert_ids_TK
    return replace(routing, expert_ids_TK=torch.where(ids_TK >= 0, moved_E[ids_TK], -1))


def _layer_inputs(model: LanguageModel, texts: Sequence[tuple[EvaluationSet, str | None]], share: int) -> list[Tensor]:
    """Inputs of the experts of each layer, ``(N, D)``: the first ``share`` scored tokens of each text."""
    layers = list(model.moe_layers())
    latest: list[Tensor] = [torch.empty(0)] * len(layers)
    kept: list[list[Tensor]] = [[] for _ in layers]

    def keep(index: int, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        latest[index] = arguments[0]

    hooks = [layer.register_forward_pre_hook(partial(keep, index)) for index, layer in enumerate(layers)]
    try:
        for windows, distribution in texts:
            missing = share
            for _, arrays, _ in forward_selected(model, windows, distribution=distribution, batch_tokens=BATCH_TOKENS):
                places = arrays["scored"].flatten().nonzero().squeeze(1)[:missing]
                for x_TD, parts in zip(latest, kept, strict=True):
                    parts.append(x_TD[places])
                missing -= len(places)
                if not missing:
                    break
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(parts) for parts in kept]


def _in_reading_order(parts: Sequence[Observation]) -> Observation:
    document_T = np.concatenate([part.document_T for part in parts])
    position_T = np.concatenate([part.position_T for part in parts])
    # Windows come longest first, so those of a document are apart.
    order = np.lexsort((position_T, document_T))
    layers = range(len(parts[0].expert_ids))
    shares = [part.shares_TG for part in parts if part.shares_TG is not None]
    return Observation(
        document_T[order],
        position_T[order],
        np.concatenate([part.token_ids_T for part in parts])[order],
        [np.concatenate([part.expert_ids[layer] for part in parts])[order] for layer in layers],
        [np.concatenate([part.weights[layer] for part in parts])[order] for layer in layers],
        np.concatenate(shares)[order] if shares else None,
    )
