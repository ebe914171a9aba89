"""Read a retraining file, and extend its run's configuration by a stage on new documents. Torch-free.

The file names a ``base`` run configuration, whose stages are the first champion, and says what a tick does with new
documents. An override ``key=value`` whose key belongs to :class:`RetrainConfig` addresses this file; every other one
addresses the base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from lifelong_moe.config.data import KeepText
from lifelong_moe.config.load import build_config, overridden
from lifelong_moe.config.names import require_known
from lifelong_moe.config.references import as_text, note_secrets
from lifelong_moe.config.retraining.operation import HooksConfig, InboxConfig, LimitsConfig, ProbeConfig, TriggerConfig
from lifelong_moe.config.retraining.policy import HELDOUT_SOURCES, DecisionConfig, DriftConfig, GateConfig, PromoteRule
from lifelong_moe.config.run import Method, RunConfig
from lifelong_moe.config.sections import errors_under, keys_below, require_finite, require_key, section, sections_of
from lifelong_moe.config.yaml_file import apply_override, first_key, read_yaml, require_kind, require_short
from lifelong_moe.errors import ConfigError
from lifelong_moe.interop.layout.complete import with_checkpoint
from lifelong_moe.plan.memory import require_memory
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.redaction import note_address, redact

BATCH_NAME = "batch"
MAX_DAYS = 3650
MOST_WAYS = 100


@dataclass(kw_only=True)
class RetrainConfig:
    """One tick of scheduled retraining."""

    base: str
    """Run configuration whose stages come first; relative to this file."""
    inbox: InboxConfig = field(default_factory=InboxConfig)
    """Where new documents arrive."""
    trigger: TriggerConfig = field(default_factory=TriggerConfig)
    """When they are examined."""
    drift: DriftConfig = field(default_factory=DriftConfig)
    """When they count as another distribution."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """How both continuing and growing are tried."""
    decision: DecisionConfig = field(default_factory=DecisionConfig)
    """How the trials are weighed."""
    gate: GateConfig = field(default_factory=GateConfig)
    """Requirements on a candidate before it is served."""
    promote: PromoteRule = PromoteRule.automatic
    """What makes a candidate that has passed the gate the champion: ``automatic``, the tick; or ``manual``, a person,
    by ``lifelong-moe promote RUN``, until which ticks wait."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Limits on the cost of a tick."""
    hooks: HooksConfig = field(default_factory=HooksConfig)
    """Who is told."""
    stage: dict[str, Any] = field(default_factory=dict)
    """Settings of a new stage over the base's ``stage_defaults``, such as ``{tokens: 200_000}``."""
    when_growing: dict[str, Any] = field(default_factory=dict)
    """The same for a stage that grows, such as ``{grow: {experts: 4}}``."""
    when_continuing: dict[str, Any] = field(
        default_factory=lambda: {"replay": {"fraction": 0.25}, "distill": {"weight": 0.5}, "optim": {"rewarm": 0.2}}
    )
    """The same for a stage that trains the nearest experts on: it replays, for they are not frozen, and at a small
    rate, for they know this kind of text."""


OVERLAYS = ("stage", "when_growing", "when_continuing")


@dataclass(frozen=True)
class NewStage:
    """A stage of the stream that the base configuration does not contain."""

    name: str
    """Also the distribution's name."""
    files: str
    """Its documents."""
    continues: str | None = None
    """Stage whose experts train on; None grows."""
    tokens: int | None = None
    """Other than configured, for a probe."""
    grow: Mapping[str, Any] | None = None
    """Settings of growth over the configured ones."""
    heldout_fraction: float | None = None
    """Share of its sources that are held out; None is what the inbox says."""
    heldout_sources: int = HELDOUT_SOURCES
    """Sources that are held out at least."""


@dataclass(frozen=True)
class Retraining:
    """A retraining file, read, with its base."""

    settings: RetrainConfig
    base: DictConfig
    """The base configuration with its overrides, unresolved."""
    run: str

    def config(self, stages: Sequence[str], new: Sequence[NewStage]) -> RunConfig:
        """The run as it would be with these stages; see :meth:`extended`."""
        return build_config(self.extended(stages, new), is_stored=True)

    def extended(self, stages: Sequence[str], new: Sequence[NewStage]) -> DictConfig:
        """The base configuration as it would be with these stages, unresolved.

        Args:
            stages: Names of the base's stages that the champion still has, in order.
            new: What came, or would come, after them.
        """
        raw = self.base.copy()
        kept = [node for node, name in zip(raw.stages, self._stage_names, strict=True) if name in stages]
        raw.stages = [*kept, *(self._stage(stage) for stage in new)]
        for stage in new:
            share = stage.heldout_fraction
            raw.distributions[stage.name] = {
                "files": as_text(stage.files),
                "heldout_fraction": self.settings.inbox.heldout_fraction if share is None else share,
                "heldout_sources": stage.heldout_sources,
            }
        return raw

    @cached_property
    def _stage_names(self) -> list[str | None]:
        """Names of the base's stages."""
        # Cached: building a configuration takes some hundredths of a second, and a tick builds many.
        return [stage.name for stage in build_config(self.base, is_stored=True).stages]

    def _stage(self, stage: NewStage) -> Mapping[str, Any]:
        """The new stage as a mapping, as in a YAML file."""
        settings = self.settings
        overlay = settings.when_growing if stage.continues is None else settings.when_continuing
        # Later ones win: the file's settings, those of the kind of stage, and those of this stage.
        own: dict[str, Any] = {"data": stage.name, "name": stage.name, "continues": stage.continues}
        if stage.tokens is not None:
            own["tokens"] = stage.tokens
        if stage.grow is not None and stage.continues is None:
            own["grow"] = dict(stage.grow)
        # Names and ways to grow may come from a head or a plan, whose references nobody resolves.
        merged = OmegaConf.merge(settings.stage, overlay, as_text(own))
        return cast(Mapping[str, Any], OmegaConf.to_container(merged))

    def raw(self) -> Mapping[str, Any]:
        """The base as written."""
        # Unresolved: it is recorded, and an interpolation may refer to a secret.
        return cast(Mapping[str, Any], OmegaConf.to_container(self.base, resolve=False))


def load_retraining(path: str | Path, overrides: Sequence[str] = (), *, is_literal: bool = False) -> Retraining:
    """Read a retraining file and its base, and validate the stages that a tick could add.

    Args:
        path: YAML file.
        overrides: ``key=value``, for this file or for the base; see the module.
        is_literal: For a run that an earlier version began; see :func:`lifelong_moe.config.load.overridden`.

    Raises:
        ConfigError: One line with the full key or file and line, what was required and what came.
    """
    path = Path(path)
    require_short(overrides)
    raw, known = read_yaml(path), {f.name for f in dataclasses.fields(RetrainConfig)}
    require_kind(raw, "retrain", str(path))
    own = [override for override in overrides if first_key(override) in known]
    for override in own:
        apply_override(raw, override)
    for key in raw:
        require_known(str(key), known, "key")
    of_runs = {f.name for f in dataclasses.fields(RunConfig)} | {"stage_defaults"}
    for override in overrides:
        require_key(override.partition("=")[0], known | of_runs, [*keys_below(RetrainConfig)])
    with errors_under(""):  # a section may be an interpolation that refers to nothing, or to itself
        note_secrets(raw)
        settings = _settings(raw)
    note_address(settings.hooks.url or "")
    _refuse_secret_arguments(settings.hooks)
    file = read_yaml(path.parent / settings.base, is_base=True)
    require_kind(file, "run", str(path.parent / settings.base))
    with errors_under(""):  # it looks into sections, which may be interpolations
        theirs = [override for override in overrides if override not in own]
        base = with_checkpoint(overridden(file, theirs, is_literal=is_literal))
    config = build_config(base, is_stored=True)  # of a run that exists already
    if config.method != Method.lifelong:
        raise ConfigError(f"method={config.method}: retraining continues and grows, so it needs method=lifelong.")
    _refuse_added_tokens(config)
    found = Retraining(settings, base, config.run)
    _check_stages(found, [str(stage.name) for stage in config.stages])
    return found


def read_gate(overrides: Sequence[str]) -> GateConfig:
    """The gate's settings: defaults, or ``gate.KEY=VALUE``.

    Raises:
        ConfigError: If an override is for something else.
    """
    raw = OmegaConf.create({"gate": {}})
    for override in overrides:
        if first_key(override) != "gate":
            raise ConfigError(f"override {override!r}: only gate.KEY=VALUE can be set here.")
        apply_override(raw, override)
    return section(GateConfig, raw.get("gate"), "gate")


def _settings(raw: DictConfig) -> RetrainConfig:
    if not isinstance(raw.get("base"), str):
        raise ConfigError("base must name a run configuration, such as base: quickstart.yaml.")
    values: dict[str, Any] = {
        name: section(cls, raw.get(name), name) for name, cls in sections_of(RetrainConfig).items()
    }
    defaults = {f.name: f.default_factory for f in dataclasses.fields(RetrainConfig) if f.name in OVERLAYS}
    for name in OVERLAYS:
        node = raw.get(name)
        if node is None:
            values[name] = defaults[name]()  # type: ignore[operator]
        elif isinstance(node, DictConfig):
            values[name] = OmegaConf.to_container(node, resolve=True)
        else:
            raise ConfigError(f"{name} must be a mapping, such as {name}: {{tokens: 200_000}}; got {node!r}.")
    settings = RetrainConfig(base=raw.base, promote=_promote_rule(raw.get("promote")), **values)
    require_finite(settings, "")
    require_finite(OmegaConf.to_container(raw, resolve=False), "")
    if settings.trigger.max_days is not None and settings.trigger.max_days > MAX_DAYS:
        raise ConfigError(f"trigger.max_days={settings.trigger.max_days} must be at most {MAX_DAYS}.")
    return settings


def _promote_rule(value: Any) -> PromoteRule:
    if value is None:
        return PromoteRule.automatic
    if value not in [*PromoteRule]:
        raise ConfigError(f"promote={value} must be {' or '.join(PromoteRule)}.")
    return PromoteRule(value)


def _refuse_secret_arguments(hooks: HooksConfig) -> None:
    """Refuse secrets in a command's arguments, which everybody on a machine can read."""
    for place, argument in enumerate(hooks.command[1:], start=1):
        if redact(argument) != argument:
            raise ConfigError(
                f"hooks.command[{place}]={argument} holds a value from the environment, and everybody on this machine "
                f"can read the arguments of a process. Let the command itself read the variable."
            )


def _check_stages(retraining: Retraining, names: list[str]) -> None:
    """Build each kind of stage once, so that a mistake in the file is found before documents are read."""
    if (number := len(retraining.settings.probe.grow)) > MOST_WAYS:
        raise ConfigError(f"probe.grow holds {number:,} ways to grow; there may be at most {MOST_WAYS}.")
    ways = [(f"probe.grow[{i}]", None, way) for i, way in enumerate(retraining.settings.probe.grow)]
    # The newest experts, which no later ones are changes of; a checkpoint's own never train on.
    born = retraining.config(names, []).generations(len(names))
    continuing = [("when_continuing", name, None) for name in born[-1:]]
    for what, continues, grow in (("when_growing", None, None), *continuing, *ways):
        try:
            config = retraining.config(names, [NewStage(BATCH_NAME, "inbox.jsonl", continues, None, grow)])
        except ConfigError as error:
            message = str(error).replace(f"stages[{len(names)}]", what)
            raise ConfigError(f"{message} (of a stage that retraining adds)") from None
        _refuse_added_tokens(config)
        require_memory(config)
        _refuse_replay_of_removed(retraining.settings, config, what)
        if continues is None and not config.stages[-1].grow.experts:
            key = f"{what}.grow" if grow is None else what
            raise ConfigError(f"{key}.experts=0 adds no experts; set it above 0.")


def _refuse_added_tokens(config: RunConfig) -> None:
    """Refuse stages with tokens of their own, which neither probes nor the gate read."""
    for i, stage in enumerate(config.stages):
        if stage.vocabulary.add:
            raise ConfigError(
                f"stages[{i}].vocabulary.add={stage.vocabulary.add}: retraining measures all text in one vocabulary. "
                f"Leave it out."
            )


def _refuse_replay_of_removed(settings: RetrainConfig, config: RunConfig, what: str) -> None:
    """Refuse replay of text that ``inbox.keep_text`` removes."""
    keep, spec = settings.inbox.keep_text, stage_specs(config)[-1]
    if keep == KeepText.always or not (spec.reads or spec.fisher_data):
        return
    does = "replays" if spec.reads else "measures old weights on"
    off = "replay.fraction=0" if spec.replay.fraction else "review.fraction=0" if spec.reads else "penalty.kind=none"
    raise ConfigError(
        f"inbox.keep_text={keep} removes text of earlier batches, which {what} {does}. Set "
        f"{what}.replay.source=generated or {what}.{off}, or inbox.keep_text=always."
    )
