"""Remove a generation from a model: a pure function of tensors by name.

The remaining model is exactly what it would be had the generation never been added, provided that nothing else trained
along with it. A trunk that trained with it, and later experts that competed with it for tokens, keep its influence.
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
    """Remove a generation's experts, router rows, deltas, centroids and label; later ones are renumbered.

    A distribution that was labelled with it becomes unknown, and uses generation 0.

    Args:
        architecture: Of the model.
        tensors: The model's state dictionary; not changed.
        index: Of the generation, from 0.

    Returns:
        The architecture and the remaining tensors under their new names.

    Raises:
        ConfigError: If it is the first generation, or the router cannot lose this one.
    """
    _require_removable(architecture, index)
    names = {name: renamed(architecture, name, index) for name in tensors}
    kept = {new: _rebased(architecture, old, tensors[old], index) for old, new in names.items() if new is not None}
    return without_generation(architecture, index), kept


def _rebased(architecture: Architecture, name: str, tensor: Tensor, index: int) -> Tensor:
    """A tensor after a generation is removed: what low-rank experts change has another number then."""
    here = TensorName.parse(name)
    if not here.is_base or here.layer is None:
        return tensor
    first = sum(one.experts_in(here.layer) for one in architecture.generations[:index])
    gone = range(first, first + architecture.generations[index].experts_in(here.layer))
    if int(tensor) in gone:
        raise ConfigError(
            f"stage {architecture.generations[index].stage}'s experts are what low-rank experts of a later stage "
            f"change; remove the newest stage first."
        )
    return tensor - len(gone) * (tensor >= gone.stop)


def without_generation(architecture: Architecture, index: int) -> Architecture:
    """The architecture without a generation; the newest remaining one still trains if it did."""
    left, continued = architecture.generations[:index] + architecture.generations[index + 1 :], architecture.continued
    # A stage that continues an old generation trains that one in place of the newest.
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
    """A tensor's name after a generation is removed; None if the tensor is removed with it."""
    here = TensorName.parse(name)
    # Experts are numbered through all generations of a layer; everything else carries its generation's number.
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
            f"stage {architecture.generations[0].stage} is the first, on which all others build; it cannot be removed."
        )
    if architecture.generations[index].tokens:
        raise ConfigError(
            f"stage {architecture.generations[index].stage} added tokens (vocabulary.add), which later stages read; "
            f"remove the newest stage first."
        )
    if routing.mode not in ROUTERS:
        raise ConfigError(
            f"routing.mode={routing.mode} is a custom router: which of its tensors belong to a stage is unknown."
        )
    drawn = isinstance(routing, TextClusterConfig) and routing.centroids == Centroids.random
    # Hashes go by expert or domain numbers, which shift for all generations after a removed one.
    hashes = routing.mode == "hash" or (routing.by_document and drawn)
    if hashes and index != newest:
        raise ConfigError(
            f"routing hashes tokens to expert numbers: without stage {architecture.generations[index].stage}, later "
            f"experts would receive other text than they were trained on. Remove the newest stage first."
        )
