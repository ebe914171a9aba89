"""Settings of a run and of its stages, composed of the sections in this room. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from lifelong_moe.config.data import BaseConfig, SourceConfig, TextMixture, TokenizerConfig
from lifelong_moe.config.evaluation import EvaluateConfig
from lifelong_moe.config.growth import GrowConfig, VocabularyConfig
from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.names import NAME
from lifelong_moe.config.retention import DistillConfig, PenaltyConfig, ReplayConfig, ReviewConfig, TrunkConfig
from lifelong_moe.config.routing.base import RoutingConfig
from lifelong_moe.config.routing.bounds import require_bounded
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
    """Whether a stage trains on plain text or on answers to prompts."""

    pretrain = "pretrain"
    finetune = "finetune"


@dataclass(kw_only=True)
class StageConfig:
    """One training episode on one distribution or a mixture; ``stage_defaults`` are merged under each."""

    data: Any
    """Distribution to train on, a key of ``distributions``; or a mixture of several with their weights, in tokens of
    the stage's new text: ``{web: 0.7, code: 0.2, papers: 0.1}``. See docs/usage.md#mixtures."""
    max_epochs: float | None = None
    """Most passes over the text of any distribution that the stage learns; more are refused before training. Null: a
    text that is too short for its share is repeated as often as it takes."""
    kind: StageKind = StageKind.pretrain
    """``pretrain`` on text, or ``finetune`` on prompts with answers, where only answers are scored and no experts are
    added."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Fine-tuning, if ``kind: finetune``."""
    name: str | None = None
    """Name of the stage. Null: that of its distribution, numbered if it is taken."""
    tokens: int = 500_000
    """Training tokens, including replayed ones and the padding of short blocks."""
    grow: GrowConfig = field(default_factory=GrowConfig)
    """Growth, from the second stage on."""
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    """Tokens that the stage adds, where it continues a model."""
    continues: str | None = None
    """Name of an earlier stage whose generation (experts, router rows, trunk deltas) alone trains on, for more text of
    a known domain; no experts are added then. Null: none."""
    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    """Training of the trunk, from the second stage on."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Distillation from the previous stage's model, from the second stage on."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """Replay of earlier stages' text, from the second stage on."""
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    """Penalty on the distance to the previous stage's weights, from the second stage on."""
    average: float = 0.0
    """Share of the previous stage's weights in an average with the trained ones that is taken at the end of the stage
    (WiSE-FT, arXiv:2109.01903), from the second stage on; 0 turns it off. What the stage adds has none."""
    review: ReviewConfig = field(default_factory=ReviewConfig)
    """A last phase for the router alone, from the second stage on."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""

    def __post_init__(self) -> None:
        require_bounded(self, "")
        # YAML reads a name such as 2024 as a number.
        self.data = self.data if isinstance(self.data, dict) else TextMixture.as_written(self.data).names[0]
        self.mixture  # noqa: B018 - for its errors
        if self.max_epochs is not None and not self.max_epochs > 0:
            raise ConfigError(f"max_epochs={self.max_epochs} must be above 0.")
        if self.tokens < 1:
            raise ConfigError(f"tokens={self.tokens} must be positive.")
        # At 1 nothing of the training would be left. Written so that NaN is rejected as well.
        if not 0.0 <= self.average < 1.0:
            raise ConfigError(f"average={self.average} must lie in [0, 1).")
        if self.name is not None and not NAME.fullmatch(self.name):
            raise ConfigError(f"name={self.name} may hold letters, digits, '_', '-' and '.' only.")

    @property
    def mixture(self) -> TextMixture:
        """The distributions that it learns, with their shares."""
        return TextMixture.as_written(self.data)

    @property
    def learns(self) -> tuple[str, ...]:
        """The distributions that it learns, that with the largest share first."""
        return self.mixture.names


@dataclass(kw_only=True)
class PublishedConfig:
    """The published system of which the run is a small version; ``plan`` counts its parameters. It trains nothing."""

    source: str
    """Source of the figures, such as a paper."""
    total: float
    """Parameters in billions, as published."""
    active: float | None = None
    """Parameters in billions that a token uses, as published. Null: not published."""
    vocab_size: int
    """Number of entries of the published tokenizer."""
    model: dict[str, Any] = field(default_factory=dict)
    """Keys of ``model`` whose values differ from the run's."""
    routing: dict[str, Any] = field(default_factory=dict)
    """Keys of ``routing`` whose values differ from the run's."""
    attention: float | None = None
    """Parameters in billions of the published attention, if it is of another kind than ours; counted in place of it.
    Null: of our kind."""


@dataclass(kw_only=True)
class RunConfig:
    """A run: the stream of distributions, and how one model learns all of them."""

    run: str
    """Name of the run; its results are under ``mlruns/runs/<run>/``."""
    method: Method = Method.lifelong
    """``lifelong`` uses every section of a stage. ``sequential`` trains the same model on each distribution in turn;
    ``static_moe`` does so with all experts from the start; ``replay``, ``l2``, ``ewc`` and ``lwf`` (distillation on new
    text) add one mechanism to ``sequential``. ``joint`` trains on all distributions at once. ``unrestrained`` is
    ``sequential``, plus a model from scratch for each distribution, for comparison."""
    seed: int = 0
    """Seed of initialization, sample order and clustering."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer."""
    distributions: dict[str, SourceConfig]
    """Every distribution to train on or to evaluate, by name."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The transformer's shape."""
    base: BaseConfig = field(default_factory=BaseConfig)
    """The checkpoint that it begins with, as ``model.from`` found it."""
    # `load.py` takes the dataclass of `routing.mode` in place of this default's.
    routing: RoutingConfig = field(default_factory=LearnedConfig)
    """How tokens reach experts."""
    stages: list[StageConfig]
    """The stream, in order."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Held-out measurement."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Arguments of Lightning's Trainer."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Step checkpoints."""
    frozen: FrozenConfig = field(default_factory=FrozenConfig)
    """Frozen weights on an accelerator."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    published: PublishedConfig | None = None
    """Size of the published system that a preset follows; trains nothing. Null: none."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.run):
            raise ConfigError(f"run={self.run} may hold letters, digits, '_', '-' and '.' only.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} must lie between 0 and 2**32 - 1.")
        if not self.stages:
            raise ConfigError("stages is empty; a run needs at least one, such as stages: [{data: NAME}].")
        # They become parts of metrics' names, and the names of stages that have none.
        for name in self.distributions:
            if not NAME.fullmatch(name):
                raise ConfigError(f"distributions.{name} may hold letters, digits, '_', '-' and '.' only.")
        self._name_stages()

    def continues(self, i: int) -> bool:
        """Whether the ``i``-th stage continues a model: that of the stage before it, or a checkpoint."""
        return i > 0 or self.base.is_given

    def generations(self, stages: int) -> list[str]:
        """Names of those of the first so many stages that have a generation of experts, oldest first."""
        # The first stage has one without growth, unless a checkpoint has it.
        kept = enumerate(self.stages[:stages])
        return [str(s.name) for i, s in kept if not self.continues(i) or (s.grow.experts and not s.continues)]

    def _name_stages(self) -> None:
        taken: set[str] = set()
        for i, stage in enumerate(self.stages):
            if stage.name is None:
                own = stage.mixture.name
                # Fewer earlier stages than candidates, so one of these is free.
                candidates = (own if n == 1 else f"{own}-{n}" for n in range(1, len(self.stages) + 1))
                stage.name = next(name for name in candidates if name not in taken)
            elif stage.name in taken:
                raise ConfigError(f"stages[{i}].name={stage.name} is taken by an earlier stage.")
            taken.add(stage.name)

    @property
    def evaluated(self) -> list[str]:
        """Distributions measured after each stage: the stages', in order of first use, then ``evaluate.also``."""
        # Not a set: several stages may share a distribution, and reports keep this order.
        return list(dict.fromkeys(self.trained + self.evaluate.also))

    @property
    def trained(self) -> list[str]:
        """Distributions that the stages learn, in order; one that several learn is named as often."""
        return [name for stage in self.stages for name in stage.learns]
