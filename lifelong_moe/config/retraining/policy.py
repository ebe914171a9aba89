"""When new data counts as drift, what a stage must be worth, and what the gate lets through. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lifelong_moe.errors import ConfigError

HELDOUT_SOURCES = 5
"""Sources of a batch that are held out at least, if it has twice as many: bounds from fewer are no verdict."""


@dataclass(kw_only=True)
class DriftConfig:
    """Whether new documents come from another distribution than those the model has learned."""

    auc: float = 0.60
    """Area under the curve that a classifier of new against old sources must at least reach; 0.5 is guessing."""
    quantile: float = 0.99
    """It must also exceed this quantile of what it reaches when chance says which sources are new."""
    permutations: int = 200
    """How often chance says so."""
    documents: int = 400
    """Documents looked at on each side, at most; spread evenly over sources."""

    def __post_init__(self) -> None:
        _require("drift.auc", self.auc, 0.5 <= self.auc < 1, "must lie in [0.5, 1)")
        _require("drift.quantile", self.quantile, 0.5 <= self.quantile < 1, "must lie in [0.5, 1)")
        # With as many new sources as old ones the mirror image of the truth scores as well as the truth.
        least = round(2 / (1 - self.quantile)) - 1
        _require(
            "drift.permutations",
            self.permutations,
            self.permutations >= least,
            f"must be at least {least} for drift.quantile={self.quantile}",
        )
        _require("drift.documents", self.documents, self.documents >= 2, "must be at least 2")


@dataclass(kw_only=True)
class DecisionConfig:
    """What continuing or growing must be worth, from probes; prices are in nats per token of gain."""

    forgetting_weight: float = 1.0
    """Price of a nat per token that the worst old distribution loses beyond ``tolerance``."""
    parameter_weight: float = 0.05
    """Price of adding as many parameters as the model has."""
    cost_weight: float = 0.02
    """Price of spending the whole budget on a stage and its probes: ``limits.tokens`` or ``limits.hours``, whichever
    they take more of. Without either, the budget is what training the model as it is on as many tokens would cost."""
    tolerance: float = 0.01
    """Forgetting that costs nothing, in nats per token."""
    min_gain: float = 0.01
    """What the gain on new held-out text must reach with 95 % confidence, in nats per token. Text whose gain may be
    less or more waits for more of its kind; it is skipped once the gain is less with 95 % confidence."""
    min_structure: float = 0.1
    """What reading tokens in their order must be worth on new held-out text, with 95 % confidence, in nats per token:
    less with that confidence, and the text is noise, however well its frequencies can be learned."""

    def __post_init__(self) -> None:
        for key in ("forgetting_weight", "parameter_weight", "cost_weight", "tolerance", "min_structure"):
            _require(f"decision.{key}", getattr(self, key), getattr(self, key) >= 0, "must not be negative")
        _require("decision.min_gain", self.min_gain, self.min_gain > 0, "must be positive")


@dataclass(kw_only=True)
class GateConfig:
    """What a new version must hold to become the champion."""

    min_gain: float = 0.01
    """What the gain on the new distribution must reach with confidence, in nats per token."""
    tolerance: float = 0.01
    """What an old distribution may lose against the version before, in nats per token. Against its best version ever,
    three times as much."""
    level: float = 0.05
    """Chance that a check passes what it should not. It is not divided by the number of checks: a version must pass all
    of them."""
    resamples: int = 2000
    """Bootstrap samples of the sources; 20 of them must lie beyond a bound, so at least ``20 / level``."""
    max_leak: float = 0.5
    """Share of an old distribution's tokens that may go to experts born after it was learned."""

    def __post_init__(self) -> None:
        _require("gate.min_gain", self.min_gain, self.min_gain >= 0, "must not be negative")
        _require("gate.tolerance", self.tolerance, self.tolerance >= 0, "must not be negative")
        _require("gate.level", self.level, 0 < self.level < 0.5, "must lie between 0 and 0.5")
        least = math.ceil(20 / self.level)
        _require(
            "gate.resamples",
            self.resamples,
            self.resamples >= least,
            f"must be at least {least} for gate.level={self.level}",
        )
        _require("gate.max_leak", self.max_leak, 0 <= self.max_leak <= 1, "must lie in [0, 1]")


def _require(key: str, value: float, holds: bool, rule: str) -> None:
    """Raise a ConfigError unless a rule holds; NaN breaks every rule."""
    if not holds:
        raise ConfigError(f"{key}={value} {rule}.")
