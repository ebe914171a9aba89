"""A step's losses and expert loads over all micro-batches and processes, read from the device once a step."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import torch
from torch import Tensor

from lifelong_moe.ops.collectives import num_ranks, sum_over_ranks
from lifelong_moe.routing.base import Routing


class StepMeans:
    """Adds up the losses and loads of micro-batches, and averages them at the end of the step.

    Each micro-batch of a step, on each process, must add the same names.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        """Of the last step: the losses, ``imbalance`` (load of the busiest expert over the mean load; 1 if even), and
        ``drop_rate`` (share of choices over capacity) where experts have a capacity. The latter two are means over
        layers."""
        self._names: list[str] = []
        self._experts: list[int] = []
        self._sums: Tensor | None = None
        """Losses; choices of each expert, layer by layer; dropped and all choices of each layer."""
        self._micro_batches = 0

    def add(
        self, losses: Mapping[str, Tensor], shares: Mapping[str, float], routings: list[Routing], mask_T: Tensor
    ) -> None:
        """Add a micro-batch, without waiting for the device.

        Args:
            losses: Scalars by name.
            shares: Weight of a loss in the step's mean; 1 where it is absent.
            routings: Of the model's layers.
            mask_T: True for real tokens, bool ``(T,)``; padding loads no expert.
        """
        values = [value.detach().float() * shares.get(name, 1.0) for name, value in losses.items()]
        chosen = [routing.counts_of(mask_T) for routing in routings if routing.num_experts]
        dropped = [routing.dropped for routing in routings if routing.dropped is not None]
        # One float32 vector, so that one transfer and one all-reduce are enough; counts up to 2^24 are exact in it.
        found = torch.cat([torch.stack(values), *chosen, *dropped])
        self._sums = found if self._sums is None else self._sums + found
        self._names, self._experts = list(losses), [len(counts_E) for counts_E in chosen]
        self._micro_batches += 1

    def finish_step(self, other: Tensor) -> float:
        """Set ``values`` from the step's sums and clear them.

        Args:
            other: A scalar to read from the device in the same transfer, the same on all processes.

        Returns:
            The scalar.

        Raises:
            RuntimeError: If there was no micro-batch.
        """
        if self._sums is None:
            raise RuntimeError("a step without a micro-batch has no means")
        micro_batches = self._micro_batches * num_ranks()
        asked = torch.cat([other.detach().float().view(1), sum_over_ranks(self._sums)]).tolist()
        numbers = iter(asked[1:])  # in the order in which add() joined them
        self.values = {name: next(numbers) / micro_batches for name in self._names}
        loads = [list(islice(numbers, experts)) for experts in self._experts]
        # Of the whole step's counts: a mean of the micro-batches' imbalances would be larger.
        if loads:
            self.values["imbalance"] = _mean([max(load) * len(load) / max(1.0, sum(load)) for load in loads])
        if dropped := list(zip(numbers, numbers, strict=True)):
            self.values["drop_rate"] = _mean([lost / max(1.0, wanted) for lost, wanted in dropped])
        self._sums, self._micro_batches = None, 0
        return float(asked[0])


def _mean(layers: list[float]) -> float:
    return sum(layers) / len(layers)
