"""Grow a model by a generation: freeze the old ones, initialize the new one, verify that nothing has changed yet.

Experts are frozen by ``LanguageModel.freeze_generations``, which :func:`grow` calls.

Legend: D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lifelong_moe.clustering.kmeans import spherical_kmeans
from lifelong_moe.config.growth import ExpertInit, GrowConfig, RouterInit
from lifelong_moe.config.model import ModelConfig
from lifelong_moe.growth.noop import behavior, check_noop
from lifelong_moe.growth.observe import observe
from lifelong_moe.model.experts import LowRankExperts
from lifelong_moe.model.moe import MoELayer
from lifelong_moe.model.transformer import LanguageModel, initial_std
from lifelong_moe.ops.initializers import fan_in_normal_
from lifelong_moe.plan.architecture import Generation


def grow(
    model: LanguageModel,
    generation: Generation,
    config: GrowConfig,
    sample: Mapping[str, Tensor],
    seed: int,
    pieces: Sequence[Sequence[int]] = (),
) -> int:
    """Freeze all experts, router rows and deltas, then add a new generation.

    With ``config.old_lr_scale`` above 0 nothing is frozen.

    Args:
        model: Changed in place, its architecture included.
        generation: Number of experts, their layers, the stage that creates them, the rank of deltas, and new tokens.
        config: How new parameters are initialized.
        sample: Blocks of the new data in old tokens; see :func:`lifelong_moe.growth.observe.observe`.
        seed: For noise, random rows and clustering.
        pieces: For each new token the older ones that it stands for.

    Returns:
        Number of near ties in the no-op check; see :func:`lifelong_moe.growth.noop.check_noop`.

    Raises:
        RuntimeError: If, with the new experts masked, the model differs from the old one by more than 1e-5: a bug.
    """
    # Both before anything is added: what the check compares with, and the usage by which experts are copied.
    before = behavior(model, sample)
    counts, centroids = _observed(model, generation, config, sample, seed)
    # Freeze first: what is added later is trainable.
    if config.freezes:
        model.freeze_generations()
    model.add_generation(generation)
    model.architecture = model.architecture.grown(generation, config.freezes)
    routing, generator = model.architecture.routing, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for i, (layer, counts_E) in enumerate(zip(model.moe_layers(), counts, strict=True)):
            num = generation.experts_in(i)
            if num == 0:  # a dense layer, or one that grow.layers leaves out
                continue
            # With bundles, deltas are copied from the previous generation, and its experts trained with those.
            copied = most_used(of_previous_generation(layer, counts_E) if routing.by_generation else counts_E, num)
            if generation.rank:
                # Those of one base stand in a row, and share its products.
                copied = sorted(copied, key=layer.banks.base_of)
                _begin_changes(layer, copied, generator)
            else:
                _begin_experts(layer, copied, config, model.architecture.model, generator)
            if layer.router.row_generations():
                layer.router.set_rows(_new_rows(layer, centroids.get(i), copied, config, generator))
        if generation.delta_rank:
            _begin_deltas(model, generator)
        if generation.tokens:
            begin_rows(model, pieces)
    return check_noop(model, sample, before)


@torch.no_grad()
def begin_rows(model: LanguageModel, pieces: Sequence[Sequence[int]]) -> None:
    """Begin the newest generation's rows of embedding and head, each as the mean of its token's pieces.

    Means are of the rows as that generation uses them, its low-rank changes included.

    Args:
        model: Grown, its new rows still empty.
        pieces: For each added token the older ones that it stands for.
    """
    newest = len(model.architecture.generations) - 1
    own, head = model.embedding.added[str(newest)], model.head.added[str(newest)]
    head_VD = model.head.weight_of(newest)
    # The head first: where it is tied to the embedding, the embedding's means are what remains.
    for rows, look_up in ((head, head_VD.__getitem__), (own, partial(model.embedding.look_up, newest))):
        for row, ids in zip(rows, pieces, strict=True):
            row.copy_(look_up(torch.tensor(ids, device=row.device)).mean(dim=0))


def _begin_deltas(model: LanguageModel, generator: torch.Generator) -> None:
    """Copy the deltas of the generation before; where it has none of this rank, start from a change of zero."""
    newest = len(model.architecture.generations) - 1
    for matrix in model.delta_matrices():
        new, previous = matrix.deltas.of(newest), matrix.deltas.of(newest - 1)
        assert new is not None
        if previous is not None and previous.up.shape == new.up.shape:
            new.load_state_dict(previous.state_dict())
        else:
            new.begin(generator)


def of_previous_generation(layer: MoELayer, counts_E: Tensor) -> Tensor:
    """Counts of the generation before the new one; -1 for all other experts, which must not be copied."""
    # The router has the new generation already; the counts are from before it was added.
    *_, before, _ = layer.router.generations
    counts_E = counts_E.clone()
    counts_E[: len(counts_E) - before] = -1
    return counts_E


def most_used(counts_E: Tensor, num: int) -> list[int]:
    """The ``num`` most used experts, ties to the lower index; repeated in order if there are fewer.

    Experts with a negative count are left out.
    """
    order = torch.argsort(counts_E, descending=True, stable=True)
    candidates: list[int] = order[counts_E[order] >= 0].tolist()
    return [candidates[i % len(candidates)] for i in range(num)]


def _begin_experts(
    layer: MoELayer, copied: list[int], config: GrowConfig, shape: ModelConfig, generator: torch.Generator
) -> None:
    """Initialize the new experts: as copies, exact or with relative noise, or at random as the first generation.

    Source:
        Exact copies of a dense network, with gates that sum to 1: sparse upcycling (arXiv:2212.05055).
    """
    experts = layer.banks.matrices()
    for new, source in zip(experts[-len(copied) :], copied, strict=True):
        for i, (matrix, origin) in enumerate(zip(new, experts[source], strict=True)):
            # Always drawn, used or not: skipping a draw would change all later ones of the same seed.
            noise = torch.randn(origin.shape, generator=generator).to(origin)
            if config.init == ExpertInit.upcycle:
                matrix.copy_(origin)
            elif config.init == ExpertInit.copy:
                matrix.copy_(origin + config.noise * origin.std() * noise)
            elif layer.router.expert_scale is not None:
                fan_in_normal_(matrix, layer.router.expert_scale, generator)
            else:
                matrix.copy_(initial_std(shape, residual=i == 1) * noise)


def _begin_changes(layer: MoELayer, chosen: list[int], generator: torch.Generator) -> None:
    """Begin new low-rank experts as the chosen ones, of whose changes only those of the same rank are copied."""
    new = layer.banks.born[-1]
    assert isinstance(new, LowRankExperts)
    new.begin(generator)
    for place, source in enumerate(chosen):
        home, its_place = layer.banks.at(source)
        if isinstance(home, LowRankExperts) and home.rank == new.rank:
            new.begin_as(place, home, its_place)
        else:
            new.base[place] = layer.banks.base_of(source)


def _observed(
    model: LanguageModel, generation: Generation, config: GrowConfig, sample: Mapping[str, Tensor], seed: int
) -> tuple[list[Tensor], dict[int, NDArray[np.float32]]]:
    """Tokens of each expert by layer, and where rows begin as centroids, those of the layers that have rows."""
    layers = [*enumerate(model.moe_layers())] if config.router == RouterInit.centroid else []
    wanted = [i for i, layer in layers if layer.router.row_generations() and generation.experts_in(i)]
    counts, centroids = list[Tensor](), dict[int, NDArray[np.float32]]()
    with closing(observe(model, sample, wanted)) as observations:
        for i, seen in enumerate(observations):
            counts.append(seen.counts_E)
            if seen.inputs_ND is not None:
                centroids[i] = spherical_kmeans(seen.inputs_ND.numpy(), generation.experts_in(i), seed=seed)
    return counts, centroids


def _new_rows(
    layer: MoELayer,
    centroids: NDArray[np.float32] | None,
    copied: list[int],
    config: GrowConfig,
    generator: torch.Generator,
) -> Tensor:
    """Router rows of the new experts ``(num, D)``, scaled as the old rows, so that logits compare."""
    old_ED = torch.cat(layer.router.row_generations()[:-1])
    if config.router == RouterInit.copy:
        return old_ED[copied]
    if centroids is not None:
        return torch.from_numpy(centroids).to(old_ED) * old_ED.norm(dim=1).mean()
    return torch.randn(len(copied), old_ED.shape[1], generator=generator).to(old_ED) * old_ED.std()
