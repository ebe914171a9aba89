"""How many experts a stage adds and how they begin. Torch-free."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from lifelong_moe.errors import ConfigError


class ExpertInit(StrEnum):
    """How a new expert's weights begin."""

    copy = "copy"
    random = "random"
    upcycle = "upcycle"


class FrozenWeights(StrEnum):
    """How frozen matrices are held while a stage trains."""

    full = "full"
    int8 = "int8"


class RouterInit(StrEnum):
    """How a new expert's router row begins."""

    random = "random"
    copy = "copy"
    centroid = "centroid"


@dataclass(kw_only=True)
class GrowConfig:
    """Growth at the start of a stage; from the second stage on."""

    experts: int = 2
    """New experts per layer; 0 adds none, and then nothing is frozen either."""
    init: ExpertInit = ExpertInit.copy
    """``copy`` the experts that the new data uses most (with bundles, those of the newest one), with noise;
    ``upcycle``, exact copies of a dense model's only expert, which change nothing yet (as published with
    ``router=random``, ``old_lr_scale=1`` and ``trunk.train=full``: all train); or ``random``."""
    noise: float = 0.01
    """Standard deviation of the noise on a copy, relative to the copied matrix's own deviation."""
    router: RouterInit = RouterInit.centroid
    """New router rows: ``centroid`` (FAISS k-means of the new data's hidden states at that layer, scaled to the old
    rows' length), ``random``, or ``copy`` of the copied expert's row. Clustered routers always use centroids."""
    sample_tokens: int = 20_000
    """Tokens of the new data on which expert usage and hidden states are measured."""
    layers: list[int] | None = None
    """Layers that get the new experts, counted from 0; None means all."""
    frozen_weights: FrozenWeights = FrozenWeights.full
    """Hold what is frozen as stored (``full``), or while the stage trains in 8 bits with a scale a row (``int8``): a
    quarter of the memory. What is stored stays as it is."""
    old_lr_scale: float = 0.0
    """Learning-rate factor of the old experts and their router rows; 0 freezes them for good."""
    old_until: float = 1.0
    """With ``old_lr_scale`` above 0: share of the stage's steps after which the old experts stop."""
    min_share: float = 0.01
    """Warn when a new expert ends its stage with less than this share of the new data's assignments."""

    def __post_init__(self) -> None:
        if self.experts < 0:
            raise ConfigError(f"grow.experts={self.experts} must not be negative.")
        if self.noise < 0:
            raise ConfigError(f"grow.noise={self.noise} must not be negative.")
        if self.sample_tokens < 1:
            raise ConfigError(f"grow.sample_tokens={self.sample_tokens} must be positive.")
        for key in ("old_lr_scale", "old_until"):
            if not 0.0 <= getattr(self, key) <= 1.0:
                raise ConfigError(f"grow.{key}={getattr(self, key)} must lie in [0, 1].")
        if self.layers is not None and (not self.layers or sorted(set(self.layers)) != self.layers):
            raise ConfigError(f"grow.layers={self.layers} must name layers in ascending order, each once.")

    def effective(self, *, has_rows: bool) -> GrowConfig:
        """The same, with every key that changes nothing at its default: equal work, equal keys.

        Args:
            has_rows: Whether routers have rows, which begin somehow.
        """
        used = {
            "noise": self.init == ExpertInit.copy,
            "router": has_rows,
            "old_until": not self.freezes,
        }
        defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{key: defaults[key] for key, is_used in used.items() if not is_used})

    @property
    def freezes(self) -> bool:
        """Whether old experts and router rows are frozen for good."""
        return self.old_lr_scale == 0
