"""Rules on retention that bind new runs only; runs of earlier versions may break them. Torch-free."""

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
from lifelong_moe.config.routing.base import STORED, Bundles, RoutingConfig
from lifelong_moe.config.routing.modes import is_mode, settings_of
from lifelong_moe.config.routing.switching import FITTING, valid_routing
from lifelong_moe.errors import ConfigError

DEFINING = {
    "static_moe": ("grow.experts", 2),
    "replay": ("replay.fraction", ReplayConfig().fraction),
    "l2": ("penalty.weight", DEFAULT_PENALTY[PenaltyKind.l2]),
    "ewc": ("penalty.weight", DEFAULT_PENALTY[PenaltyKind.ewc]),
    "lwf": ("distill.weight", DistillConfig().weight),
}
"""By method, the stage's key that makes it more than ``sequential``, and the value that a refusal of 0 recommends."""


class Growth(Protocol):
    """The part of a stage's growth that these rules read."""

    experts: int


class Finetuning(Protocol):
    """The part of a stage's fine-tuning that these rules read."""

    @property
    def trainable(self) -> str:
        """Which parameters train; ``moe`` leaves the trunk unchanged."""


class Stage(Protocol):
    """The part of a stage's configuration that these rules read."""

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
    """Reject a method whose only mechanism is 0 in every later stage: it would be ``sequential`` under another name.

    Args:
        method: The run's method.
        routing: The run's routing; experts that form groups are added a group at a time.
        stages: All stages; the first has nothing to retain.
        raw: The configuration as written, for the keys to set.
    """
    # Rejected, not replaced by a default: the file says 0 for a reason, perhaps for another method.
    if method not in DEFINING or len(stages) == 1:
        return
    key, default = DEFINING[method]
    # Fewer experts than groups would leave groups empty.
    default = max(default, routing.expert_groups) if method == "static_moe" else default
    if not any(_part(stage, method) for stage in stages[1:]):
        raise ConfigError(
            f"method={method} with {key}=0 in every later stage is method=sequential. "
            f"Set {' '.join(overrides(OmegaConf.to_container(raw, resolve=False), key, default))}."
        )


def _part(stage: Stage, method: str) -> float:
    """The strength of a method's mechanism in a stage."""
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
    """List the ``key=value`` overrides that set a key in every later stage.

    Args:
        raw: The configuration as written, plain data.
        key: Such as ``trunk.train``.
        value: New value.
    """
    part, name = key.split(".")
    # A stage's own value takes precedence over `stage_defaults`, so it needs an override of its own.
    own = [
        f"stages[{i}].{key}={value}"
        for i, stage in enumerate(raw["stages"])
        if i and isinstance(stage, Mapping) and name in (stage.get(part) or {})
    ]
    # Where each later stage has its own, a default would be without effect.
    return [f"stage_defaults.{key}={value}", *own] if len(own) < len(raw["stages"]) - 1 else own


def refuse_unfit_mode(raw: DictConfig) -> None:
    """Reject a mode that needs several keys changed, and list all of them as overrides to copy.

    Where one key is enough, the section that it belongs to reports it.

    Args:
        raw: The configuration as written.
    """
    # Nothing is validated yet: whatever has the wrong shape is left to the sections, which report it.
    plain: Any = OmegaConf.to_container(raw, resolve=False)
    routing = plain.get("routing")
    if not isinstance(routing, Mapping) or not isinstance(plain.get("stages"), list):
        return
    mode, needed = routing.get("mode", "learned"), []
    if not is_mode(mode):
        return
    if not settings_of(mode).supports_bundles:
        if routing.get("bundles", "none") != "none":
            needed.append("routing.bundles=none")
        if plain.get("method", "lifelong") == "lifelong" and "deltas" in _later(plain, "trunk.train", None):
            needed += overrides(plain, "trunk.train", "full")
            # Without generations of their own for old text, replay has to retain it.
            share = ReplayConfig().fraction
            if not any(_later(plain, "replay.fraction", share)):
                needed += overrides(plain, "replay.fraction", share)
    # Without keys whose values the mode does not allow; its own stand for them.
    for unfit in (set[str](), *FITTING):
        if (built := valid_routing(routing, unfit)) is not None:
            needed += [f"routing.{key}={built.settings()[key]}" for key in sorted(unfit & routing.keys())]
            break
    if built is not None and built.noncausal_by and not routing.get("allow_noncausal"):
        needed.append("routing.allow_noncausal=true")
    if len(needed) > 1:
        raise ConfigError(f"routing.mode={mode} needs more than one key here. Add {' '.join(needed)}.")


def _later(plain: Any, key: str, default: object) -> list[Any]:
    """The value of a key in each later stage: its own, that of ``stage_defaults``, or the default."""
    part, name = key.split(".")
    sections = [stage.get(part) for stage in plain["stages"][1:] if isinstance(stage, Mapping)]
    common = (plain.get("stage_defaults") or {}).get(part)
    known = [one if isinstance(one, Mapping) else {} for one in (common, *sections)]
    return [section.get(name, known[0].get(name, default)) for section in known[1:]]


def refuse_moving_trunk(method: str, routing: RoutingConfig, stages: Sequence[Stage], first: int = 1) -> None:
    """Reject training the trunk beside frozen generations: their tokens use it, so old text would be forgotten.

    Args:
        method: The run's method; all but ``lifelong`` train every parameter and have no generations to protect.
        routing: The run's routing.
        stages: All stages.
        first: The first that continues a model.
    """
    if method != "lifelong" or routing.bundles == Bundles.none:
        return
    # Until a stage grows there is one generation, which trains on together with the trunk.
    grown = 0
    for i, stage in enumerate(stages[first:], start=first):
        grown += stage.grow.experts
        moves = not stage.trunk.is_frozen and not (stage.kind == "finetune" and stage.finetune.trainable == "moe")
        if grown and moves:
            raise ConfigError(
                f"stages[{i}].trunk.train={stage.trunk.train} changes what old bundles compute, and routing.bundles="
                f"{routing.bundles} keeps them as they are. Set stages[{i}].trunk.train=deltas (or frozen), or "
                f"routing.bundles=none and replay."
            )


def without_written_text(routing: RoutingConfig, *, is_stored: bool) -> RoutingConfig:
    """Reject a number of tokens that a checkpoint should write where a run begins with none.

    Runs of earlier versions may have it, when it was a key of every mode: it stays without effect, on keys as well.
    """
    plain = routing.with_keys({"sample_tokens"}, STORED) if routing.mode == "learned" else routing
    if plain != routing and not is_stored:
        raise ConfigError(
            "routing.sample_tokens counts what a checkpoint writes; it has no effect without model.from, nor on other "
            "modes than cluster."
        )
    return plain


def require_text(distill: DistillConfig, replay: ReplayConfig, i: int) -> None:
    """Reject distillation on replayed text in the ``i``-th stage, a later one, if it replays none."""
    if distill.weight and distill.text == DistillText.replay and not replay.fraction:
        raise ConfigError(
            f"stages[{i}].distill.text=replay needs stages[{i}].replay.fraction above 0. Set it, or distill.text=new, "
            f"or distill.weight=0."
        )
