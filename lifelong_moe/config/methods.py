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
    ReviewConfig,
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

RECOMMENDED: dict[str, Any] = {
    "model": {"document_mask": True},
    "routing": {"bundles": "cluster"},
    "stage_defaults": {
        "grow": {"router": "copy"},
        "trunk": {"train": "deltas"},
        "distill": {"weight": 0.0},
        "replay": {"fraction": 0.0},
        "optim": {"rewarm": 2.0},
    },
}
"""What ``method: lifelong`` stands for alone: a generation a stage, which predict together; no old text is kept."""
RANK_SHARE = 110 / 128
"""The rank of a generation's low-rank changes by the model's width, as in the measured configurations."""
_HOLDING = ("distill", "replay", "penalty", "review", "average")
"""Sections and keys of a stage by which a file says itself what holds old text."""


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
    review: ReviewConfig
    average: float
    continues: str | None

    @property
    def learns(self) -> tuple[str, ...]:
        """Distributions that it learns."""

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


def stands_alone(file: DictConfig) -> bool:
    """Whether a file names ``method: lifelong`` and leaves to it how old text is held: see :data:`RECOMMENDED`.

    A file that says anything of that itself, as files of earlier versions do, is taken at its word.
    """
    plain: Any = OmegaConf.to_container(file, resolve=False)
    # Anything of another form is left to the sections, which report it; one without content is as none.
    routing, stages = ({} if plain.get(key) is None else plain[key] for key in ("routing", "stages"))
    defaults = {} if plain.get("stage_defaults") is None else plain["stage_defaults"]
    each = [defaults, *(stages if isinstance(stages, list) else [])]
    if plain.get("method") != "lifelong" or not all(isinstance(one, Mapping) for one in (routing, *each)):
        return False
    if routing.get("mode", "learned") != "learned" or "bundles" in routing:
        return False
    return not any(_says(stage) for stage in each)


def _says(stage: Mapping[str, Any]) -> bool:
    """Whether a stage as written says how old text is held: how the trunk trains, or a mechanism, or no growth."""
    trunk, grow = stage.get("trunk") or {}, stage.get("grow") or {}
    # References may hold anything.
    if not isinstance(trunk, Mapping) or not isinstance(grow, Mapping):
        return True
    return "train" in trunk or grow.get("experts") == 0 or any(key in stage for key in _HOLDING)


def with_recommended(raw: DictConfig) -> DictConfig:
    """Fill in what ``method: lifelong`` stands for, in a file for which :func:`stands_alone` holds or after overrides.

    Sections without content are filled as absent ones; those of a wrong form stay, for the sections report them.
    """
    plain: Any = OmegaConf.to_container(raw, resolve=False)
    return OmegaConf.create(dict(_filled(plain, RECOMMENDED)))


def _filled(given: Mapping[str, object], recommended: Mapping[str, object]) -> Mapping[str, object]:
    """The given keys, and the recommended ones that are absent, in sections too."""
    filled = dict(given)
    for key, value in recommended.items():
        own = filled.get(key, {})
        if not isinstance(value, Mapping):
            filled.setdefault(key, value)
        elif own is None or isinstance(own, Mapping):
            filled[key] = _filled(own or {}, value)
    return filled


def with_rank(raw: DictConfig) -> None:
    """Fill in the rank of low-rank changes by the model's width, once overrides are applied."""
    model, trunk = raw.get("model"), raw
    for part in ("stage_defaults", "trunk"):
        # What is no mapping, the section reports.
        if not isinstance(trunk := trunk.get(part), DictConfig):
            return
    width = model.get("width") if isinstance(model, DictConfig) else None
    # The width of a checkpoint is not known yet, and its changes are small beside it.
    if isinstance(width, int) and not isinstance(width, bool) and trunk.get("rank") is None:
        trunk.rank = max(1, round(RANK_SHARE * width))


def refuse_forgetting(method: str, stages: Sequence[Stage], raw: DictConfig) -> None:
    """Reject ``method=lifelong`` where all experts train on and nothing holds what earlier stages learned: fine-tuning.

    Args:
        method: The run's method.
        stages: All stages.
        raw: The configuration as written, for the keys to set.
    """
    if method != "lifelong":
        return
    for i, stage in enumerate(stages):
        something_old = any(set(other.learns) - set(stage.learns) for other in stages[:i])
        # Once a stage has grown, the experts before it stay as they are, and the trunk if it is frozen.
        grown = any(other.grow.experts for other in stages[1 : i + 1]) and stage.trunk.is_frozen
        trains_part = stage.grow.experts or stage.continues is not None or grown or stage.kind == "finetune"
        if not something_old or trains_part or holds_old_text(stage):
            continue
        plain = OmegaConf.to_container(raw, resolve=False)
        raise ConfigError(
            f"stages[{i}]: what earlier stages learned trains on and nothing holds it, so method=lifelong would be "
            f"method=sequential. Add {' '.join(replaying(plain))}, or set method=sequential."
        )


def replaying(raw: Any) -> list[str]:
    """List the overrides by which every later stage replays a quarter, distilled lightly.

    Args:
        raw: The configuration as written, plain data.
    """
    share, weight = ReplayConfig().fraction, DistillConfig().weight
    return [*overrides(raw, "replay.fraction", share), *overrides(raw, "distill.weight", weight)]


def training_on(raw: Any) -> list[str]:
    """List the overrides by which later stages add nothing and all train on, with what then has to hold old text."""
    found = overrides(raw, "grow.experts", 0)
    # Without experts of its own a stage has no generation that low-rank changes could belong to.
    found += [] if set(_later(raw, "trunk.train", "full")) == {"full"} else overrides(raw, "trunk.train", "full")
    bundles = raw.get("routing", {}).get("bundles", "none")
    return [*found, *([] if bundles == "none" else ["routing.bundles=none"]), *replaying(raw)]


def in_generations(raw: Any) -> list[str]:
    """List the overrides by which each later stage gets a generation of its own, and no old text is kept.

    Args:
        raw: The configuration as written, plain data.
    """
    found = ["routing.bundles=cluster", "model.document_mask=true"]
    if 0 in _later(raw, "grow.experts", 2):
        found += overrides(raw, "grow.experts", 2)
    for key, value in (("trunk.train", "deltas"), ("replay.fraction", 0), ("distill.weight", 0)):
        found += overrides(raw, key, value)
    return found


def holds_old_text(stage: Stage) -> bool:
    """Whether a stage has a mechanism against forgetting besides freezing what is old."""
    penalizes = stage.penalty.kind != PenaltyKind.none and stage.penalty.factor > 0
    return bool(stage.replay.fraction or stage.distill.weight or penalizes or stage.average or stage.review.fraction)
