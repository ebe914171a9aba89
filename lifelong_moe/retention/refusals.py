"""What a new run may not ask of what holds old knowledge, though one of an earlier version may have it. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf

from lifelong_moe.errors import ConfigError
from lifelong_moe.retention.config import (
    DEFAULT_PENALTY,
    DistillConfig,
    DistillText,
    PenaltyConfig,
    PenaltyKind,
    ReplayConfig,
    TrunkConfig,
)
from lifelong_moe.routing.config import Bundles, RoutingConfig

DEFINING = {
    "static_moe": ("grow.experts", 2),
    "replay": ("replay.fraction", ReplayConfig().fraction),
    "l2": ("penalty.weight", DEFAULT_PENALTY[PenaltyKind.l2]),
    "ewc": ("penalty.weight", DEFAULT_PENALTY[PenaltyKind.ewc]),
    "lwf": ("distill.weight", DistillConfig().weight),
}
"""What makes a method more than ``sequential``: a stage's key, and its default, which the refusal of a 0 names."""


class Growth(Protocol):
    """What is read here of a stage's growth."""

    experts: int


class Finetuning(Protocol):
    """What is read here of a stage's fine-tuning."""

    @property
    def trainable(self) -> str:
        """``moe`` leaves the trunk alone."""


class Stage(Protocol):
    """What is read here of a stage's configuration."""

    distill: DistillConfig
    replay: ReplayConfig
    penalty: PenaltyConfig
    trunk: TrunkConfig

    @property
    def kind(self) -> str:
        """``pretrain`` or ``finetune``."""

    @property
    def grow(self) -> Growth:
        """How it grows."""

    @property
    def finetune(self) -> Finetuning:
        """How it is fine-tuned."""


def refuse_idle_method(method: str, routing: RoutingConfig, stages: Sequence[Stage], raw: DictConfig) -> None:
    """Refuse a method whose one part is 0 in every later stage: it would be ``sequential`` under another name.

    No default takes the 0's place: the file says 0 for a reason, be it for another method.

    Args:
        method: Of the run.
        routing: Of the run; experts that form groups begin as many at a time.
        stages: All of them; the first has nothing to hold on to.
        raw: As it was written, for the keys to set.
    """
    if method not in DEFINING or len(stages) == 1:
        return
    key, default = DEFINING[method]
    default = max(default, routing.expert_groups) if method == "static_moe" else default
    if not any(_part(stage, method) for stage in stages[1:]):
        raise ConfigError(
            f"method={method} with {key}=0 in every later stage is method=sequential. "
            f"Set {' '.join(overrides(OmegaConf.to_container(raw, resolve=False), key, default))}."
        )


def _part(stage: Stage, method: str) -> float:
    """How much a stage has of what the method is about."""
    match method:
        case "static_moe":
            return stage.grow.experts
        case "replay":
            return stage.replay.fraction
        case "lwf":
            return stage.distill.weight
        case _:
            return DEFAULT_PENALTY[PenaltyKind(method)] if stage.penalty.weight is None else stage.penalty.weight


def overrides(raw: Any, key: str, value: object) -> list[str]:
    """The ``key=value`` that set a key in every later stage: the default, and each stage's own where it has one.

    Args:
        raw: The configuration as written, plain data.
        key: Such as ``trunk.train``.
        value: To be set.
    """
    part, name = key.split(".")
    own = [
        f"stages[{i}].{key}={value}"
        for i, stage in enumerate(raw["stages"])
        if i and isinstance(stage, Mapping) and name in (stage.get(part) or {})
    ]
    return [f"stage_defaults.{key}={value}", *own] if len(own) < len(raw["stages"]) - 1 else own


def refuse_moving_trunk(method: str, routing: RoutingConfig, stages: Sequence[Stage]) -> None:
    """Refuse to train the trunk beside frozen bundles: their tokens use it, so old text would be forgotten after all.

    Args:
        method: Of the run; others than ``lifelong`` train everything, and have no bundles.
        routing: Of the run.
        stages: All of them; the first has no bundles yet, nor has a later one before the first that grows.
    """
    if method != "lifelong" or routing.bundles == Bundles.none:
        return
    grown = 0
    for i, stage in enumerate(stages[1:], start=1):
        grown += stage.grow.experts
        moves = not stage.trunk.is_frozen and not (stage.kind == "finetune" and stage.finetune.trainable == "moe")
        if grown and moves:
            raise ConfigError(
                f"stages[{i}].trunk.train={stage.trunk.train} changes what old bundles compute, and routing.bundles="
                f"{routing.bundles} keeps them as they are. Set stages[{i}].trunk.train=deltas (or frozen), or "
                f"routing.bundles=none and replay."
            )


def require_text(distill: DistillConfig, replay: ReplayConfig, i: int) -> None:
    """There must be replayed text to distil on, where a later stage, the ``i``-th, is to."""
    if distill.weight and distill.text == DistillText.replay and not replay.fraction:
        raise ConfigError(
            f"stages[{i}].distill.text=replay needs stages[{i}].replay.fraction above 0. Set it, or distill.text=new, "
            f"or distill.weight=0."
        )
