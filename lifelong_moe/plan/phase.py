"""A part of a stage, with what it trains."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Trains(StrEnum):
    """What a phase trains."""

    stage = "stage"
    """Everything that the stage does not freeze."""
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
    """Fit the stage's centroids before it begins."""
    follows: bool = False
    """Go on in the previous phase's order of samples; else it has an order of its own."""
    lr_scale: float = 1.0
    old_loss: float = 0.0
    """Factor on ``-log`` of what replayed text gives to old experts; above 0 it replaces the balance loss."""
