"""A tick's plan as a file. Torch-free, so that a wrong path is reported before torch is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from lifelong_moe.config.retraining.policy import GateConfig
from lifelong_moe.errors import ConfigError, CorruptError, StalePlanError
from lifelong_moe.plan.retraining import Retraining
from lifelong_moe.retraining.decision import Action
from lifelong_moe.retraining.drifted import Drift
from lifelong_moe.retraining.looks import Looks
from lifelong_moe.retraining.predicted import Power
from lifelong_moe.storage.grammars import Key, Name, Prefix, Sha256
from lifelong_moe.storage.keys import SHORT, content_key
from lifelong_moe.storage.opening import read_bounded
from lifelong_moe.storage.plain import PlainError, from_plain
from lifelong_moe.storage.stored import parse_json
from lifelong_moe.store.runs import RunRecord

MAX_PLAN_BYTES = 16 << 20
"""Longest plan; one names each stage that it reads, and has some kilobytes."""


@dataclass(frozen=True)
class Serving:
    """The champion that a plan was made for."""

    version: int
    key: Key


@dataclass(frozen=True)
class Decided:
    """The decision as the file holds it."""

    action: Action
    terms: dict[str, float | None] = field(default_factory=dict)
    """Terms of :class:`lifelong_moe.retraining.decision.Decision`; None where they are not finite."""
    reasons: list[str] = field(default_factory=list)
    """Sentences for the operator."""


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """A planned stage and its cost."""

    name: Name
    key: Key
    continues: Name | None
    grow: dict[str, Any] | None
    """Settings of growth over the configured ones."""
    tokens: int
    probe_tokens: int
    active_flops: float
    experts_per_layer: int
    parameters_total: int
    parameters_trainable: int
    replay_fraction: float
    disk_bytes: int
    hours: float | None
    """At the speed of the champion's last stage; None where that is unknown."""

    def tokens_spent(self, probes: int) -> int:
        """Tokens of the stage and so many probes."""
        return self.tokens + probes * self.probe_tokens

    def hours_spent(self, probes: int) -> float | None:
        """Hours of the stage and so many probes; None if the speed is unknown."""
        # All probes count like this stage's own: ways to grow differ little in tokens and speed.
        return None if self.hours is None else self.hours * self.tokens_spent(probes) / self.tokens


@dataclass(frozen=True, kw_only=True)
class PlanFacts:
    """Contents of a plan's file."""

    # Fields with a default are missing in plans of earlier versions.
    run: Name | Literal[""] = ""
    made_at: str = ""
    expires: str
    champion: Serving
    batch: Sha256
    """Hash of the batch's documents."""
    sources: Prefix | None = None
    """Copy of the batch, if it came before with other sources."""
    data: Name | Literal[""] = ""
    """Name of the batch's distribution."""
    documents: int = 0
    near_copies: dict[str, int] | None = None
    """Documents left out, by what they are near copies of."""
    settings: Key
    """Hash of the retraining file and its base."""
    drift: dict[str, Drift] = field(default_factory=dict)
    decision: Decided
    stage: StageFacts | None
    """Stage to train; None to train nothing."""
    limits: dict[str, float | None] = field(default_factory=dict)
    exceeded: list[str]
    """Limits that forbid what the text calls for, a sentence each."""
    gate: dict[str, float | dict[str, dict[str, str | float | None]]] = field(default_factory=dict)
    reads: list[Key] = field(default_factory=list)
    """Stages that must stay in the store while the plan is there."""
    stages: list[Key] = field(default_factory=list)
    """Keys of the stages that it would add."""
    power: Power | None = None
    looks: Looks | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data; infinities, which JSON lacks, become null."""
        drift = {name: _finite(dataclasses.asdict(one)) for name, one in self.drift.items()}
        plain = dataclasses.asdict(self) | {"drift": drift}
        plain["decision"]["terms"] = _finite(self.decision.terms)
        return plain

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """From plain JSON data.

        Raises:
            PlainError: If it is something else.
        """
        return from_plain(cls, values)

    @property
    def last_reason(self) -> str:
        """The last of the reasons: why nothing is trained, if nothing is."""
        return self.decision.reasons[-1].removeprefix("Skip: ").removeprefix("Wait: ").rstrip(".")

    def postponed(self, reason: str) -> PlanFacts:
        """The plan with the decision to wait, after a gate that left the question open."""
        reasons = [*self.decision.reasons, reason]
        return dataclasses.replace(self, decision=Decided(Action.wait, self.decision.terms, reasons))


def read_plan(path: Path) -> PlanFacts:
    """Read a plan's file.

    Raises:
        ConfigError: If it is absent or not a plan.
    """
    try:
        return PlanFacts.from_json(parse_json(read_bounded(path, MAX_PLAN_BYTES, follow=True), path))
    except (OSError, CorruptError, PlainError):
        raise ConfigError(f"{path}: not a plan of lifelong-moe retrain.") from None


def plan_path(record: RunRecord, batch: str) -> Path:
    """Path of a batch's plan."""
    return record.path / "plans" / f"{batch[:SHORT]}.json"


def as_written(gate: GateConfig) -> dict[str, Any]:
    """The gate as plain data; without slices as in plans from before there were any, which stay valid."""
    values = dataclasses.asdict(gate)
    return values if gate.slices else {key: value for key, value in values.items() if key != "slices"}


def settings_hash(retraining: Retraining) -> str:
    """Hash of the retraining file and its base, overrides included; without what only matters after the gate."""
    settings = dataclasses.asdict(retraining.settings) | {"gate": as_written(retraining.settings.gate)}
    del settings["promote"]
    return content_key([settings, retraining.raw()])


def refuse_idle_plan(path: str | None, now: str) -> None:
    """Refuse a plan where the tick has nothing to do.

    Args:
        path: Of the plan to be carried out; None without one.
        now: What the tick found in place of the plan's batch.

    Raises:
        StalePlanError: If there is a plan.
    """
    if path is not None:
        batch = read_plan(Path(path)).batch
        raise StalePlanError(
            f"{path}: made for batch {batch[:16]}, but {now}: files of the inbox are gone or changed, or a tick has "
            f"come to a decision about them; plan again."
        )


def _finite(values: Mapping[str, object]) -> dict[str, object]:
    lowest, highest = float("-inf"), float("inf")
    return {k: None if isinstance(v, float) and not lowest < v < highest else v for k, v in values.items()}
