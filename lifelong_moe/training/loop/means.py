"""A step's losses and loads over all of its micro-batches and processes, asked of the device once a step."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import torch
from torch import Tensor

from lifelong_moe.ops.collectives import num_ranks, sum_over_ranks
from lifelong_moe.routing.base import Routing


class StepMeans:
    """Adds up micro-batches; at the step's end makes means of them.

    What is added must have the same names in each micro-batch of a step, on each process.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        """Of the last step: what was added, ``imbalance`` (load of the busiest expert over the mean load; 1 if even),
        and ``drop_rate`` (share of choices that found no room) where experts have a capacity. Of the latter two each
        layer's is made of the whole step's counts; the mean is over layers."""
        self._names: list[str] = []
        self._experts: list[int] = []
        self._sums: Tensor | None = None
        """Losses; choices of each expert, layer after layer; dropped and all choices of each layer."""
        self._micro_batches = 0

    def add(
        self, losses: Mapping[str, Tensor], shares: Mapping[str, float], routings: list[Routing], mask_T: Tensor
    ) -> None:
        """Add a micro-batch.

        Args:
            losses: Scalars by name.
            shares: What a loss weighs in the step's mean; 1 where it is absent.
            routings: What the model's layers decided.
            mask_T: True for real tokens, bool ``(T,)``; padding loads no expert.
        """
        values = [value.detach().float() * shares.get(name, 1.0) for name, value in losses.items()]
        chosen = [routing.counts_of(mask_T) for routing in routings if routing.num_experts]
        dropped = [routing.dropped for routing in routings if routing.dropped is not None]
        found = torch.cat([torch.stack(values), *chosen, *dropped])  # float32, in which counts up to 2^24 are exact
        self._sums = found if self._sums is None else self._sums + found
        self._names, self._experts = list(losses), [len(counts_E) for counts_E in chosen]
        self._micro_batches += 1

    def close(self, other: Tensor) -> float:
        """Make the step's ``values`` and forget its sums; returns a scalar that is asked of the device along with them.

        Raises:
            RuntimeError: If there was no micro-batch.
        """
        if self._sums is None:
            raise RuntimeError("a step without a micro-batch has no means")
        micro_batches = self._micro_batches * num_ranks()
        asked = torch.cat([other.detach().float().view(1), sum_over_ranks(self._sums)]).tolist()
        numbers = iter(asked[1:])
        self.values = {name: next(numbers) / micro_batches for name in self._names}
        loads = [list(islice(numbers, experts)) for experts in self._experts]
        if loads:
            self.values["imbalance"] = _mean([max(load) * len(load) / max(1.0, sum(load)) for load in loads])
        if dropped := list(zip(numbers, numbers, strict=True)):
            self.values["drop_rate"] = _mean([lost / max(1.0, wanted) for lost, wanted in dropped])
        self._sums, self._micro_batches = None, 0
        return float(asked[0])


def _mean(layers: list[float]) -> float:
    return sum(layers) / len(layers)
