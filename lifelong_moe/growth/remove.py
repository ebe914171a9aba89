"""Take a generation of experts out of a model again. Pure: names and tensors in, names and tensors out.

What is left computes what it would have computed had the generation never been there, exactly, provided that nothing
trained beside it. A trunk that trained with it, or later experts that competed with it for tokens, stay as it made
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from lifelong_moe.config.parts import TensorName
from lifelong_moe.config.routing.base import Centroids
from lifelong_moe.config.routing.modes import ROUTERS
from lifelong_moe.config.routing.shared import TextClusterConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.architecture import Architecture


def remove_generation(
    architecture: Architecture, tensors: Mapping[str, Tensor], index: int
) -> tuple[Architecture, dict[str, Tensor]]:
    """Remove a generation's experts, router rows, deltas, centroids and label; later ones move up.

    A distribution whose label pointed to it is unknown from then on, and goes to group 0.

    Args:
        architecture: Of the model.
        tensors: All of its tensors by name, as in its state dictionary; not changed.
        index: Which generation, from 0.

    Returns:
        The architecture and the tensors that are left, by their new names.

    Raises:
        ConfigError: If it is the first generation, or routing has no place for a gap.
    """
    _require_removable(architecture, index)
    names = {name: renamed(architecture, name, index) for name in tensors}
    return without_generation(architecture, index), {new: tensors[old] for old, new in names.items() if new is not None}


def without_generation(architecture: Architecture, index: int) -> Architecture:
    """The architecture with one generation less; the newest one left still trains if it did."""
    left, continued = architecture.generations[:index] + architecture.generations[index + 1 :], architecture.continued
    if continued is not None:
        continued = None if continued == index else continued - (continued > index)
    return replace(
        architecture,
        generations=left,
        continued=continued,
        frozen=min(architecture.frozen - (index < architecture.frozen), len(left) - 1),
        labels=tuple((name, g - (g > index)) for name, g in architecture.labels if g != index),
    )


def renamed(architecture: Architecture, name: str, index: int) -> str | None:
    """Name of a tensor once a generation is gone; None if it goes with it."""
    here = TensorName.parse(name)
    if here.expert is not None and here.layer is not None:
        first = sum(g.experts_in(here.layer) for g in architecture.generations[:index])
        num = architecture.generations[index].experts_in(here.layer)
        if first <= here.expert < first + num:
            return None
        return str(replace(here, expert=here.expert - num * (here.expert >= first)))
    if here.generation is None:
        return name
    later = here.generation > index
    return None if here.generation == index else str(replace(here, generation=here.generation - later))


def _require_removable(architecture: Architecture, index: int) -> None:
    routing, newest = architecture.routing, len(architecture.generations) - 1
    if index == 0:
        raise ConfigError(
            f"stage {architecture.generations[0].stage} is the first: all later ones stand on it, and it cannot go."
        )
    if routing.mode not in ROUTERS:
        raise ConfigError(f"routing.mode={routing.mode} is a router of your own; what it keeps of a stage is unknown.")
    drawn = isinstance(routing, TextClusterConfig) and routing.centroids == Centroids.random
    hashes = routing.mode == "hash" or (routing.by_document and drawn)
    if hashes and index != newest:
        raise ConfigError(
            f"routing hashes into numbered experts, so without stage {architecture.generations[index].stage} other "
            f"text would reach the later ones than they learned from; only the newest stage can go."
        )
