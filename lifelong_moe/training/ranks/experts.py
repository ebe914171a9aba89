"""Ranks that each hold a part of every layer's experts: expert parallelism, whatever becomes of the rest of the model.

Text travels to experts and back (:func:`lifelong_moe.ops.collectives.parallel_experts`), so each rank has micro-batches
of its own, as without. The first group writes step checkpoints, each rank the experts that it has.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from lifelong_moe.model.experts import ExpertBanks
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.ops.collectives import ExpertPlacement
from lifelong_moe.training.callbacks.divided import Divided, Held, Layout, Part
from lifelong_moe.training.ranks import supervise


@dataclass(frozen=True)
class PlacedExperts:
    """One matrix of a generation's experts, of which a rank has some."""

    name: str
    """Of the parameter in the model."""
    stored: list[str]
    """Names of the experts' own tensors in a state dictionary, those of all ranks. Empty while held in fewer bits: then
    it is stored as it is."""


def place_experts(model: LanguageModel, group: dist.ProcessGroup) -> dict[nn.Parameter, PlacedExperts]:
    """Leave this process its part of each generation's experts; returns that part.

    Args:
        model: Whole, the same in each process of the group. Its parameters are replaced, not changed: a teacher that
            shares them stays whole.
        group: Processes whose number divides each generation's experts.
    """
    placed: dict[nn.Parameter, PlacedExperts] = {}
    for i, layer in enumerate(model.moe_layers()):
        if len(layer.banks):
            placed |= _place(layer.banks, f"blocks.{i}.moe.banks", group)
    return placed


def _place(banks: ExpertBanks, name: str, group: dist.ProcessGroup) -> dict[nn.Parameter, PlacedExperts]:
    rank, ranks, placed, first = group.rank(), group.size(), {}, 0
    device = next(banks.parameters()).device
    banks.placement = ExpertPlacement.of([generation.indices for generation in banks.born], group, device)
    for g, generation in enumerate(banks.born):
        stored = {tensor: [f"{name}.{one}" for one in generation.stored_names(tensor)] for tensor in generation.tensors}
        # Of a matrix that is held in fewer bits, what is held: there, too, expert by expert.
        for path, whole in [*generation.named_parameters()]:
            owner, _, leaf = path.rpartition(".")
            # Cloned, so that the memory of the others' is given back.
            mine = nn.Parameter(whole.detach()[rank::ranks].clone(), requires_grad=whole.requires_grad)
            generation.get_submodule(owner).register_parameter(leaf, mine)
            placed[mine] = PlacedExperts(f"{name}.generations.{g}.{path}", stored.get(path, []))
        generation.indices = generation.indices[rank::ranks]
        generation.here = range(first, first := first + len(generation))
    return placed


class ParallelExperts:
    """This rank's experts, and the groups of ranks that have the others, and the same.

    All ranks make one together. A group is of consecutive ranks.

    Args:
        model: See :func:`place_experts`.
        ranks: Of a group.
    """

    def __init__(self, model: LanguageModel, ranks: int) -> None:
        self._ranks, self._world, self._rank = ranks, dist.get_world_size(), dist.get_rank()
        # Groups of their own: other messages are in no fixed order among those of the layers. New groups do not inherit
        # the time after which a silent rank is given up.
        limit = timedelta(seconds=supervise.TIMEOUT_SECONDS)
        self._group, _ = dist.new_subgroups(ranks, timeout=limit)
        same = [[*range(first, self._world, ranks)] for first in range(ranks)]
        self._replicas, _ = dist.new_subgroups_by_enumeration(same, timeout=limit)
        self.placed = place_experts(model, self._group)
        """The parameters that it has a part of."""

    def reduce(self) -> None:
        """Make gradients, once a step, those of the mean over all ranks' losses."""
        for parameter in self.placed:
            if parameter.grad is not None:
                # It is the sum over the losses of this group, whose text came here.
                parameter.grad /= self._world
                if self._replicas.size() > 1:
                    dist.all_reduce(parameter.grad, group=self._replicas)

    def part(self, value: Tensor, name: str) -> Part:
        """What this rank writes of a tensor of all experts of a generation.

        Args:
            value: That of its experts.
            name: Under which it is written.
        """
        shape = (len(value) * self._ranks, *value.shape[1:])
        held = tuple(Held(rank, rank, self._ranks) for rank in range(self._ranks))
        # The first group has all experts.
        return Part(Layout(name, shape, 0, held), value if self._rank < self._ranks else None)

    def own_part(self, value: Any, parameter: nn.Parameter) -> Tensor:
        """This rank's experts of a stored tensor of those of a generation.

        Raises:
            ValueError: If it is of another shape.
        """
        stored, shape = Divided.of(value), (len(parameter) * self._ranks, *parameter.shape[1:])
        if stored.shape != shape:
            raise ValueError(f"{stored.shape} in place of {shape}")
        return stored.taken(0, range(self._group.rank(), shape[0], self._ranks))

    def state(self, frozen: AbstractSet[str]) -> dict[str, Tensor | Part]:
        """What is stored by name in the module's state dictionary, but for the frozen; each expert's is one rank's."""
        found: dict[str, Tensor | Part] = {}
        for parameter, one in self.placed.items():
            value = parameter.detach()
            if not one.stored and f"model.{one.name}" not in frozen:
                found[f"model.{one.name}"] = self.part(value, f"model.{one.name}")
            for i, name in enumerate(f"model.{name}" for name in one.stored):
                if name not in frozen:
                    rank, shape = i % self._ranks, tuple(value.shape[1:])
                    here = value[i // self._ranks] if self._rank == rank else None
                    found[name] = Part(Layout(name, shape, 0, (Held(rank, 0),)), here)
        return found
