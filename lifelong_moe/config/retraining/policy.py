"""Settings of the retraining policy: drift test, decision, gate. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from lifelong_moe.config.names import require_name
from lifelong_moe.config.routing.bounds import require_bounded
from lifelong_moe.errors import ConfigError

# The gate computes no bounds from fewer (lifelong_moe.retraining.bounds.LEAST_SOURCES).
HELDOUT_SOURCES = 5
"""Fewest held-out sources of a batch that has twice as many."""


class PromoteRule(StrEnum):
    """Who lets a candidate serve that has passed the gate."""

    automatic = "automatic"
    manual = "manual"


@dataclass(kw_only=True)
class DriftConfig:
    """Test of whether new documents come from another distribution than those the model has learned."""

    auc: float = 0.60
    """Least AUC of a classifier of new against old sources that counts as drift; 0.5 is guessing."""
    quantile: float = 0.99
    """The AUC must also exceed this quantile of its null distribution, under permuted labels."""
    permutations: int = 200
    """Number of permutations of the labels that the null distribution is computed from."""
    documents: int = 400
    """Most documents to read on each side, spread evenly over sources."""

    def __post_init__(self) -> None:
        require_bounded(self, "drift.")
        _require("drift.auc", self.auc, 0.5 <= self.auc < 1, "must lie in [0.5, 1)")
        _require("drift.quantile", self.quantile, 0.5 <= self.quantile < 1, "must lie in [0.5, 1)")
        # A quantile needs 1 / (1 - quantile) labellings; twice as many, since with as many new sources as old ones the
        # mirror image of the truth has the same AUC.
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
    """Utility of continuing or growing, from probes; prices are in nats per token of gain."""

    forgetting_weight: float = 1.0
    """Price of a nat per token that the worst old distribution loses beyond ``tolerance``."""
    parameter_weight: float = 0.05
    """Price of adding as many parameters as the model has."""
    cost_weight: float = 0.02
    """Price of spending the whole budget on a stage and its probes: ``limits.tokens`` or ``limits.hours``, whichever
    they use the larger fraction of. Without either, the budget is the cost of training the present model on as many
    tokens."""
    tolerance: float = 0.01
    """Forgetting that costs nothing, in nats per token."""
    min_gain: float = 0.01
    """Least gain on new held-out text, in nats per token. Text is skipped if its gain is less with 95 % confidence, and
    waits for more of its kind while its bounds leave that open."""
    min_structure: float = 0.1
    """Least value of token order on new held-out text, in nats per token. Text of less with 95 % confidence is noise,
    however well its frequencies can be learned."""

    def __post_init__(self) -> None:
        for key in ("forgetting_weight", "parameter_weight", "cost_weight", "tolerance", "min_structure"):
            _require(f"decision.{key}", getattr(self, key), getattr(self, key) >= 0, "must not be negative")
        _require("decision.min_gain", self.min_gain, self.min_gain > 0, "must be positive")


@dataclass(kw_only=True)
class SliceConfig:
    """A part of the old held-out text, such as a language, a source or a decade, whose loss has a limit of its own: in
    the mean over a distribution it could vanish."""

    sources: str
    """Which sources, as a shell writes it: ``cs-*``, ``archive/199?-*``, or a name."""
    data: str | None = None
    """Distribution whose sources are meant; null is all of them."""
    tolerance: float | None = None
    """As ``gate.tolerance``, which null stands for."""


@dataclass(kw_only=True)
class GateConfig:
    """Limits that a candidate must hold to become the champion."""

    min_gain: float = 0.01
    """Least gain on the new distribution with confidence, in nats per token."""
    tolerance: float = 0.01
    """Largest loss increase of an old distribution against the champion, in nats per token; three times as much against
    its best version ever."""
    level: float = 0.05
    """Chance that a check passes what it should not. It is not divided by the number of checks, since a candidate must
    pass all of them."""
    resamples: int = 2000
    """Bootstrap samples of the sources; at least ``20 / level``, so that 20 lie beyond a bound."""
    max_leak: float = 0.5
    """Largest router leak of an old distribution: share of its tokens routed to experts added after it was learned."""
    slices: dict[str, SliceConfig] = field(default_factory=dict)
    """Parts of the old text with limits of their own, by names that the gate calls them by."""

    def __post_init__(self) -> None:
        require_bounded(self, "gate.")
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
        for name, part in self.slices.items():
            require_name(name, "gate.slices")
            if not part.sources:
                raise ConfigError(f"gate.slices.{name}.sources must be a pattern, such as 'cs-*'.")
            if part.tolerance is not None:
                key = f"gate.slices.{name}.tolerance"
                _require(key, part.tolerance, part.tolerance >= 0, "must not be negative")


def _require(key: str, value: float, holds: bool, rule: str) -> None:
    """Raise a ConfigError unless a rule holds."""
    # Rules are written so that NaN, which compares false, breaks them all.
    if not holds:
        raise ConfigError(f"{key}={value} {rule}.")
