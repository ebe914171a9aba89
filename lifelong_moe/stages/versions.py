"""Versions of the model that a run has served, and which one serves now. Pure and torch-free.

``head["versions"]`` only ever grows; ``head["champion"]`` points into it. ``plan``, ``names`` and ``stages`` of the
head always are the champion's, so that whatever reads a run reads the model that serves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lifelong_moe.errors import ConfigError
from lifelong_moe.storage.keys import SHORT

if TYPE_CHECKING:
    from lifelong_moe.stages.store import CommittedStage

Head = dict[str, Any]
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
    """Which copy of the batch, by its documents' sources; see :meth:`lifelong_moe.data.batches.BatchStore.sources`."""


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

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {**dataclasses.asdict(self), "stages": [dataclasses.asdict(stage) for stage in self.stages]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Version:
        """The inverse of :meth:`to_json`."""
        return cls(**{**data, "stages": tuple(VersionStage(**stage) for stage in data["stages"])})


def versions(head: Mapping[str, Any]) -> list[Version]:
    """All versions, oldest first; none before :func:`begin`."""
    batches, found = head.get("batches", {}), []
    for version in map(Version.from_json, head.get("versions", [])):
        found.append(dataclasses.replace(version, stages=tuple(_split_of(stage, batches) for stage in version.stages)))
    return found


def _split_of(stage: VersionStage, batches: Mapping[str, Any]) -> VersionStage:
    """A stage that knows how its batch was split; earlier versions noted that with the decision about the batch."""
    known = batches.get(stage.batch or "")
    if known is None or stage.heldout_fraction is not None:
        return stage
    return dataclasses.replace(stage, heldout_fraction=known["heldout_fraction"])


def dated_until(head: Mapping[str, Any], at: str) -> list[Version]:
    """Versions that began to serve by a time, oldest first; what is dated later comes from a clock that was ahead.

    Args:
        head: A run's head.
        at: ISO 8601, UTC.
    """
    return [version for version in versions(head) if version.at <= at]


def champion(head: Mapping[str, Any]) -> Version:
    """The version that serves.

    Raises:
        ConfigError: If the run has no versions yet.
    """
    found = versions(head)
    if not found:
        raise ConfigError(f"run {head['run']} has no versions yet: nothing has been promoted or dropped since it ran.")
    return found[head["champion"]]


def base_stages(chain: Sequence[CommittedStage]) -> tuple[VersionStage, ...]:
    """A run's own stages, as its configuration made them.

    Args:
        chain: From :meth:`lifelong_moe.stages.store.StageStore.chain`.
    """
    return tuple(
        VersionStage(name=stage.name, key=stage.key, data=stage.config["spec"]["data"], action="base")
        for stage in chain
    )


def require_finished(head: Mapping[str, Any]) -> None:
    """Versions begin with a run whose stages are all committed.

    Raises:
        ConfigError: If some are still to do.
    """
    todo = [name for name, key in zip(head["names"], head["plan"], strict=True) if key not in head["stages"]]
    if todo or not head["plan"]:
        raise ConfigError(f"run {head['run']} is not finished: {', '.join(todo)} to do. Continue it first.")


def begin(head: Mapping[str, Any], stages: Sequence[VersionStage], at: str) -> Head:
    """Make version 0 of a finished run; a head that has versions stays as it is.

    Args:
        head: The run's head; not changed.
        stages: See :func:`base_stages`.
        at: Now, ISO 8601, UTC.

    Raises:
        ConfigError: If the run is not finished.
    """
    if head.get("versions"):
        return dict(head)
    require_finished(head)
    return _appended(head, "base", stages, "the run as configured", at)


def promoted(head: Mapping[str, Any], kind: Kind, stages: Sequence[VersionStage], reason: str, at: str) -> Head:
    """Append a version and let it serve.

    Args:
        head: A head with versions; not changed.
        kind: What made it.
        stages: The whole chain, oldest first.
        reason: For people.
        at: Now, ISO 8601, UTC.

    Raises:
        ConfigError: If the run has no versions yet.
    """
    champion(head)
    return _appended(head, kind, stages, reason, at)


def rolled_back(head: Mapping[str, Any], to: int | None = None) -> Head:
    """Swap the pointer: to a given version, or to the one that served before the champion.

    Raises:
        ConfigError: If there is no such version.
    """
    found, now = versions(head), champion(head)
    if to is None:
        if now.before is None:
            raise ConfigError(f"run {head['run']}: version {now.id} serves, and none served before it.")
        to = now.before
    if not 0 <= to < len(found):
        raise ConfigError(f"run {head['run']} has no version {to}; there are 0 to {len(found) - 1}.")
    return _serving(head, found[to])


def _appended(head: Mapping[str, Any], kind: Kind, stages: Sequence[VersionStage], reason: str, at: str) -> Head:
    names, earlier = [stage.name for stage in stages], head.get("versions", [])
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a version needs stages, each of another name; got {names}")
    version = Version(
        id=len(earlier),
        at=at,
        kind=kind,
        reason=reason,
        before=head["champion"] if earlier else None,
        stages=tuple(stages),
    )
    return _serving({**head, "versions": [*earlier, version.to_json()]}, version)


def _serving(head: Mapping[str, Any], version: Version) -> Head:
    keys, names = [stage.key for stage in version.stages], [stage.name for stage in version.stages]
    return {**head, "champion": version.id, "plan": keys, "names": names, "stages": list(keys)}


def describe(version: Version) -> str:
    """One line for people."""
    chain = " → ".join(stage.name for stage in version.stages)
    return f"version {version.id} ({version.kind}, {version.at}): {chain}, stage {version.key[:SHORT]}"
