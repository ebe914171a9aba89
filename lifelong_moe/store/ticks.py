"""What ticks of retraining leave in a run's head. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class SettledBatch:
    """A decision about a batch: its documents are not looked at again."""

    name: str
    """Of the distribution that it is."""
    outcome: str
    """``promoted``, ``rejected`` or ``skipped``."""
    reason: str
    at: str
    """When, ISO 8601, UTC."""
    heldout_fraction: float
    heldout_sources: int = 1
    sources: str | None = None
    """As in :class:`~lifelong_moe.store.versions.VersionStage`."""


@dataclass(frozen=True, kw_only=True)
class LastTick:
    """How the last tick of retraining ended."""

    at: str
    outcome: str
    reason: str
    batch: str | None = None
    """Hash of the batch that it was about."""

    def repeats(self, earlier: LastTick | None) -> bool:
        """Whether an earlier tick ended just so."""
        return earlier is not None and replace(earlier, at=self.at) == self


@dataclass(frozen=True, kw_only=True)
class BestLoss:
    """The lowest loss that any stage ever had on a distribution's held-out text."""

    key: str
    """Of that stage."""
    heldout: str
    """Hash of the text."""
    nats: float
    """Nats per token."""
