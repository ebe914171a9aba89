"""The state that ticks of retraining keep in a run's head. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lifelong_moe.storage.grammars import Key, Name, Prefix, Sha256


@dataclass(frozen=True, kw_only=True)
class SettledBatch:
    """A decided batch, whose documents no tick considers again."""

    name: Name
    """Name of its distribution."""
    outcome: str
    """``promoted``, ``rejected`` or ``skipped``."""
    reason: str
    at: str
    """Time of the decision, ISO 8601, UTC."""
    heldout_fraction: float | None = None
    """As in :class:`~lifelong_moe.store.versions.VersionStage`; so are the next two."""
    heldout_sources: int = 1
    sources: Prefix | None = None


@dataclass(frozen=True, kw_only=True)
class LastTick:
    """How the last tick of retraining ended."""

    at: str
    outcome: str
    reason: str
    batch: Sha256 | None = None
    """Hash of the batch that it considered."""

    def repeats(self, earlier: LastTick | None) -> bool:
        """Whether an earlier tick ended the same way, whatever its time."""
        # A timer asks every night: only the time may differ.
        return earlier is not None and replace(earlier, at=self.at) == self


@dataclass(frozen=True, kw_only=True)
class BestLoss:
    """The lowest loss of any stage on a distribution's held-out text."""

    key: Key
    """Key of the stage."""
    heldout: Key
    """Hash of the held-out text; losses on another text do not compare."""
    nats: float
    """Nats per token."""
