"""What a model is built from: shape, routing, and the generations of experts it has grown. Torch-free, JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

from lifelong_moe.model.config import ModelConfig
from lifelong_moe.routing.config import BalanceOver, Features, Level, RoutingConfig


@dataclass(frozen=True)
class Generation:
    """Experts that one stage gave to every layer."""

    stage: str
    """Name of the stage they were born in."""
    experts: int
    """How many a layer."""


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
    labels: tuple[tuple[str, int], ...] = ()
    """``routing.mode=label``: the group of each distribution learned so far."""

    @property
    def num_experts(self) -> int:
        """Experts per layer."""
        return sum(generation.experts for generation in self.generations)

    def expert_births(self) -> list[str]:
        """Birth stage of each expert of a layer, by index."""
        return [generation.stage for generation in self.generations for _ in range(generation.experts)]

    def grown(self, stage: str, experts: int) -> Architecture:
        """All present generations frozen, and a new one."""
        generations = (*self.generations, Generation(stage, experts))
        return replace(self, generations=generations, frozen=len(self.generations))

    def labelled(self, distribution: str) -> Architecture:
        """The distribution's label points to the newest generation."""
        labels = {**dict(self.labels), distribution: len(self.generations) - 1}
        return replace(self, labels=tuple(labels.items()))

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Architecture:
        """The inverse of :meth:`to_json`."""
        routing = dict(data["routing"])
        routing["level"] = Level(routing["level"])
        routing["features"] = Features(routing["features"])
        routing["balance_over"] = BalanceOver(routing["balance_over"])
        return cls(
            model=ModelConfig(**data["model"]),
            routing=RoutingConfig(**routing),
            vocab_size=data["vocab_size"],
            bos_id=data["bos_id"],
            generations=tuple(Generation(**g) for g in data["generations"]),
            frozen=data["frozen"],
            labels=tuple((name, group) for name, group in data["labels"]),
        )
