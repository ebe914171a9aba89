"""The dataclasses of a run and its stages, composed of the packages' sections. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from lifelong_moe.config.data import SourceConfig, TokenizerConfig
from lifelong_moe.config.evaluation import EvaluateConfig
from lifelong_moe.config.growth import GrowConfig
from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.names import NAME
from lifelong_moe.config.retention import DistillConfig, PenaltyConfig, ReplayConfig, ReviewConfig, TrunkConfig
from lifelong_moe.config.routing.base import RoutingConfig
from lifelong_moe.config.routing.topk import LearnedConfig
from lifelong_moe.config.tracking import TrackingConfig
from lifelong_moe.config.training import CheckpointConfig, FinetuneConfig, FrozenConfig, OptimConfig, TrainerConfig
from lifelong_moe.errors import ConfigError


class Method(StrEnum):
    """How the model learns from the stream."""

    lifelong = "lifelong"
    sequential = "sequential"
    static_moe = "static_moe"
    replay = "replay"
    l2 = "l2"
    ewc = "ewc"
    lwf = "lwf"
    joint = "joint"
    unrestrained = "unrestrained"


class StageKind(StrEnum):
    """What a stage does with its text."""

    pretrain = "pretrain"
    finetune = "finetune"


@dataclass(kw_only=True)
class StageConfig:
    """One training episode on one distribution; ``stage_defaults`` are merged under each."""

    data: str
    """The distribution to learn, a key of ``distributions``."""
    kind: StageKind = StageKind.pretrain
    """``pretrain`` on text, or ``finetune`` on prompts with answers, of which the answers alone are learned; nothing
    grows then."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """How ``kind: finetune`` trains."""
    name: str | None = None
    """The stage's name; the distribution's by default, numbered if that is taken."""
    tokens: int = 500_000
    """Training tokens, replayed ones and the padding of short blocks included."""
    grow: GrowConfig = field(default_factory=GrowConfig)
    """Growth, from the second stage on."""
    continues: str | None = None
    """Name of an earlier stage whose experts, router rows and trunk deltas alone train on, for text of a kind that
    they know; nothing grows then."""
    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    """Training of the shared parts, from the second stage on."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Distillation from the previous stage's model, from the second stage on."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """Replay of earlier stages' text, from the second stage on."""
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    """A pull to the previous stage's weights, from the second stage on."""
    review: ReviewConfig = field(default_factory=ReviewConfig)
    """A last phase for the router alone, from the second stage on."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"tokens={self.tokens} must be positive.")
        if self.name is not None and not NAME.fullmatch(self.name):
            raise ConfigError(f"name={self.name} may hold letters, digits, '_', '-' and '.' only.")


@dataclass(kw_only=True)
class PublishedConfig:
    """What a system's authors built, of which the run is a small version; ``plan`` counts its parameters."""

    source: str
    """Where the figures are from."""
    total: float
    """Parameters, in billions, as published."""
    active: float | None = None
    """Those that a token uses, in billions, as published."""
    vocab_size: int
    """Entries of the tokenizer."""
    model: dict[str, Any] = field(default_factory=dict)
    """The model's keys where they differ from the run's."""
    routing: dict[str, Any] = field(default_factory=dict)
    """Routing's keys where they differ from the run's."""
    attention: float | None = None
    """Parameters of the authors' attention in billions, where it is of another kind than ours; counted in its place."""


@dataclass(kw_only=True)
class RunConfig:
    """A whole run: the stream of distributions and how one model learns them all."""

    run: str
    """Name of the run; its results are under ``mlruns/runs/<run>/``."""
    method: Method = Method.lifelong
    """``lifelong`` takes every section of a stage; ``sequential`` just trains on; ``static_moe`` does so with all
    experts from the start; ``replay``, ``l2``, ``ewc`` and ``lwf`` (distillation on new text) add one mechanism;
    ``joint`` trains on everything at once; ``unrestrained`` is ``sequential`` with each distribution from scratch
    beside it."""
    seed: int = 0
    """Seed of initialization, sample order and clustering."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Text to tokens."""
    distributions: dict[str, SourceConfig]
    """Every distribution that is trained or evaluated, by name."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The transformer's shape."""
    routing: RoutingConfig = field(default_factory=LearnedConfig)
    """How tokens reach experts."""
    stages: list[StageConfig]
    """The stream, in order."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Held-out measurement."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Lightning's own words."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Step checkpoints."""
    frozen: FrozenConfig = field(default_factory=FrozenConfig)
    """Frozen weights on an accelerator."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    published: PublishedConfig | None = None
    """The size that a preset's authors built; trains nothing."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.run):
            raise ConfigError(f"run={self.run} may hold letters, digits, '_', '-' and '.' only.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} must lie between 0 and 2**32 - 1.")
        if not self.stages:
            raise ConfigError("stages is empty; a run needs at least one, such as stages: [{data: NAME}].")
        for name in self.distributions:
            if not NAME.fullmatch(name):
                raise ConfigError(f"distributions.{name} may hold letters, digits, '_', '-' and '.' only.")
        self._name_stages()

    def _name_stages(self) -> None:
        taken: set[str] = set()
        for i, stage in enumerate(self.stages):
            if stage.name is None:
                candidates = (stage.data if n == 1 else f"{stage.data}-{n}" for n in range(1, len(self.stages) + 1))
                stage.name = next(name for name in candidates if name not in taken)
            elif stage.name in taken:
                raise ConfigError(f"stages[{i}].name={stage.name} is taken by an earlier stage.")
            taken.add(stage.name)

    @property
    def evaluated(self) -> list[str]:
        """Distributions measured after each stage: the stream's, in order of first use, then ``evaluate.also``."""
        return list(dict.fromkeys([stage.data for stage in self.stages] + self.evaluate.also))
