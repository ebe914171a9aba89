"""A phase of a stage, and the parameters that it trains."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Trains(StrEnum):
    """The parameters that a phase trains."""

    stage = "stage"
    """All that the stage does not freeze."""
    router = "router"
    """This stage's router rows only."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a stage with an optimizer and a schedule of its own."""

    name: str
    steps: int
    replay_fraction: float
    """Share of its sequences that is replayed text."""
    trains: Trains = Trains.stage
    fits_clusters: bool = False
    """Whether the stage's centroids are fitted before it."""
    follows: bool = False
    """Whether it continues the previous phase's order of samples; otherwise it has its own."""
    lr_scale: float = 1.0
    old_loss: float = 0.0
    """Factor on ``-log`` of the gate weight that replayed text gives to old experts; above 0 it replaces the balance
    loss."""
