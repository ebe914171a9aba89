"""The head of a run: what its name stands for, as ``head.json`` keeps it. Torch-free.

``plan``, ``names`` and ``stages`` always are the champion's, so that whatever reads a run reads the model that serves;
``versions`` only ever grows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lifelong_moe.config.data import KeepText
from lifelong_moe.data.tokens.records import TextRecord
from lifelong_moe.errors import ConfigError, CorruptError
from lifelong_moe.storage.plain import from_plain
from lifelong_moe.store.ticks import BestLoss, LastTick, SettledBatch
from lifelong_moe.store.versions import Kind, Version, VersionStage

SCHEMA = 1
"""Version of the layout of ``head.json``; heads without one are read as this one, which only adds the number."""


@dataclass(frozen=True, kw_only=True)
class MlflowState:
    """What MLflow has been told of a run, so that continuing appends and repeating adds nothing."""

    run: str | None = None
    """Id of the run's own MLflow run."""
    stages: Mapping[str, str] = field(default_factory=dict)
    """Id of each stage's child run, by the stage's key."""
    logged: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Summaries that each stage's child run holds, by the stage's key."""
    ticks: Mapping[str, str] = field(default_factory=dict)
    """Id of each tick's run, by the hash of its batch."""
    content: str | None = None
    """Key of the stages and evaluations that were recorded to the end."""
    replaced: tuple[str, ...] = ()
    """Runs that stand for what the name meant before, not yet marked so."""

    def begun_anew(self) -> MlflowState:
        """Nothing told yet, and every run so far to be marked as replaced."""
        return MlflowState(replaced=(*self.replaced, *filter(None, (self.run, *self.stages.values()))))


@dataclass(frozen=True, kw_only=True)
class RunHead:
    """What a run refers to. Immutable: a change makes another head."""

    run: str
    method: str
    seed: int
    config: dict[str, Any]
    """As written, interpolations unresolved."""
    plan: tuple[str, ...]
    """Keys of all stages."""
    names: tuple[str, ...]
    """Their names."""
    stages: tuple[str, ...] = ()
    """Keys of the committed ones."""
    trained: tuple[str, ...] = ()
    """Keys of those that this run itself trains."""
    data: Mapping[str, str] = field(default_factory=dict)
    """Hash of each distribution's training documents."""
    texts: Mapping[str, TextRecord] = field(default_factory=dict)
    """What must be known of each distribution's text once it is gone."""
    tokenizer: str | None = None
    """Its hash."""
    centroids: str | None = None
    """Key of the centroids that were fitted on the first stage's text."""
    mlflow: MlflowState = field(default_factory=MlflowState)
    versions: tuple[Version, ...] = ()
    """All models that have served, oldest first; none before the first ``retrain``, ``drop`` or ``consolidate``."""
    champion_id: int | None = None
    """Place of the version that serves."""
    batches: Mapping[str, SettledBatch] = field(default_factory=dict)
    """Batches that were decided about, by hash."""
    waiting: str | None = None
    """Hash of the batch that a tick had no answer about."""
    open: tuple[str, ...] = ()
    """Hashes of batches which may have left text without a decision, in the order in which they were looked at."""
    keep_text: KeepText = KeepText.always
    """How the last tick kept the text of batches."""
    best: Mapping[str, BestLoss] = field(default_factory=dict)
    """The lowest loss that any stage ever had on each distribution."""
    last_tick: LastTick | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data; what was never set is left out."""
        written = dataclasses.asdict(self)
        written["champion"] = written.pop("champion_id")
        unset: tuple[object, ...] = (None, (), {}, KeepText.always)
        kept = {name: value for name, value in written.items() if name in REQUIRED or value not in unset}
        return {"schema": SCHEMA, **kept}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunHead:
        """Read a head of this or an earlier version.

        Raises:
            CorruptError: If it is no head, or one of a later version.
        """
        if isinstance(data, Mapping) and data.get("schema", SCHEMA) != SCHEMA:
            raise CorruptError(
                f"of a later version of lifelong-moe (schema {data['schema']}; this one knows {SCHEMA})."
            )
        if not isinstance(data, Mapping) or not set(REQUIRED) <= set(data):
            raise CorruptError("not the head of a run.")
        try:
            mlflow = _known(MlflowState, data.get("mlflow", {}))
            told = {**data, "champion_id": data.get("champion"), "config": _config(data["config"]), "mlflow": mlflow}
            head = from_plain(cls, _known(cls, told))
            return replace(head, versions=tuple(_with_split(version, head.batches) for version in head.versions))
        except (AttributeError, TypeError, ValueError) as error:
            raise CorruptError(f"not the head of a run ({error}).") from None

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
        """The key of a committed stage; of the last one by default.

        Raises:
            ConfigError: If there is none, naming those there are.
        """
        committed = self.committed
        if not committed:
            raise ConfigError(f"run {self.run} has no committed stage yet.")
        if name is not None and name not in committed:
            raise ConfigError(f"run {self.run} has no committed stage {name}; there are {', '.join(committed)}.")
        return committed[name] if name is not None else self.stages[-1]

    def require_finished(self) -> None:
        """Versions begin with a run whose stages are all committed.

        Raises:
            ConfigError: If some are still to do.
        """
        if not self.is_finished:
            todo = ", ".join(name for name in self.names if name not in self.committed)
            raise ConfigError(f"run {self.run} is not finished: {todo} to do. Continue it first.")

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
        """Versions that began to serve by a time, oldest first; a later date comes from a clock that was ahead.

        Args:
            at: ISO 8601, UTC.
        """
        return [version for version in self.versions if version.at <= at]

    def with_committed(self, key: str) -> RunHead:
        """With one more committed stage."""
        return replace(self, stages=(*self.stages, key))

    def with_trained(self, key: str) -> RunHead:
        """With one more stage that this run trains itself."""
        return replace(self, trained=(*self.trained, key))

    def without_trained(self, key: str) -> RunHead:
        """Without one of them: another run trains it."""
        return replace(self, trained=tuple(one for one in self.trained if one != key))

    def with_mlflow(self, **changes: Any) -> RunHead:
        """With other fields of ``mlflow``."""
        return replace(self, mlflow=replace(self.mlflow, **changes))

    def with_base(self, stages: Sequence[VersionStage], at: str) -> RunHead:
        """With the finished run as version 0; a head that has versions stays as it is.

        Args:
            stages: See :func:`lifelong_moe.store.versions.base_stages`.
            at: Now, ISO 8601, UTC.

        Raises:
            ConfigError: If the run is not finished.
        """
        if self.versions:
            return self
        self.require_finished()
        return self._with_version("base", stages, "the run as configured", at)

    def promoted(self, kind: Kind, stages: Sequence[VersionStage], reason: str, at: str) -> RunHead:
        """With another version, which serves.

        Args:
            kind: What made it.
            stages: The whole chain, oldest first.
            reason: For people.
            at: Now, ISO 8601, UTC.

        Raises:
            ConfigError: If the run has no versions yet.
        """
        _ = self.champion
        return self._with_version(kind, stages, reason, at)

    def rolled_back(self, to: int | None = None) -> RunHead:
        """With an earlier version serving: a given one, or the one that served before the champion.

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
        return self._serving(self.versions[to])

    def _with_version(self, kind: Kind, stages: Sequence[VersionStage], reason: str, at: str) -> RunHead:
        names = [stage.name for stage in stages]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a version needs stages, each of another name; got {names}")
        number, before = len(self.versions), self.champion_id
        version = Version(id=number, at=at, kind=kind, reason=reason, before=before, stages=tuple(stages))
        return replace(self, versions=(*self.versions, version))._serving(version)

    def _serving(self, version: Version) -> RunHead:
        keys, names = tuple(stage.key for stage in version.stages), tuple(stage.name for stage in version.stages)
        return replace(self, champion_id=version.id, plan=keys, names=names, stages=keys)


REQUIRED = tuple(one.name for one in dataclasses.fields(RunHead)[:7])
"""Fields that every head has."""


def _known(kind: type[RunHead] | type[MlflowState], data: Mapping[str, Any]) -> dict[str, Any]:
    """What the dataclass has a field for; earlier versions wrote more."""
    return {one.name: data[one.name] for one in dataclasses.fields(kind) if one.name in data}


def _config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration under today's keys."""
    trainer = dict(config.get("trainer") or {})
    if "gradient_clip_val" not in trainer:
        return dict(config)
    return {**config, "trainer": {"gradient_clip": trainer.pop("gradient_clip_val"), **trainer}}


def _with_split(version: Version, batches: Mapping[str, SettledBatch]) -> Version:
    """A version whose stages know how their batches were split: it used to stand with the decision about a batch."""
    stages = list(version.stages)
    for place, stage in enumerate(stages):
        if stage.heldout_fraction is None and (known := batches.get(stage.batch or "")) is not None:
            stages[place] = replace(stage, heldout_fraction=known.heldout_fraction)
    return replace(version, stages=tuple(stages))
