"""What a plan says of the gate beforehand. Apart from its computation: a stored plan is read without scipy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Power:
    """How often the gate would pass a harmless candidate."""

    passes: float
    """Chance that all checks of old distributions pass it."""
    checks: int
    weakest: str
    """Distributions of the check with the smallest chance."""
    weakest_passes: float
