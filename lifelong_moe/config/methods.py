"""What a new run may not ask of what holds old knowledge, though one of an earlier version may have it. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf

from lifelong_moe.config.retention import (
    DEFAULT_PENALTY,
    DistillConfig,
    DistillText,
    PenaltyConfig,
    PenaltyKind,
    ReplayConfig,
    TrunkConfig,
)
from lifelong_moe.config.routing.base import Bundles, RoutingConfig
from lifelong_moe.config.routing.modes import ROUTERS
from lifelong_moe.config.routing.switching import valid_routing
from lifelong_moe.errors import ConfigError

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


def refuse_unfit_mode(raw: DictConfig) -> None:
    """Refuse a mode that needs more than one key changed, and list them all, as they can be copied.

    Where one is enough, the section that it belongs to says so.

    Args:
        raw: As it was written.
    """
    plain: Any = OmegaConf.to_container(raw, resolve=False)
    routing = plain.get("routing")
    if not isinstance(routing, Mapping) or not isinstance(plain.get("stages"), list):
        return
    mode, needed = routing.get("mode", "learned"), []
    if not isinstance(mode, str) or mode not in ROUTERS:
        return
    if not ROUTERS[mode].settings.supports_bundles:
        if routing.get("bundles", "none") != "none":
            needed.append("routing.bundles=none")
        if plain.get("method", "lifelong") == "lifelong" and "deltas" in _later(plain, "trunk.train", None):
            needed += overrides(plain, "trunk.train", "full")
            share = ReplayConfig().fraction
            if not any(_later(plain, "replay.fraction", share)):
                needed += overrides(plain, "replay.fraction", share)
    built = valid_routing(routing)
    if built is not None and built.noncausal_by and not built.allow_noncausal:
        needed.append("routing.allow_noncausal=true")
    if len(needed) > 1:
        raise ConfigError(f"routing.mode={mode} needs more than one key here. Add {' '.join(needed)}.")


def _later(plain: Any, key: str, default: object) -> list[Any]:
    """What later stages have at a key: their own, or from ``stage_defaults``, or the default."""
    part, name = key.split(".")
    sections = [stage.get(part) for stage in plain["stages"][1:] if isinstance(stage, Mapping)]
    common = (plain.get("stage_defaults") or {}).get(part)
    known = [one if isinstance(one, Mapping) else {} for one in (common, *sections)]
    return [section.get(name, known[0].get(name, default)) for section in known[1:]]


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
