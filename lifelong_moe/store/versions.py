"""Versions of the model that a run has served, as its head lists them. Pure and torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lifelong_moe.storage.keys import SHORT

if TYPE_CHECKING:
    from lifelong_moe.store.stages import CommittedStage

Kind = Literal["base", "promoted", "dropped", "consolidated"]
Action = Literal["base", "grow", "continue", "drop", "consolidate"]


@dataclass(frozen=True, kw_only=True)
class VersionStage:
    """One stage of a version's chain."""

    name: str
    key: str
    data: str
    """The distribution it is about."""
    action: Action
    """How it came to be; ``drop`` and ``consolidate`` derive a model from the one before and train nothing."""
    batch: str | None = None
    """Hash of the batch of documents it learned from; None if the run's own configuration names the text."""
    heldout_fraction: float | None = None
    """Share of the batch's sources that were held out; None without a batch, or where nobody noted it."""
    heldout_sources: int = 1
    """Sources of it that were held out at least; 1 before this was noted."""
    sources: str | None = None
    """Copy of the batch, by its documents' sources; see :meth:`lifelong_moe.data.text.batches.BatchStore.sources`."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """A model that served."""

    id: int
    """Its place in the list, from 0."""
    at: str
    """When it began to serve, ISO 8601, UTC."""
    kind: Kind
    reason: str
    """For people: why it took over."""
    before: int | None
    """The version that served until then; None for the first."""
    stages: tuple[VersionStage, ...]
    """The whole chain, oldest first; the last one is the model."""

    @property
    def key(self) -> str:
        """Key of the stage that serves."""
        return self.stages[-1].key


def base_stages(chain: Sequence[CommittedStage]) -> tuple[VersionStage, ...]:
    """A run's own stages, as its configuration made them.

    Args:
        chain: From :meth:`lifelong_moe.store.stages.StageStore.chain`.
    """
    return tuple(VersionStage(name=stage.name, key=stage.key, data=stage.spec.data, action="base") for stage in chain)


def describe(version: Version) -> str:
    """One line for people."""
    chain = " → ".join(stage.name for stage in version.stages)
    return f"version {version.id} ({version.kind}, {version.at}): {chain}, stage {version.key[:SHORT]}"
