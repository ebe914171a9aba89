"""The versions of a run: each model that has served, as its head lists them. Pure and torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lifelong_moe.storage.grammars import Key, Name, Prefix, Sha256
from lifelong_moe.storage.keys import SHORT

if TYPE_CHECKING:
    from lifelong_moe.store.stages import CommittedStage

Kind = Literal["base", "promoted", "dropped", "consolidated"]
Action = Literal["base", "grow", "continue", "drop", "consolidate"]


@dataclass(frozen=True, kw_only=True)
class VersionStage:
    """One stage of a version's chain."""

    name: Name
    key: Key
    data: Name
    """Its distribution."""
    action: Action
    """How it was made; ``drop`` and ``consolidate`` derive a model from the one before without training."""
    batch: Sha256 | None = None
    """Hash of its batch of documents; None if the run's configuration names the text."""
    heldout_fraction: float | None = None
    """Fraction of the batch's sources that was held out; None without a batch, or if it was not recorded."""
    heldout_sources: int = 1
    """Least number of sources held out; 1 where it was not recorded."""
    sources: Prefix | None = None
    """Identifies the copy of the batch by sources; see :meth:`lifelong_moe.data.text.batches.BatchStore.sources`."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """A model that serves or has served."""

    id: int
    """Its index in the list, from 0."""
    at: str
    """Time at which it began to serve, ISO 8601, UTC."""
    kind: Kind
    reason: str
    """Human-readable reason for the change."""
    before: int | None
    """Id of the version that served until then; None for the first."""
    stages: tuple[VersionStage, ...]
    """The whole chain, oldest first; the last stage is the model."""

    @property
    def key(self) -> str:
        """Key of the version's model."""
        return self.stages[-1].key


def base_stages(chain: Sequence[CommittedStage]) -> tuple[VersionStage, ...]:
    """The stages of version 0, as the run's configuration made them.

    Args:
        chain: See :meth:`lifelong_moe.store.stages.StageStore.chain`.
    """
    return tuple(VersionStage(name=stage.name, key=stage.key, data=stage.spec.data, action="base") for stage in chain)


def describe(version: Version) -> str:
    """One line of text."""
    chain = " → ".join(stage.name for stage in version.stages)
    return f"version {version.id} ({version.kind}, {version.at}): {chain}, stage {version.key[:SHORT]}"
