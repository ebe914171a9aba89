"""The versions of a run: each model that has served, as its head lists them. Pure and torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lifelong_moe.plan.spec import own_text
from lifelong_moe.storage.grammars import Key, Name, Prefix, Sha256
from lifelong_moe.storage.keys import SHORT

if TYPE_CHECKING:
    from lifelong_moe.store.stages import CommittedStage

Kind = Literal["base", "promoted", "dropped", "consolidated"]
Action = Literal["base", "grow", "continue", "drop", "consolidate"]
Approval = Literal["awaited", "refused"]


@dataclass(frozen=True, kw_only=True)
class VersionStage:
    """One stage of a version's chain."""

    name: Name
    key: Key
    data: Name
    """Its distribution; of a mixture, that with the largest share."""
    mixed: tuple[Name, ...] = ()
    """The other distributions of a mixture."""
    action: Action
    """How it was made; ``drop`` and ``consolidate`` derive a model from the one before without training."""
    batch: Sha256 | None = None
    """Hash of its batch of documents; None if the run's configuration names the text."""
    heldout_fraction: float | None = None
    """Fraction of the batch's sources that was held out; None without a batch, or if it was not recorded."""
    heldout_sources: int = 1
    """Least number of sources held out; 1 where it was not recorded."""
    sources: Prefix | None = None
    """Which copy of the batch; see :meth:`lifelong_moe.data.arrivals.batches.BatchStore.sources`."""

    @property
    def learns(self) -> tuple[str, ...]:
        """The distributions that it trained on to learn them; none if it was derived without training."""
        return () if self.action in ("drop", "consolidate") else (self.data, *self.mixed)


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
    approval: Approval | None = None
    """Of a version that has never served: whether a person has yet to approve it, or has refused to. None of others."""

    def own_text(self, name: str) -> tuple[str, ...]:
        """The distributions by which one of its stages is judged: see :func:`lifelong_moe.plan.spec.own_text`."""
        at = [stage.name for stage in self.stages].index(name)
        earlier = {text for stage in self.stages[:at] for text in stage.learns}
        return own_text((self.stages[at].data, *self.stages[at].mixed), earlier)

    @property
    def key(self) -> str:
        """Key of the version's model."""
        return self.stages[-1].key


def base_stages(chain: Sequence[CommittedStage]) -> tuple[VersionStage, ...]:
    """The stages of version 0, as the run's configuration made them.

    Args:
        chain: See :meth:`lifelong_moe.store.stages.StageStore.chain`.
    """
    return tuple(
        VersionStage(name=one.name, key=one.key, data=one.spec.data, mixed=one.spec.mixed, action="base")
        for one in chain
    )


def describe(version: Version) -> str:
    """One line of text."""
    chain = " → ".join(stage.name for stage in version.stages)
    kind = version.kind if version.approval is None else f"approval {version.approval}"
    return f"version {version.id} ({kind}, {version.at}): {chain}, stage {version.key[:SHORT]}"
