"""A tick's plan as a file. Apart from what makes one, so that a wrong path is answered before torch is imported."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lifelong_moe.errors import ConfigError, StalePlanError
from lifelong_moe.retraining.decision import Action
from lifelong_moe.retraining.looks import Looks
from lifelong_moe.retraining.power import Power

if TYPE_CHECKING:  # scipy takes as long to import as a question may take
    from lifelong_moe.retraining.drift import Drift


@dataclass(frozen=True)
class Serving:
    """The champion that a plan was made for."""

    version: int
    key: str


@dataclass(frozen=True)
class Decided:
    """What to do and why."""

    action: Action
    terms: dict[str, float | None] = field(default_factory=dict)
    """As :class:`lifelong_moe.retraining.decision.Decision` has them; None where there is no bound."""
    reasons: list[str] = field(default_factory=list)
    """For a person, a sentence each."""


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """What a plan says of a stage: what it is, and what it takes."""

    name: str
    key: str
    continues: str | None
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
        """By the stage and so many probes like its own."""
        return self.tokens + probes * self.probe_tokens

    def hours_spent(self, probes: int) -> float | None:
        """By the stage and so many probes like its own, where speed is known."""
        return None if self.hours is None else self.hours * self.tokens_spent(probes) / self.tokens


@dataclass(frozen=True, kw_only=True)
class PlanFacts:
    """All that a plan says, as it stands in its file; plans of earlier versions lack what has a default."""

    run: str = ""
    made_at: str = ""
    expires: str
    champion: Serving
    batch: str
    """Hash of its documents."""
    sources: str | None = None
    """Which copy of the batch this is, if it came before with other sources."""
    data: str = ""
    """Name of the batch's distribution."""
    documents: int = 0
    near_copies: dict[str, int] | None = None
    """Documents that are left out, by what they are near copies of."""
    settings: str
    """Hash of everything that a person configured."""
    drift: dict[str, Drift] = field(default_factory=dict)
    decision: Decided
    stage: StageFacts | None
    """To be trained; None if nothing is."""
    limits: dict[str, float | None] = field(default_factory=dict)
    exceeded: list[str]
    """Limits that the plan would break, a sentence each."""
    gate: dict[str, float] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)
    """Stages that must stay in the store while the plan is there."""
    stages: list[str] = field(default_factory=list)
    """Those that it would add."""
    power: Power | None = None
    looks: Looks | None = None

    def __post_init__(self) -> None:
        texts = (self.batch, self.settings, self.expires, self.champion.key)
        if not all(isinstance(text, str) for text in texts) or not isinstance(self.exceeded, list):
            raise TypeError("a plan's texts are no texts")

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data; JSON has no infinity, and what has no bound is null."""
        drift = {name: _finite(dataclasses.asdict(one)) for name, one in self.drift.items()}
        plain = dataclasses.asdict(self) | {"drift": drift}
        plain["decision"]["terms"] = _finite(self.decision.terms)
        return plain

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """From plain JSON data.

        Raises:
            KeyError, TypeError, ValueError: If it is something else.
        """
        from lifelong_moe.retraining.drift import Drift

        decision = values["decision"]
        parts: dict[str, Any] = {
            "champion": Serving(**values["champion"]),
            "drift": {name: Drift(**one) for name, one in values.get("drift", {}).items()},
            "decision": Decided(**decision | {"action": Action(decision["action"])}),
        }
        for name, kind in (("stage", StageFacts), ("power", Power), ("looks", Looks)):
            parts[name] = kind(**values[name]) if values.get(name) is not None else None
        return cls(**values | parts)

    def postponed(self, reason: str) -> PlanFacts:
        """The plan of a batch that waits: its stage was trained, and the gate could not tell."""
        reasons = [*self.decision.reasons, reason]
        return dataclasses.replace(self, decision=Decided(Action.wait, self.decision.terms, reasons))


def read_plan(path: Path) -> PlanFacts:
    """A plan that was made before.

    Raises:
        ConfigError: If there is no such plan.
    """
    try:
        return PlanFacts.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: not a plan of lifelong-moe retrain.") from None


def refuse_idle_plan(path: str | None, now: str) -> None:
    """Where a tick would have nothing to do, a plan that was to be carried out is stale.

    Args:
        path: Of the plan; None if there is none to carry out.
        now: What the tick found instead of the plan's batch.

    Raises:
        StalePlanError: If there is one.
    """
    if path is not None:
        batch = read_plan(Path(path)).batch
        raise StalePlanError(
            f"{path}: made for batch {batch[:16]}, but {now}: files of the inbox are gone or changed, or a tick has "
            f"come to a decision about them; plan again."
        )


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    lowest, highest = float("-inf"), float("inf")
    return {k: None if isinstance(v, float) and not lowest < v < highest else v for k, v in values.items()}
