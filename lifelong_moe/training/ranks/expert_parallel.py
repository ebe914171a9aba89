"""Ranks that each hold a part of every layer's experts: expert parallelism as a Lightning strategy.

Text travels to experts and back (:func:`lifelong_moe.ops.collectives.parallel_experts`); everything else is DDP's:
trunk and routers are whole in each rank, and each has micro-batches of its own. Step checkpoints are those of DDP, too:
rank 0 gathers the experts that train, tensor by tensor, so that any number of processes continues.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lifelong_moe.model.experts import ExpertBanks
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.ops.collectives import ExpertPlacement
from lifelong_moe.training.ranks import supervise
from lifelong_moe.training.ranks.gathering import GatheringStrategy


@dataclass(frozen=True)
class PlacedExperts:
    """One matrix of a generation's experts, of which a rank has some."""

    name: str
    """Of the parameter in the model."""
    stored: list[str]
    """Names of the experts' own tensors in a state dictionary, those of all ranks."""


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
        for tensor in generation.tensors:
            stored = [f"{name}.{each}" for each in generation.stored_names(tensor)]
            whole = generation.get_parameter(tensor)
            # Cloned, so that the memory of the others' is given back.
            mine = nn.Parameter(whole.detach()[rank::ranks].clone(), requires_grad=whole.requires_grad)
            generation.register_parameter(tensor, mine)
            placed[mine] = PlacedExperts(f"{name}.generations.{g}.{tensor}", stored)
        generation.indices = generation.indices[rank::ranks]
        generation.here = range(first, first := first + len(generation))
    return placed


class ExpertParallelStrategy(GatheringStrategy):
    """Lightning's DDP over groups of ranks, in each of which the experts are divided.

    Args:
        ranks: Of a group; consecutive ones.
    """

    def __init__(self, ranks: int) -> None:
        # Unused parameters: a rank may have no token for a generation. Buffers do not change in training.
        super().__init__(process_group_backend="gloo", find_unused_parameters=True, forward_sync_buffers=False)
        self._ranks = ranks
        self._accumulates = False
        """Whether more micro-batches of the step follow."""

    def configure_ddp(self) -> None:
        """Place experts, whose weights are those of the checkpoint by then, and let DDP average all other gradients."""
        # Groups of their own: DDP's messages are in no fixed order among those of the layers. New groups do not inherit
        # the time after which a silent rank is given up.
        limit = timedelta(seconds=supervise.TIMEOUT_SECONDS)
        self._group, _ = dist.new_subgroups(self._ranks, timeout=limit)
        same_part = [[*range(first, self.world_size, self._ranks)] for first in range(self._ranks)]
        self._replicas, _ = dist.new_subgroups_by_enumeration(same_part, timeout=limit)
        module: Any = self.lightning_module
        self._placed = place_experts(module.model, self._group)
        # Where DDP looks for it; torch's function that sets it is no more public.
        ignored = {f"model.{one.name}" for one in self._placed.values()}
        module._ddp_params_and_buffers_to_ignore = ignored
        # DDP refuses a model of which it has nothing to reduce.
        if any(p.requires_grad for name, p in module.named_parameters() if name not in ignored):
            super().configure_ddp()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Context of a micro-batch that is not the step's last."""
        self._accumulates = True
        try:
            with super().block_backward_sync():
                yield
        finally:
            self._accumulates = False

    def post_backward(self, closure_loss: Tensor) -> None:
        """After the step's last micro-batch, make the experts' gradients those of the mean over all ranks' losses."""
        super().post_backward(closure_loss)
        if self._accumulates:
            return
        for parameter in self._placed:
            if parameter.grad is not None:
                # It is the sum over the losses of this group, whose text came here.
                parameter.grad /= self.world_size
                if self._replicas.size() > 1:
                    dist.all_reduce(parameter.grad, group=self._replicas)

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """What trains, whole on rank 0; frozen tensors are not gathered, since no checkpoint holds them."""
        module: Any = self.lightning_module
        state = {name: one for name, one in module.state_dict().items() if name not in module.frozen}
        for parameter, one in self._placed.items():
            names = [name for name in (f"model.{name}" for name in one.stored) if name not in module.frozen]
            if names:
                # Nothing elsewhere.
                state |= zip(names, self.gathered(parameter.detach(), parameter), strict=False)
        return state

    def gathered(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """A tensor of all experts of a generation on rank 0, and an empty one elsewhere; else the tensor itself."""
        if parameter not in self._placed:
            return value
        # The first group has all experts.
        if self.global_rank >= self._ranks:
            return value.new_empty(0)
        parts = [torch.empty_like(value) for _ in range(self._ranks)] if self.is_global_zero else None
        dist.gather(value, parts, dst=0, group=self._group)
        return torch.stack(parts, dim=1).flatten(0, 1) if parts else value.new_empty(0)

    def divided(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """This rank's experts of those of a generation."""
        return value[self._group.rank() :: self._ranks] if parameter in self._placed else value
