"""How a tick ended, as the command line, the ledger, MLflow and the hooks get it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

AWAITING = "awaiting approval"
"""Outcome of a tick whose candidate has passed the gate, and of those after it, where a person promotes."""


def awaiting(run: str, version: int) -> str:
    """Why a tick ends with :data:`AWAITING`."""
    return f"version {version} has passed the gate; lifelong-moe promote {run} lets it serve, --reject does not"


@dataclass(frozen=True)
class ServingVersion:
    """The version that serves after a tick, and its last stage."""

    version: int
    stage: str
    """Name of the stage."""
    key: str
    """Key of the stage."""


@dataclass(frozen=True)
class TickOutcome:
    """How a tick ended; a field is None where it does not apply."""

    outcome: str
    """``idle``, ``planned``, ``waiting``, ``skipped``, ``over budget``, ``rejected``, ``promoted``, ``failed``, or
    ``awaiting approval``, where a person decides what serves."""
    reason: str
    """Why, for the operator."""
    _: KW_ONLY
    error: str | None = None
    """Class of the exception, if the tick failed."""
    champion: ServingVersion | None = None
    batch: str | None = None
    """Hash of the batch."""
    data: str | None = None
    """Name of the batch's distribution."""
    action: str | None = None
    """What the plan decided: ``skip``, ``wait``, ``continue`` or ``grow``."""
    plan: str | None = None
    """Path of the plan."""
    near_copies: Mapping[str, int] | None = None
    """Documents left out, by what they are near copies of."""
    bad_lines: int | None = None
    """Lines of the inbox that were left out because they hold no document."""
    candidate: str | None = None
    """Key of the stage that was trained."""
    version: int | None = None
    """Number of the version that awaits approval, or that a person has decided about."""
    run: str | None = None
    at: str | None = None
    """When it ended, ISO 8601, UTC."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data; fields that are None are left out."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
