"""Read a comparison file: its arms are named sets of overrides of one run configuration. Torch-free.

A ``key=value`` whose key belongs to :class:`ComparisonConfig`, such as
``seeds=[0]`` or ``arms.more=[routing.top_k=1]``, addresses the comparison; every other key addresses every arm.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lifelong_moe.config.load import Begun, LoadedConfig, configure, none_begun
from lifelong_moe.config.names import NAME, require_known
from lifelong_moe.config.references import note_secrets
from lifelong_moe.config.run import RunConfig
from lifelong_moe.config.sections import require_finite, require_key, section
from lifelong_moe.config.yaml_file import apply_override, first_key, read_yaml, require_kind, require_short
from lifelong_moe.errors import ConfigError
from lifelong_moe.interop.layout.complete import with_checkpoint
from lifelong_moe.plan.memory import require_memory

MAX_RUN_NAME = 64
MOST_ARMS = 1_000
MOST_RUNS = 10_000
"""Arms times seeds. All are planned before the first one trains."""
SET_BY_US = ("run", "seed")


class Budget(StrEnum):
    """The quantity that is equal between arms."""

    tokens = "tokens"
    flops = "flops"


@dataclass(kw_only=True)
class ComparisonConfig:
    """Arms that differ from one base configuration, each trained with the same seeds."""

    compare: str
    """Name of the comparison; its results are under ``mlruns/comparisons/<compare>/``."""
    base: str
    """Run configuration that all arms begin with; relative to the comparison's file."""
    budget: Budget = Budget.tokens
    """``tokens`` leaves every stage's tokens as configured, replayed ones included. ``flops`` sets them so that no
    stage costs more active FLOPs, the teacher's included, than the same stage of the reference."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Each arm is trained once with each."""
    reference: str | None = None
    """Arm that differences are taken against; the first by default."""
    unrestrained: str | None = None
    """Arm with nothing to hold it back, for the plasticity gap; by default the first with ``method: unrestrained``,
    else the first with ``method: sequential``."""
    joint: str | None = None
    """Arm that learned everything at once, for the oracle gap; by default the first with ``method: joint``."""
    arms: dict[str, Any]
    """By name: a list of overrides, such as ``[method=sequential]``, or a mapping with ``grid`` (by key a list of
    values; each combination is an arm) and ``set`` (overrides of all of these, before the grid's own), such as
    ``{grid: {model.experts: [4, 8]}, set: [method=static_moe]}``."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.compare):
            raise ConfigError(f"compare={self.compare} may hold letters, digits, '_', '-' and '.' only.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds={self.seeds} must hold at least one seed, and each only once.")
        if not all(0 <= seed < 2**32 for seed in self.seeds):
            raise ConfigError(f"seeds={self.seeds} must lie between 0 and 2**32 - 1.")
        if not self.arms:
            raise ConfigError(
                "arms is empty; a comparison needs at least one, such as arms: {naive: [method=sequential]}."
            )


@dataclass(frozen=True)
class Arm:
    """One of the compared configurations."""

    name: str
    entry: str
    """The key under ``arms`` that it comes from: its own name, or its grid's."""
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """A comparison file, read and expanded."""

    settings: ComparisonConfig
    base: Path
    arms: tuple[Arm, ...]
    common: tuple[str, ...]
    """Overrides of every arm, from the command line."""
    file: DictConfig
    """What the base file holds, read once for all runs."""
    begun: Begun = none_begun
    """How the runs were begun; see :func:`lifelong_moe.config.load.read_config`."""

    @property
    def reference(self) -> str:
        """Arm that differences are taken against."""
        return self.settings.reference or self.arms[0].name

    def run_name(self, arm: Arm, seed: int) -> str:
        """``<compare>.<arm>.s<seed>``."""
        return f"{self.settings.compare}.{arm.name}.s{seed}"

    def overrides(self, arm: Arm, seed: int) -> list[str]:
        """All overrides of the base file for one run."""
        # The command line comes before the arm's own, so that an arm stays what its name says.
        return [*self.common, *arm.overrides, f"run={self.run_name(arm, seed)}", f"seed={seed}"]

    def configure(self, overrides: Sequence[str]) -> LoadedConfig:
        """The base file's configuration with overrides."""
        return configure(self.file, overrides, str(self.base), with_checkpoint, self.begun)

    def select(self, only: Sequence[str]) -> tuple[Arm, ...]:
        """Arms by name, or by the name of the grid that they come from; all if nothing is named.

        Raises:
            ConfigError: If there is no such arm.
        """
        known = {name for arm in self.arms for name in (arm.name, arm.entry)}
        for name in only:
            require_known(name, known, "--only")
        return tuple(arm for arm in self.arms if not only or arm.name in only or arm.entry in only)


def load_comparison(path: str | Path, overrides: Sequence[str] = (), begun: Begun = none_begun) -> Comparison:
    """Read a comparison file and validate the configuration of every arm.

    Args:
        path: YAML file.
        overrides: ``key=value``, for the comparison or for every arm; see the module.
        begun: See :func:`lifelong_moe.config.load.read_config`.

    Raises:
        ConfigError: One line; it names the arm if the mistake is in one.
    """
    path = Path(path)
    require_short(overrides)
    raw, known = read_yaml(path), {f.name for f in dataclasses.fields(ComparisonConfig)}
    require_kind(raw, "compare", str(path))
    # An override of the comparison, such as seeds=[0], would be an unknown key to a run.
    own = [override for override in overrides if first_key(override) in known]
    common = tuple(override for override in overrides if override not in own)
    for override in own:
        apply_override(raw, override)
    of_runs = {f.name for f in dataclasses.fields(RunConfig)} | {"stage_defaults"}
    for key in raw:
        require_known(str(key), known, "key")
    for override in common:
        require_key(override.partition("=")[0], known | of_runs)
    note_secrets(raw)
    require_finite(OmegaConf.to_container(raw, resolve=False), "")
    settings = section(ComparisonConfig, raw, "")
    # Unresolved: overrides are recorded, and an interpolation may refer to a secret. Each run resolves its own.
    written: Any = OmegaConf.to_container(raw.arms, resolve=False)
    settings = dataclasses.replace(settings, arms={str(name): entry for name, entry in written.items()})
    arms = tuple(arm for name, entry in settings.arms.items() for arm in _arms(name, entry))
    base = path.parent / settings.base
    file = read_yaml(base, is_base=True)
    require_kind(file, "run", str(base))
    comparison = Comparison(settings, base, arms, common, file, begun)
    _check(comparison)
    return comparison


def _check(comparison: Comparison) -> None:
    settings, names = comparison.settings, [arm.name for arm in comparison.arms]
    if len(names) > MOST_ARMS or len(names) * len(settings.seeds) > MOST_RUNS:
        raise ConfigError(
            f"arms and seeds make {len(names):,} arms and {len(names) * len(settings.seeds):,} runs; there may be at "
            f"most {MOST_ARMS:,} and {MOST_RUNS:,}."
        )
    for arm in comparison.arms:
        if names.count(arm.name) > 1:
            raise ConfigError(f"arm {arm.name} is there twice; choose another name for one of them.")
        longest = max((comparison.run_name(arm, seed) for seed in settings.seeds), key=len)
        if len(longest) > MAX_RUN_NAME or not NAME.fullmatch(longest):
            raise ConfigError(
                f"arm {arm.name}: its run would be named {longest}; at most {MAX_RUN_NAME} letters, digits, '_', '-' "
                f"and '.' are possible. Choose shorter names."
            )
        for override in (*comparison.common, *arm.overrides):
            if override.partition("=")[0] in SET_BY_US:
                raise ConfigError(f"arm {arm.name}: {override}: set compare=NAME and seeds=[…] instead.")
    for role in ("reference", "unrestrained", "joint"):
        if (name := getattr(settings, role)) is not None:
            require_known(name, names, role)
    # Every arm is built once, with one seed, so that a mistake in the last one is found before the first one trains.
    configs = {}
    for arm in comparison.arms:
        try:
            configs[arm.name] = comparison.configure(comparison.overrides(arm, settings.seeds[0])).config
            configs[arm.name].trainer.require_one_machine()
            require_memory(configs[arm.name])
        except ConfigError as error:
            raise ConfigError(f"arm {arm.name}: {error}") from None
    require_equal_measures({name: measures(configs[name]) for name in [comparison.reference, *configs]})


def measures(config: RunConfig) -> dict[str, object]:
    """The settings that decide how losses per token are measured, by key: tokenizer, held-out text, context."""
    # A key without effect is None, so that arms may differ in it.
    tokenizer, file = config.tokenizer, config.tokenizer.file
    found: dict[str, object] = {
        "tokenizer.file": file,
        "tokenizer.bos": tokenizer.bos,
        "tokenizer.vocab_size": tokenizer.vocab_size if file is None else None,
        "tokenizer.train_on": config.stages[0].learns[0] if file is None else None,
        "model.context": config.model.context,
        "evaluate.tokens": config.evaluate.tokens,
    }
    for name in config.evaluated:
        source, path = config.distributions[name], f"distributions.{name}"
        found[f"{path}.heldout_files"] = source.heldout_files
        for key in ("heldout_fraction", "heldout_sources"):
            found[f"{path}.{key}"] = getattr(source, key) if source.heldout_files is None else None
    return found


def require_equal_measures(arms: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse arms whose losses per token do not compare.

    Args:
        arms: From :func:`measures` for each arm, the reference first; a key that only some have is compared among
            those.

    Raises:
        ConfigError: Naming the arm and the key.
    """
    first: dict[str, tuple[str, Any]] = {}
    for arm, found in arms.items():
        for key, value in found.items():
            other, expected = first.setdefault(key, (arm, value))
            if value != expected:
                shown, wanted = ("null" if one is None else one for one in (value, expected))
                raise ConfigError(
                    f"arm {arm}: {key}={shown}, but {wanted} in arm {other}; their losses per token would not compare. "
                    f"Make it the same in all arms."
                )


def _arms(name: str, entry: Any) -> list[Arm]:
    """The arms of one key under ``arms``."""
    if not isinstance(entry, dict):
        return [Arm(name, name, _overrides(entry, f"arms.{name}"))]
    for key in entry:
        require_known(str(key), ("grid", "set"), f"arms.{name}: key")
    grid = entry.get("grid")
    if not isinstance(grid, dict) or not grid:
        raise ConfigError(f"arms.{name}.grid must map keys to lists, such as {{model.experts: [4, 8]}}; got {grid!r}.")
    for key, values in grid.items():
        if not isinstance(values, list) or not values or any(isinstance(v, list | dict) for v in values):
            raise ConfigError(f"arms.{name}.grid.{key} must be a list of numbers, words or null; got {values!r}.")
    # Counted before any is made: lists multiply.
    if (number := prod(len(values) for values in grid.values())) > MOST_ARMS:
        raise ConfigError(f"arms.{name}.grid has {number:,} combinations; there may be at most {MOST_ARMS:,}.")
    shared, labels = _overrides(entry.get("set", []), f"arms.{name}.set"), _labels([str(key) for key in grid])
    arms = []
    for values in itertools.product(*grid.values()):
        # JSON writes null, true and numbers as an override reads them.
        texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
        parts = [f"{label}-{_nameable(text)}" for label, text in zip(labels, texts, strict=True)]
        chosen = [f"{key}={text}" for key, text in zip(grid, texts, strict=True)]
        arms.append(Arm(".".join([name, *parts]), name, (*shared, *chosen)))
    return arms


def _overrides(entry: Any, path: str) -> tuple[str, ...]:
    if not isinstance(entry, list) or not all(isinstance(item, str) and "=" in item for item in entry):
        raise ConfigError(f"{path} must be a list of key=value, such as [method=sequential]; got {entry!r}.")
    return tuple(entry)


def _labels(keys: list[str]) -> list[str]:
    """Each key's last part, or as many of its last parts as distinguish it from the others."""
    parts = [key.split(".") for key in keys]
    # One key may be the end of another one; then its full name has to do.
    ends = [next((n for n in range(1, len(p) + 1) if sum(p[-n:] == q[-n:] for q in parts) == 1), len(p)) for p in parts]
    return [_nameable(".".join(p[-n:])) for p, n in zip(parts, ends, strict=True)]


def _nameable(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "", text) or "none"
