"""Settings of growth: experts and tokens that a stage adds, and how they are initialized. Torch-free."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from lifelong_moe.config.routing.bounds import require_bounded
from lifelong_moe.errors import ConfigError


class ExpertInit(StrEnum):
    """How a new expert's weights are initialized."""

    copy = "copy"
    random = "random"
    upcycle = "upcycle"


class FrozenWeights(StrEnum):
    """How frozen matrices are held in memory while a stage trains."""

    full = "full"
    half = "half"
    int8 = "int8"


class RouterInit(StrEnum):
    """How a new expert's router row is initialized."""

    random = "random"
    copy = "copy"
    centroid = "centroid"


@dataclass(kw_only=True)
class GrowConfig:
    """Growth at the start of a stage, from the second stage on."""

    experts: int = 2
    """New experts per layer. 0 adds none and freezes none: the stage trains the existing experts on."""
    init: ExpertInit = ExpertInit.copy
    """Initial weights of the new experts. ``copy``: those of the experts that the new data uses most (of the newest
    generation, if ``routing.bundles`` is set), plus noise. ``upcycle``: exact copies of a dense model's only expert,
    which leave its outputs unchanged; as published with ``router=random``, ``old_lr_scale=1`` and ``trunk.train=full``,
    where all parameters train. ``random``: as in the first stage."""
    rank: int = 0
    """Rank of low-rank experts: each is an older expert, chosen as by ``init=copy``, which stays frozen and is stored
    once, and a change of this rank of each of its matrices, zero at first. Where the chosen expert has changes of the
    same rank itself, the new one begins with copies of these. 0 adds whole experts."""
    noise: float = 0.01
    """``init=copy``: standard deviation of the noise, relative to that of the copied matrix."""
    router: RouterInit = RouterInit.centroid
    """Initial router rows of the new experts: ``centroid`` (FAISS k-means of the new data's hidden states at the layer,
    scaled to the old rows' length), ``random``, or ``copy`` of the copied expert's row. Clustered routers always use
    centroids."""
    sample_tokens: int = 20_000
    """Tokens of the new data from which expert usage and hidden states are measured."""
    layers: list[int] | None = None
    """Layers that get the new experts, counted from 0 and in ascending order. Null means all."""
    frozen_weights: FrozenWeights = FrozenWeights.full
    """Precision of frozen matrices in memory while the stage trains: that of ``trainer.precision`` (``full``); 16 bits
    where that loses nothing, as for a checkpoint in bfloat16 or float16 (``half``), which changes no result; or 8 bits
    with a scale per row (``int8``), which takes a quarter of the memory. The stored weights do not change."""
    old_lr_scale: float = 0.0
    """Learning-rate factor of the old experts and their router rows, 0 to 1; 0 freezes them for good."""
    old_until: float = 1.0
    """With ``old_lr_scale`` above 0: fraction of the stage's steps after which the old experts stop training."""
    min_share: float = 0.01
    """Warn if a new expert gets less than this fraction of the new data's assignments at the end of its stage."""

    def __post_init__(self) -> None:
        require_bounded(self, "grow.")
        if self.experts < 0:
            raise ConfigError(f"grow.experts={self.experts} must not be negative.")
        if self.rank < 0:
            raise ConfigError(f"grow.rank={self.rank} must not be negative.")
        if self.rank and (self.init != ExpertInit.copy or not self.freezes):
            raise ConfigError(
                f"grow.rank={self.rank} changes older experts, which stay as they are: set grow.init=copy and "
                f"grow.old_lr_scale=0."
            )
        if self.noise < 0:
            raise ConfigError(f"grow.noise={self.noise} must not be negative.")
        if self.sample_tokens < 1:
            raise ConfigError(f"grow.sample_tokens={self.sample_tokens} must be positive.")
        for key in ("old_lr_scale", "old_until"):
            if not 0.0 <= getattr(self, key) <= 1.0:
                raise ConfigError(f"grow.{key}={getattr(self, key)} must lie in [0, 1].")
        # One way to write a set of layers, so that equal work has equal keys.
        if self.layers is not None and (not self.layers or sorted(set(self.layers)) != self.layers):
            raise ConfigError(f"grow.layers={self.layers} must name layers in ascending order, each once.")

    def effective(self, *, has_rows: bool) -> GrowConfig:
        """A copy with every key that has no effect at its default: equal work, equal keys.

        Args:
            has_rows: Whether routers have rows to initialize.
        """
        # `min_share` has none either, but its warning needs the value: `stage_key` leaves it out.
        used = {
            "noise": self.init == ExpertInit.copy and not self.rank,
            "router": has_rows,
            "old_until": not self.freezes,
        }
        defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{key: defaults[key] for key, is_used in used.items() if not is_used})

    def to_json(self) -> dict[str, object]:
        """As plain JSON data; without the rank of whole experts, which earlier versions did not write."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value or key != "rank"}

    @property
    def freezes(self) -> bool:
        """Whether old experts and router rows are frozen for good."""
        return self.old_lr_scale == 0


@dataclass(kw_only=True)
class VocabularyConfig:
    """Tokens that a stage adds to the vocabulary, for text that its parent's tokenizer cuts finely."""

    add: int = 0
    """New tokens: merges that byte-pair encoding goes on to learn from the stage's training text, after all that the
    tokenizer has; fewer where no pair of tokens comes twice. They belong to the stage's generation, whose text alone is
    read with them. 0 adds none. Needs ``grow.experts`` above 0 and ``routing.bundles=label`` (or
    ``routing.mode=label``)."""

    def __post_init__(self) -> None:
        require_bounded(self, "vocabulary.")
        if self.add < 0:
            raise ConfigError(f"vocabulary.add={self.add} must not be negative.")
