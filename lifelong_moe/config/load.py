"""Load a run's configuration from YAML and overrides. Torch-free.

There is one path in: YAML, then ``key=value`` overrides, then OmegaConf merges each section over its dataclass. Other
packages see plain dataclasses only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.config.methods import (
    refuse_forgetting,
    refuse_idle_method,
    refuse_moving_trunk,
    refuse_unfit_mode,
    stands_alone,
    with_rank,
    with_recommended,
    without_written_text,
)
from lifelong_moe.config.references import note_secrets, with_numbers
from lifelong_moe.config.routing.bounds import MOST_DISTRIBUTIONS, MOST_STAGES
from lifelong_moe.config.routing.modes import settings_of
from lifelong_moe.config.routing.switching import drop_foreign_keys, drop_keys_of_old_mode, structured
from lifelong_moe.config.rules import require_consistent
from lifelong_moe.config.run import Method, PublishedConfig, RunConfig, StageConfig
from lifelong_moe.config.sections import errors_under, require_finite, require_fit, require_key, section, sections_of
from lifelong_moe.config.yaml_file import apply_override, read_yaml, require_kind, require_short
from lifelong_moe.errors import ConfigError
from lifelong_moe.redaction import note_address, say_openly, shown_address, without_credentials


# RunConfig as a whole is never merged: `stages` and `distributions` are built item by item, so that errors name theirs.
@dataclass(kw_only=True)
class _Scalars:
    run: str
    method: Method = Method.lifelong
    seed: int = 0


@dataclass(frozen=True)
class LoadedConfig:
    """A run's configuration, which a command reads once and passes on."""

    raw: DictConfig
    """The file with overrides; interpolations such as ``${oc.env:TOKEN}`` are unresolved."""
    config: RunConfig
    """The validated dataclasses built from ``raw``."""
    left_behind: tuple[str, ...] = ()
    """Messages on keys of the file that do not apply to the routing mode set by an override, or on how it was read."""


T = TypeVar("T")
Begun = Callable[[RunConfig], bool | None]
"""Whether the run that a configuration names was begun with these stages; None if there is no such run."""


def as_it_is(raw: DictConfig) -> DictConfig:
    """No change: what a configuration is completed with where it names no checkpoint."""
    return raw


def none_begun(config: RunConfig) -> bool | None:
    """No run exists: how a configuration is read where no store is at hand."""
    return None


def read_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    complete: Callable[[DictConfig], DictConfig] = as_it_is,
    begun: Begun = none_begun,
) -> LoadedConfig:
    """Read a YAML file, apply ``key=value`` overrides, validate, and build the run's configuration.

    Args:
        path: YAML file, or ``-`` for standard input.
        overrides: Such as ``seed=1`` or ``stages[1].grow.experts=4``; the value is YAML.
        complete: Fills in what the configuration refers to, such as ``model.from``.
        begun: Tells which reading of ``method: lifelong`` alone the run was begun with, by this or an earlier version.

    Raises:
        ConfigError: With the full key or file and line, what was required and what came, on one line.
    """
    return configure(read_yaml(Path(path)), overrides, str(path), complete, begun)


def configure(
    file: DictConfig,
    overrides: Sequence[str],
    path: str,
    complete: Callable[[DictConfig], DictConfig] = as_it_is,
    begun: Begun = none_begun,
) -> LoadedConfig:
    """Build a configuration from a file that was read before, such as the one that all runs of a comparison share.

    Args:
        file: As from :func:`~lifelong_moe.config.yaml_file.read_yaml`; left unchanged.
        overrides: See :func:`read_config`.
        path: What messages call the file.
        complete: See :func:`read_config`.
        begun: See :func:`read_config`.
    """
    require_kind(file, "run", path)
    return as_begun(partial(_configure, file, overrides, path, complete), lambda loaded: begun(loaded.config))


def as_begun(read: Callable[[bool], T], begun: Callable[[T], bool | None]) -> T:
    """Read a file as its run was begun: an earlier version took ``method: lifelong`` alone for another method.

    Args:
        read: Reads it; the argument is ``is_literal`` of :func:`overridden`.
        begun: As :data:`Begun`, of what was read.

    Raises:
        ConfigError: If today's reading is refused, and no run was begun with the earlier one.
    """
    found, refused = None, None
    try:
        found = read(False)
    except ConfigError as error:
        refused = error  # a rule on keys that an earlier version did not fill in must not stop what it began
    if found is None or begun(found) is False:
        with suppress(ConfigError):
            literal = read(True)
            if begun(literal):
                return literal
    if found is None:
        assert refused is not None
        raise refused
    return found


def _configure(
    file: DictConfig,
    overrides: Sequence[str],
    path: str,
    complete: Callable[[DictConfig], DictConfig],
    is_literal: bool,
) -> LoadedConfig:
    """Build a configuration in one of both readings; see :func:`overridden`."""
    raw = overridden(file, overrides, is_literal=is_literal)
    with errors_under(""):  # it looks into sections, which may be interpolations
        raw = complete(raw)
    config = build_config(raw)
    _require_effect(raw, overrides, path)
    with errors_under(""):
        ignored = sorted(set(file.get("routing") or ()) - set(raw.get("routing") or ()))
        is_earlier = is_literal and stands_alone(file)
    messages = []
    if ignored:
        keys, mode = ", ".join(f"routing.{key}" for key in ignored), config.routing.mode
        messages.append(f"routing.mode={mode} does without {keys} of {path}; docs/systems.md")
    if is_earlier:
        messages.append(
            f"run={config.run} was begun when method: lifelong alone meant replay and distillation without bundles, "
            f"and goes on so; another run=NAME has what it stands for now."
        )
    return LoadedConfig(raw, config, tuple(messages))


def _require_effect(raw: DictConfig, overrides: Sequence[str], path: str) -> None:
    """Refuse an override of ``stage_defaults`` that no stage takes, since each has a value of its own.

    Args:
        raw: A valid configuration, overrides applied.
        overrides: See :func:`read_config`.
        path: The file, for messages.
    """
    plain = OmegaConf.to_container(raw.stages, resolve=False)
    assert isinstance(plain, list)
    for override in overrides:
        first, _, key = override.partition("=")[0].partition(".")
        if first != "stage_defaults" or not key or isinstance(OmegaConf.select(raw, f"{first}.{key}"), DictConfig):
            continue
        if all(_has(stage, key.split(".")) for stage in plain):
            own = ", ".join(f"stages[{number}].{key}" for number in range(len(plain)))
            raise ConfigError(
                f"{override} changes nothing: each stage of {path} has a value of its own. Set {own}, or take them out "
                f"of the file."
            )


def _has(node: object, keys: list[str]) -> bool:
    """Whether nested mappings hold a value under these keys."""
    for key in keys:
        if not isinstance(node, Mapping) or key not in node:
            return False
        node = node[key]
    return True


def overridden(file: DictConfig, overrides: Sequence[str], *, is_literal: bool = False) -> DictConfig:
    """Copy a file's content and apply overrides, which may switch the routing's mode; nothing is validated.

    Args:
        file: As from :func:`~lifelong_moe.config.yaml_file.read_yaml`; left unchanged.
        overrides: See :func:`read_config`.
        is_literal: Leave out what the word ``method: lifelong`` alone stands for, as earlier versions did.
    """
    require_short(overrides)
    with errors_under(""):  # a section may be an interpolation that refers to nothing
        by_word = not is_literal and stands_alone(file)
        # Before the overrides: they change one key of the whole, and do not take the word from it.
        file = with_recommended(file) if by_word else file
    raw = file.copy()
    for override in overrides:
        apply_override(raw, override)
    # Last, since any of the overrides may have set the mode.
    with errors_under(""):
        if by_word:
            # Again, for an override may empty a section.
            raw = with_recommended(raw)
            with_rank(raw)
        drop_keys_of_old_mode(raw, file, overrides)
        # Before anything is built from it: the first error may quote a secret.
        note_secrets(raw)
    return raw


def written_config(raw: DictConfig) -> dict[str, Any]:
    """A configuration as plain data that may be logged: interpolations unresolved, URLs without credentials."""
    # An interpolation may refer to a secret in the environment; a URL may contain one.
    return _masked(with_numbers(raw))


def _masked(value: Any) -> Any:
    """Mask the parts of URLs within plain data that may be secret."""
    if isinstance(value, dict):
        masked = {key: _masked(child) for key, child in value.items()}
        # In the path of a server's address a token may stand; other URLs, such as a paper's, name something public.
        addresses = {key: child for key, child in value.items() if key == "uri" and isinstance(child, str)}
        return masked | {key: shown_address(child) for key, child in addresses.items()}
    if isinstance(value, list):
        return [_masked(child) for child in value]
    return without_credentials(value, mask="***") if isinstance(value, str) else value


def build_config(raw: DictConfig, *, is_stored: bool = False) -> RunConfig:
    """Validate plain configuration data and build the dataclasses; see :func:`read_config`.

    Args:
        raw: As from :func:`overridden`.
        is_stored: Whether it belongs to an existing run, which an earlier version may have allowed more than today's.
    """
    if is_stored and OmegaConf.select(raw, "routing.capacity") and OmegaConf.select(raw, "routing.balance_scope"):
        # In an existing run the two may contradict each other; see `stored_routing`. The caller's `raw` stays.
        raw = raw.copy()
        del raw.routing.balance_scope
    with errors_under(""):  # a section may be an interpolation that refers to nothing, or to itself
        return _built(raw, is_stored=is_stored)


def _built(raw: DictConfig, *, is_stored: bool) -> RunConfig:
    known = {f.name for f in dataclasses.fields(RunConfig)} | {"stage_defaults"}
    if isinstance(raw.get("base"), str):
        raise ConfigError(
            f"base={raw.base} names a run's configuration in files of lifelong-moe compare and retrain, and this is a "
            f"run's own. A checkpoint to begin with is model.from=FOLDER."
        )
    for key in raw:
        require_key(_first_path(str(key), raw._get_node(key)), known)
    # Before the sections, the first of which would report one of several keys that a mode needs.
    if not is_stored:
        refuse_unfit_mode(raw)
    nodes = {name: (cls, raw.get(name)) for name, cls in sections_of(RunConfig).items()}
    nodes["routing"] = _of_its_mode(*nodes["routing"], is_stored=is_stored)
    values: dict[str, Any] = {name: section(cls, node, name) for name, (cls, node) in nodes.items()}
    sources = _mapping(raw, "distributions")
    if len(sources) > MOST_DISTRIBUTIONS:
        raise ConfigError(f"distributions holds {len(sources):,}; there may be at most {MOST_DISTRIBUTIONS:,}.")
    # YAML reads a name such as 2024 as a number, under which OmegaConf finds the node.
    names = {str(key): key for key in sources}
    if not values["base"].is_given:
        values["routing"] = without_written_text(values["routing"], is_stored=is_stored)
    values["distributions"] = {
        name: section(SourceConfig, sources._get_node(key), f"distributions.{name}") for name, key in names.items()
    }
    values["stages"] = _stages(raw)
    if raw.get("published") is not None:
        values["published"] = section(PublishedConfig, raw.published, "published")
    # OmegaConf rejects keys that the dataclass lacks, so the node is cut down to those that it has.
    scalars = section(_Scalars, OmegaConf.masked_copy(raw, ["run", "method", "seed"]), "")
    config = RunConfig(run=scalars.run, method=scalars.method, seed=scalars.seed, **values)
    # Names are no secrets, wherever they come from: files and records are called by them.
    say_openly([config.run, config.tracking.experiment, *config.distributions, *(str(s.name) for s in config.stages)])
    note_address(config.tracking.uri or "")
    require_consistent(config)
    # Rules of later versions: an existing run that breaks them must still open.
    if not is_stored:
        config.routing.require_gate_gradient()
        refuse_idle_method(config.method, config.routing, config.stages, raw)
        refuse_moving_trunk(config.method, config.routing, config.stages, 0 if config.base.is_given else 1)
        refuse_forgetting(config.method, config.stages, raw)
    # YAML can write .nan and .inf, and NaN passes checks such as `lr <= 0`.
    require_finite(config, "")
    # Also where a text belongs, such as a name: what is stored is JSON, which has no such number.
    require_finite(OmegaConf.to_container(raw, resolve=False), "")
    return config


def _first_path(key: str, node: Any) -> str:
    """The full name of the first key that stands under one: ``optim.lr`` of ``{optim: {lr: 1}}``."""
    while isinstance(node, DictConfig) and not node._is_none() and not _refers(node) and len(node) > 0:
        first: Any = next(iter(node))
        key, node = f"{key}.{first}", node._get_node(first)
    return key


def whole_config(raw: DictConfig) -> dict[str, Any]:
    """Write out a valid configuration with all defaults, and with ``stage_defaults`` merged under each stage.

    Args:
        raw: As from :func:`overridden`.

    Returns:
        Plain data that may be logged, like that of :func:`written_config`: interpolations stay unresolved.
    """
    # Nodes throughout: access by key would resolve an interpolation, which may refer to a secret.
    found = _unresolved(_Scalars, OmegaConf.masked_copy(raw, ["run", "method", "seed"]))
    parts = {name: (cls, raw._get_node(name)) for name, cls in sections_of(RunConfig).items()}
    # As stored: what was refused was refused when the configuration was read; an earlier version's run may hold more.
    parts["routing"] = _of_its_mode(*parts["routing"], is_stored=True)
    found |= {name: _unresolved(cls, node) for name, (cls, node) in parts.items()}
    nodes: list[Any] = [raw._get_node(key) for key in ("distributions", "stages", "stage_defaults")]
    sources, stages, defaults = nodes
    found["distributions"] = _each(SourceConfig, sources)
    # What an interpolation would merge under the stages is unknown.
    found["stages"] = _each(StageConfig, stages, None if _refers(defaults) else defaults)
    if raw.get("published") is not None:
        found["published"] = _unresolved(PublishedConfig, raw._get_node("published"))
    return _masked(found)


def _unresolved(cls: type, node: Any, under: DictConfig | None = None) -> Any:
    """Merge a node over its dataclass, as plain data that keeps interpolations."""
    if _refers(node):
        return node._value()
    # A section that is written as null is the default one.
    parts = [part for part in (structured(cls), under, node) if part is not None and not part._is_none()]
    return OmegaConf.to_container(OmegaConf.merge(*parts), resolve=False, enum_to_str=True)


def _refers(node: Any) -> bool:
    """Whether a node is an interpolation, whose value is unknown until it is resolved."""
    return node is not None and bool(node._is_interpolation())


def _each(cls: type, nodes: Any, under: DictConfig | None = None) -> Any:
    """Merge each node of a mapping or list over its dataclass."""
    if _refers(nodes):
        return nodes._value()
    if isinstance(nodes, ListConfig):
        each: list[Any] = [nodes._get_node(i) for i in range(len(nodes))]
        return [_unresolved(cls, node, under and (under if _refers(node) else _below(under, node))) for node in each]
    return {str(key): _unresolved(cls, nodes._get_node(key), under) for key in nodes}


def _of_its_mode(cls: type, node: Any, *, is_stored: bool = False) -> tuple[type, Any]:
    """Find the dataclass of the mode that a routing section names, and drop the section's keys of other modes."""
    # `section` reports a node that is no mapping.
    if not isinstance(node, DictConfig) or _refers(node):
        return cls, node
    with errors_under("routing"):
        return settings_of(node.get("mode", "learned")), drop_foreign_keys(node, is_stored=is_stored)


def _stages(raw: DictConfig) -> list[StageConfig]:
    stages = raw.get("stages")
    if not isinstance(stages, ListConfig):
        raise ConfigError("stages must be a list, such as stages: [{data: english_docs}, {data: python_code}].")
    # Before any is built: building a stage takes some milliseconds.
    if len(stages) > MOST_STAGES:
        raise ConfigError(f"stages holds {len(stages):,}; there may be at most {MOST_STAGES:,}.")
    defaults = OmegaConf.create({}) if raw.get("stage_defaults") is None else raw.stage_defaults
    if not isinstance(defaults, DictConfig):
        raise ConfigError("stage_defaults must be a mapping.")
    # Merged by themselves first, so that a mistake in them is reported under their name, not the first stage's.
    require_fit(StageConfig, defaults, "stage_defaults")
    built = []
    for i, stage in enumerate(stages):
        if not isinstance(stage, DictConfig):
            raise ConfigError(f"stages[{i}] must be a mapping with at least data: NAME; got {stage!r}.")
        built.append(section(StageConfig, stage, f"stages[{i}]", under=_below(defaults, stage)))
    return built


def _below(defaults: DictConfig, stage: DictConfig) -> DictConfig:
    """The defaults under a stage: two mixtures are not merged into a third."""
    # Nodes, since access by key would resolve an interpolation.
    if defaults._get_node("data") is None or stage._get_node("data") is None:
        return defaults
    return OmegaConf.masked_copy(defaults, [str(key) for key in defaults if key != "data"])


def _mapping(raw: DictConfig, key: str) -> DictConfig:
    node = raw.get(key)
    if not isinstance(node, DictConfig) or not node:
        raise ConfigError(f"{key} must be a non-empty mapping.")
    return node
