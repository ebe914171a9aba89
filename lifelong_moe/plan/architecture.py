"""What a model is built from: shape, routing, and the generations of experts it has grown. Torch-free, JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.routing.base import RoutingConfig
from lifelong_moe.config.routing.modes import stored_routing
from lifelong_moe.storage.plain import from_plain


@dataclass(frozen=True)
class Generation:
    """Experts that one stage gave to every layer."""

    stage: str
    """Name of the stage they were born in."""
    experts: int
    """How many in each layer that grew."""
    layers: tuple[int, ...] | None = None
    """Layers that grew; None means all."""
    delta_rank: int = 0
    """Rank of the changes of the trunk that travel with these experts; 0 means none."""
    by_layer: tuple[int, ...] | None = None
    """How many each layer got, where that differs; ``experts`` is then the largest number."""

    def experts_in(self, layer: int) -> int:
        """How many a layer got."""
        if self.by_layer is not None:
            return self.by_layer[layer]
        return self.experts if self.layers is None or layer in self.layers else 0


def first_generation(stage: str, model: ModelConfig) -> Generation:
    """Experts that the first stage begins with."""
    numbers = model.experts_by_layer
    if len(set(numbers)) == 1:
        return Generation(stage, numbers[0])
    if len(set(numbers) - {0}) == 1:
        return Generation(stage, model.most_experts, model.moe_layers)
    return Generation(stage, model.most_experts, model.moe_layers, by_layer=numbers)


@dataclass(frozen=True)
class Architecture:
    """Everything but the numbers: two equal architectures have the same tensors."""

    model: ModelConfig
    routing: RoutingConfig
    vocab_size: int
    bos_id: int
    generations: tuple[Generation, ...]
    frozen: int = 0
    """Generations, oldest first, that no longer train."""
    continued: int | None = None
    """An older generation that trains on, alone; ``frozen`` then counts all."""
    labels: tuple[tuple[str, int], ...] = ()
    """Where routing goes by label: the group of each distribution learned so far."""

    @property
    def num_experts(self) -> int:
        """Experts of the layer that has most."""
        return max(self.experts_in(layer) for layer in range(self.model.layers))

    @property
    def has_deltas(self) -> bool:
        """Whether tokens of different bundles see different trunks."""
        return any(generation.delta_rank for generation in self.generations)

    def experts_in(self, layer: int) -> int:
        """Experts of a layer."""
        return sum(generation.experts_in(layer) for generation in self.generations)

    def expert_births(self, layer: int) -> list[str]:
        """Birth stage of each expert of a layer, by index."""
        return [generation.stage for generation in self.generations for _ in range(generation.experts_in(layer))]

    def grown(self, generation: Generation, freezes: bool = True) -> Architecture:
        """With a new generation; all present ones are frozen, or train on."""
        frozen = len(self.generations) if freezes else self.frozen
        continued = None if freezes else self.continued
        return replace(self, generations=(*self.generations, generation), frozen=frozen, continued=continued)

    def continuing(self, stage: str) -> Architecture:
        """With the generation that was born in a stage training on, and all others frozen."""
        return replace(self, frozen=len(self.generations), continued=self.born_in(stage))

    def shallow(self, layers: Sequence[int]) -> Architecture:
        """With some of the layers, all of which have a mixture of experts; everything trains."""
        model = replace(self.model, layers=len(layers), experts=[self.experts_in(layer) for layer in layers])
        kept = tuple(
            replace(g, layers=None, by_layer=tuple(g.experts_in(layer) for layer in layers)) for g in self.generations
        )
        return replace(self, model=model, generations=kept, frozen=0, continued=None)

    def born_in(self, stage: str) -> int:
        """The generation that a stage bore."""
        return [generation.stage for generation in self.generations].index(stage)

    def trains(self, generation: int) -> bool:
        """Whether a generation trains."""
        return generation >= self.frozen or generation == self.continued

    def labelled(self, distribution: str) -> Architecture:
        """The distribution's label points to the newest generation, or to the one that trains on."""
        group = len(self.generations) - 1 if self.continued is None else self.continued
        labels = {**dict(self.labels), distribution: group}
        return replace(self, labels=tuple(labels.items()))

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data; what is None in most models is left out, so that they are written as ever."""
        data = dataclasses.asdict(self) | {"routing": self.routing.to_json()}
        if self.continued is None:
            del data["continued"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Architecture:
        """The inverse of :meth:`to_json`."""
        return from_plain(cls, {**data, "routing": stored_routing(data["routing"])})
