"""The head of a run (``head.json``): its stages, its versions, and the state of retraining and MLflow. Torch-free.

``plan``, ``names`` and ``stages`` always describe the champion, so every reader of a run sees the model that serves;
``versions`` only ever grows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lifelong_moe.config.data import KeepText
from lifelong_moe.data.tokens.records import TextRecord
from lifelong_moe.errors import ConfigError
from lifelong_moe.storage.grammars import Key, Name, RunId, Sha256
from lifelong_moe.storage.plain import PlainError, from_plain
from lifelong_moe.store.ticks import BestLoss, LastTick, SettledBatch
from lifelong_moe.store.versions import Kind, Version, VersionStage

SCHEMA = 1
"""Version of the layout of ``head.json``; a head without a number has this layout too."""


@dataclass(frozen=True, kw_only=True)
class MlflowState:
    """What MLflow already holds of a run: continuing a run appends, repeating it adds nothing."""

    run: RunId | None = None
    """Id of the run's own MLflow run."""
    stages: Mapping[Key, RunId] = field(default_factory=dict)
    """Id of each stage's child run, by the stage's key."""
    logged: Mapping[Key, Mapping[str, float]] = field(default_factory=dict)
    """Summary metrics that each stage's child run holds, by the stage's key, where an earlier version noted them: they
    are in files of their own now (``logged.py``)."""
    ticks: Mapping[Sha256, RunId] = field(default_factory=dict)
    """Id of each tick's run, by the hash of its batch."""
    content: Key | None = None
    """Key of the stages and evaluations whose recording was completed."""
    replaced: tuple[RunId, ...] = ()
    """MLflow runs of an earlier run of this name, not yet marked as replaced."""

    def restarted(self) -> MlflowState:
        """An empty state in which all runs so far are to be marked as replaced."""
        return MlflowState(replaced=(*self.replaced, *filter(None, (self.run, *self.stages.values()))))


@dataclass(frozen=True, kw_only=True)
class RunHead:
    """The state of a run. Immutable: each change makes a new head."""

    run: Name
    method: Name
    seed: int
    config: dict[str, Any]
    """As written by the user, interpolations unresolved."""
    plan: tuple[Key, ...]
    """Keys of all planned stages."""
    names: tuple[Name, ...]
    """Names of the planned stages."""
    stages: tuple[Key, ...] = ()
    """Keys of the committed stages."""
    trained: tuple[Key, ...] = ()
    """Keys of the stages that this run trains itself; others it shares."""
    data: Mapping[Name, Sha256] = field(default_factory=dict)
    """Hash of each distribution's training documents."""
    texts: Mapping[Name, TextRecord] = field(default_factory=dict)
    """Metadata of each distribution's text, which outlives the text."""
    tokenizer: Sha256 | None = None
    """Hash of the tokenizer."""
    centroids: Key | None = None
    """Key of the centroids fitted on the first stage's text."""
    mlflow: MlflowState = field(default_factory=MlflowState)
    versions: tuple[Version, ...] = ()
    """All models that have served, and those that a person had to approve first, oldest first; empty before the first
    ``retrain``, ``drop`` or ``consolidate``."""
    champion_id: int | None = None
    """Id of the version that serves."""
    batches: Mapping[Sha256, SettledBatch] = field(default_factory=dict)
    """Settled batches, by hash."""
    waiting: Sha256 | None = None
    """Hash of the batch that the last tick could not settle."""
    open: tuple[Sha256, ...] = ()
    """Hashes of the batches that may have left text, in the order in which ticks opened them."""
    keep_text: KeepText = KeepText.always
    """The last tick's ``inbox.keep_text``."""
    best: Mapping[Name, BestLoss] = field(default_factory=dict)
    """The lowest loss of any stage so far, by distribution."""
    candidate_best: Mapping[Name, BestLoss] = field(default_factory=dict)
    """What ``best`` becomes once the version that awaits approval serves."""
    last_tick: LastTick | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data, without fields at their defaults."""
        written = dataclasses.asdict(self)
        # On disk the id has had this name since before ``champion`` became the version itself.
        written["champion"] = written.pop("champion_id")
        unset: tuple[object, ...] = (None, (), {}, KeepText.always)
        kept = {name: value for name, value in written.items() if name in REQUIRED or value not in unset}
        return {"schema": SCHEMA, **kept}

    @classmethod
    def from_json(cls, data: Any) -> RunHead:
        """Read a head that this or an earlier version wrote.

        Raises:
            PlainError: If the data is no head, or of a later schema.
        """
        if isinstance(data, Mapping) and data.get("schema", SCHEMA) != SCHEMA:
            raise PlainError(
                f"written by a later version of lifelong-moe (schema {data['schema']}; this one reads {SCHEMA})"
            )
        # A damaged file may hold any JSON, lists and strings included.
        if not isinstance(data, Mapping) or not set(REQUIRED) <= set(data):
            raise PlainError("not the head of a run")
        mlflow = _without_unknown(MlflowState, data.get("mlflow", {}))
        fields = {**data, "champion_id": data.get("champion"), "config": _config(data["config"]), "mlflow": mlflow}
        head = from_plain(cls, _without_unknown(cls, fields))
        _check(head)
        return replace(head, versions=tuple(_with_split(version, head.batches) for version in head.versions))

    @property
    def names_bundles(self) -> bool:
        """Whether its configuration says if generations are kept apart, as the word ``method: lifelong`` now does."""
        routing = self.config.get("routing")
        # Of another form it is somebody else's, or a reference: taken as it is.
        return not isinstance(routing, Mapping | None) or "bundles" in (routing or {})

    @property
    def committed(self) -> dict[str, str]:
        """Keys of the committed stages by name, oldest first."""
        there = set(self.stages)
        return {name: key for name, key in zip(self.names, self.plan, strict=True) if key in there}

    @property
    def is_finished(self) -> bool:
        """Whether all stages are committed."""
        return bool(self.plan) and set(self.plan) <= set(self.stages)

    def require_stage(self, name: str | None = None) -> str:
        """The key of a committed stage, by default the last.

        Raises:
            ConfigError: If there is no such stage; the message lists the stages.
        """
        committed = self.committed
        if not committed:
            raise ConfigError(f"run {self.run} has no committed stage yet. Continue it first.")
        if name is not None and name not in committed:
            raise ConfigError(f"run {self.run} has no committed stage {name}; there are {', '.join(committed)}.")
        return committed[name] if name is not None else self.stages[-1]

    def require_finished(self) -> None:
        """Require that all stages are committed, as version 0 does.

        Raises:
            ConfigError: If some are missing; the message lists them.
        """
        if not self.is_finished:
            todo = ", ".join(name for name in self.names if name not in self.committed)
            raise ConfigError(f"run {self.run} is not finished: {todo} missing. Continue it first.")

    @property
    def champion(self) -> Version:
        """The version that serves.

        Raises:
            ConfigError: If the run has no versions yet.
        """
        if self.champion_id is None:
            raise ConfigError(f"run {self.run} has no versions yet: nothing has been promoted or dropped since it ran.")
        return self.versions[self.champion_id]

    def versions_until(self, at: str) -> list[Version]:
        """Versions that began to serve no later than ``at`` (ISO 8601, UTC), oldest first."""
        # Timestamps come from several machines; the caller's limit leaves out dates of a clock that ran ahead.
        return [version for version in self.versions if version.at <= at and version.approval is None]

    @property
    def candidate(self) -> Version | None:
        """The version that awaits approval, if there is one; perhaps made for another champion than today's."""
        return next((version for version in self.versions if version.approval == "awaited"), None)

    def with_candidate(
        self, stages: Sequence[VersionStage], reason: str, at: str, best: Mapping[str, BestLoss]
    ) -> RunHead:
        """This head with a new version that serves once it is approved; arguments as for :meth:`promoted`.

        Args:
            best: The lowest losses with that version taken into account.
        """
        champion = self.champion
        added = self.refused()._with_version("promoted", stages, reason, at)
        # As the champion it would be; as a candidate it only has its number.
        waits = replace(added.champion, approval="awaited")
        return replace(added, versions=(*added.versions[:-1], waits), candidate_best=best)._serving(champion)

    def approved(self, at: str) -> RunHead:
        """This head with the version that awaits approval as champion, from the time ``at`` on.

        Raises:
            ConfigError: If none does, or if it was made for another champion.
        """
        waits = self.require_candidate()
        served = replace(waits, approval=None, at=at)
        versions = tuple(served if version.id == waits.id else version for version in self.versions)
        return replace(self, versions=versions, best=self.candidate_best, candidate_best={})._serving(served)

    def refused(self) -> RunHead:
        """This head with approval refused to the version that awaits it; unchanged if none does."""
        if (waits := self.candidate) is None:
            return self
        refused = replace(waits, approval="refused")
        versions = tuple(refused if version.id == waits.id else version for version in self.versions)
        return replace(self, versions=versions, candidate_best={})

    def require_candidate(self) -> Version:
        """The version that awaits approval.

        Raises:
            ConfigError: If none does, or if it was made for another champion.
        """
        if (waits := self.candidate) is None:
            raise ConfigError(f"no version of run {self.run} awaits approval.")
        if waits.before != self.champion_id:
            raise ConfigError(
                f"version {waits.id} of run {self.run} was measured against version {waits.before}, and version "
                f"{self.champion_id} serves now. The next tick of retrain makes another of its text."
            )
        return waits

    def with_committed(self, key: str) -> RunHead:
        """This head with one more committed stage."""
        return replace(self, stages=(*self.stages, key))

    def with_trained(self, key: str) -> RunHead:
        """This head with one more stage that the run trains itself."""
        return replace(self, trained=(*self.trained, key))

    def without_trained(self, key: str) -> RunHead:
        """This head without a stage that another run trains after all."""
        return replace(self, trained=tuple(one for one in self.trained if one != key))

    def with_mlflow(self, **changes: Any) -> RunHead:
        """This head with fields of ``mlflow`` replaced."""
        return replace(self, mlflow=replace(self.mlflow, **changes))

    def with_base(self, stages: Sequence[VersionStage], at: str) -> RunHead:
        """This head with the finished run as version 0; unchanged if it has versions.

        Args:
            stages: See :func:`lifelong_moe.store.versions.base_stages`.
            at: The current time, ISO 8601, UTC.

        Raises:
            ConfigError: If the run is not finished.
        """
        if self.versions:
            return self
        self.require_finished()
        return self._with_version("base", stages, "the run as configured", at)

    def promoted(self, kind: Kind, stages: Sequence[VersionStage], reason: str, at: str) -> RunHead:
        """This head with a new version, which now serves.

        Args:
            kind: How the version was made.
            stages: The whole chain, oldest first.
            reason: Human-readable.
            at: The current time, ISO 8601, UTC.

        Raises:
            ConfigError: If the run has no versions yet.
        """
        _ = self.champion  # raises unless there is a version 0 to roll back to
        return self._with_version(kind, stages, reason, at)

    def rolled_back(self, to: int | None = None) -> RunHead:
        """This head with an earlier version serving: ``to``, or by default the champion's predecessor.

        Raises:
            ConfigError: If there is no such version.
        """
        now = self.champion
        if to is None:
            if now.before is None:
                raise ConfigError(f"run {self.run}: version {now.id} serves, and none served before it.")
            to = now.before
        if not 0 <= to < len(self.versions):
            raise ConfigError(f"run {self.run} has no version {to}; there are 0 to {len(self.versions) - 1}.")
        if (approval := self.versions[to].approval) is not None:
            hint = f" lifelong-moe promote {self.run} approves it." if approval == "awaited" else ""
            raise ConfigError(f"version {to} of run {self.run} has never served: its approval is {approval}.{hint}")
        return self._serving(self.versions[to])

    def _with_version(self, kind: Kind, stages: Sequence[VersionStage], reason: str, at: str) -> RunHead:
        names = [stage.name for stage in stages]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a version needs stages with distinct names; got {names}")
        number, before = len(self.versions), self.champion_id
        version = Version(id=number, at=at, kind=kind, reason=reason, before=before, stages=tuple(stages))
        return replace(self, versions=(*self.versions, version))._serving(version)

    def _serving(self, version: Version) -> RunHead:
        # Readers that know nothing of versions follow plan, names and stages: all three change together.
        keys, names = tuple(stage.key for stage in version.stages), tuple(stage.name for stage in version.stages)
        return replace(self, champion_id=version.id, plan=keys, names=names, stages=keys)


REQUIRED = tuple(one.name for one in dataclasses.fields(RunHead)[:7])
"""Fields that every head has."""


def _without_unknown(kind: type[RunHead] | type[MlflowState], data: Any) -> Any:
    """The entries that the dataclass has a field for."""
    # Earlier versions wrote more fields than are read today. What is no mapping, `from_plain` refuses.
    if not isinstance(data, Mapping):
        return data
    return {one.name: data[one.name] for one in dataclasses.fields(kind) if one.name in data}


def _check(head: RunHead) -> None:
    """Require what no type says: that names and keys belong together, and that each version stands in its place."""
    if len(head.names) != len(head.plan):
        raise PlainError(f"names: {len(head.names)} for the {len(head.plan)} stages of the plan")
    for place, version in enumerate(head.versions):
        before = version.before
        if version.id != place or not version.stages or (before is not None and not 0 <= before < place):
            raise PlainError(f"versions[{place}]: not a version with stages that follows earlier ones")
    if head.champion_id is not None and not 0 <= head.champion_id < len(head.versions):
        raise PlainError(f"champion: {head.champion_id}, but there are {len(head.versions)} versions")
    if head.champion_id is not None and head.champion.approval is not None:
        raise PlainError(f"champion: version {head.champion_id} was never approved")


def _config(config: Any) -> Any:
    """A configuration with renamed keys under their current names."""
    trainer = config.get("trainer") if isinstance(config, Mapping) else None
    if not isinstance(trainer, Mapping) or "gradient_clip_val" not in trainer:
        return config
    trainer = dict(trainer)
    # An explicit value of the new key wins over that of the old one.
    return {**config, "trainer": {"gradient_clip": trainer.pop("gradient_clip_val"), **trainer}}


def _with_split(version: Version, batches: Mapping[str, SettledBatch]) -> Version:
    """The version with the held-out fraction of each batch filled in."""
    # Earlier versions noted the fraction with the settled batch only, not with the stage.
    stages = list(version.stages)
    for place, stage in enumerate(stages):
        if stage.heldout_fraction is None and (known := batches.get(stage.batch or "")) is not None:
            stages[place] = replace(stage, heldout_fraction=known.heldout_fraction)
    return replace(version, stages=tuple(stages))
