"""The run configuration: the packages' sections composed, read from YAML and overrides. Torch-free.

One path in: YAML, then ``key=value`` overrides, then each section merged over its dataclass by OmegaConf. Below
this module only plain dataclasses travel.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import io
import math
import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lifelong_moe.data.config import SourceConfig, TokenizerConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.evaluation.config import EvaluateConfig
from lifelong_moe.growth.config import ExpertInit, FrozenWeights, GrowConfig
from lifelong_moe.model.config import ExpertsImplementation, ModelConfig
from lifelong_moe.retention.config import (
    DistillConfig,
    PenaltyConfig,
    PenaltyKind,
    ReplayConfig,
    ReplaySource,
    ReviewConfig,
    TrunkConfig,
    TrunkTraining,
)
from lifelong_moe.retention.refusals import refuse_idle_method, refuse_moving_trunk, refuse_unfit_mode, require_text
from lifelong_moe.routing.config import DEFAULTS, FOR_ENCODERS, Bundles, Features, Level, RoutingConfig
from lifelong_moe.routing.refusals import refuse_idle_keys, refuse_lone_choices
from lifelong_moe.routing.switching import leave_behind
from lifelong_moe.tracking.config import TrackingConfig
from lifelong_moe.training.config import (
    CheckpointConfig,
    FinetuneConfig,
    FrozenConfig,
    Offload,
    OptimConfig,
    TrainerConfig,
)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
MAX_CONFIG_BYTES = 1 << 16
MAX_YAML_DEPTH = 32
"""Deepest nesting of a configuration; ours has five levels."""
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]*(?=@)|(?<=\?).*")
"""What may be secret in a URL: user and password, and the query."""
SCRATCH = ".scratch"
"""Ends the name of a model from scratch beside a stage."""


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
    routing: RoutingConfig = field(default_factory=RoutingConfig)
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
        self._check_execution()
        for i, stage in enumerate(self.stages):
            require_known(stage.data, self.distributions, f"stages[{i}].data")
            self._check_batch(i, stage)
            self._check_finetuning(i, stage)
            self._check_experts(i, stage)
            if i and self.method == Method.lifelong:
                require_text(stage.distill, stage.replay, i)
                self._check_student(i, stage)
                self._check_growth(i, stage)
                self._check_review(i, stage)
                self._check_retention(i, stage)
        for i, name in enumerate(self.evaluate.also):
            require_known(name, self.distributions, f"evaluate.also[{i}]")
        first = self.stages[0].data
        if self.tokenizer.train_on not in (None, first):
            raise ConfigError(
                f"tokenizer.train_on={self.tokenizer.train_on} must be the first stage's distribution ({first}): "
                f"a tokenizer that saw later stages leaks the future."
            )
        last_is_dense = self.model.layers - 1 not in self.model.moe_layers
        if self.routing.competitive and (last_is_dense or self.model.shared_experts or self.model.sandwich_norms):
            raise ConfigError(
                "routing.competitive needs experts in the last layer, without shared_experts and sandwich_norms."
            )
        if self.routing.mode in FOR_ENCODERS:
            raise ConfigError(
                f"routing.mode={self.routing.mode} mixes each token with all later ones; it is for encoders, see "
                "lifelong_moe/model/encoder.py."
            )
        if self.routing.leaks and not self.routing.allow_noncausal:
            raise ConfigError(
                f"{self.routing.leaks} lets later tokens change earlier ones, which a decoder must not. Set "
                f"routing.allow_noncausal=true to try it nevertheless."
            )
        bundles = self.routing.bundles
        by_what = "routing.level=document" if bundles == Bundles.none else f"routing.bundles={bundles}"
        if (self.routing.by_document or bundles != Bundles.none) and not self.model.document_mask:
            raise ConfigError(
                f"{by_what} assigns experts a document at a time, so attention must stop at document borders. Set "
                f"model.document_mask=true."
            )
        if self.routing.by_document and self.trainer.precision == "bf16-true":
            raise ConfigError(
                f"{by_what} compares features in float32, which trainer.precision=bf16-true would round. Set "
                f"trainer.precision=bf16-mixed."
            )
        most = max(self.model.most_experts, *(stage.grow.experts for stage in self.stages))
        if self.routing.is_clustered and not self.routing.has_bundles and self.routing.sample_tokens < most:
            raise ConfigError(
                f"routing.sample_tokens={self.routing.sample_tokens} must reach the number of experts that a stage "
                f"begins ({most})."
            )
        dense = self.model.most_experts == 1 and self.routing.mode == "learned" and not self.routing.has_bundles
        if self.routing.top_k > self.model.fewest_experts and not dense:
            raise ConfigError(f"routing.top_k={self.routing.top_k} must not exceed model.experts={self.model.experts}.")
        self._name_stages()
        for i, stage in enumerate(self.stages):
            if stage.continues is not None:
                self._check_continued(i, stage.continues)
        if self.method == Method.unrestrained:
            self._check_scratch()

    def _check_batch(self, i: int, stage: StageConfig) -> None:
        context, tokens = self.model.context, stage.optim.batch_tokens
        if tokens % context:
            raise ConfigError(
                f"stages[{i}].optim.batch_tokens={tokens} must be a multiple of model.context={context}; "
                f"the nearest is {max(1, round(tokens / context)) * context}."
            )
        sequences, accumulate = tokens // context, self.trainer.accumulate_grad_batches
        if sequences % accumulate:
            raise ConfigError(
                f"trainer.accumulate_grad_batches={accumulate} must divide the {sequences} sequences of a step "
                f"(stages[{i}].optim.batch_tokens / model.context); valid are "
                f"{', '.join(str(d) for d in range(1, sequences + 1) if sequences % d == 0)}."
            )
        micro, processes = sequences // accumulate, self.trainer.processes
        if micro % processes:
            raise ConfigError(
                f"trainer.devices={processes} must divide the {micro} sequences of a micro-batch "
                f"(stages[{i}].optim.batch_tokens / model.context / trainer.accumulate_grad_batches); valid are "
                f"{', '.join(str(d) for d in range(1, micro + 1) if micro % d == 0)}."
            )
        if max(1, stage.grow.sample_tokens // context) * context < stage.grow.experts:  # at least one block is sampled
            raise ConfigError(
                f"stages[{i}].grow.sample_tokens={stage.grow.sample_tokens} must reach the number of new experts "
                f"({stage.grow.experts})."
            )
        if stage.tokens < tokens:
            raise ConfigError(f"stages[{i}].tokens={stage.tokens} is less than one step of {tokens} tokens.")
        if i == 0 and _clusters_hidden(self.routing) and stage.tokens < 2 * tokens:
            raise ConfigError(
                f"stages[0].tokens={stage.tokens} is less than two steps of {tokens} tokens; routing.features=hidden "
                f"needs one before clusters are fitted and one after."
            )

    def _check_finetuning(self, i: int, stage: StageConfig) -> None:
        """Answers are learned after text, and in one process where the best weights are kept."""
        answers = self.distributions[stage.data].answer_field is not None
        if stage.kind == StageKind.pretrain:
            if answers:
                raise ConfigError(
                    f"stages[{i}].data={stage.data} has prompts and answers; set stages[{i}].kind=finetune."
                )
            return
        if not answers:
            raise ConfigError(
                f"stages[{i}].kind=finetune needs prompts and answers: set distributions.{stage.data}.answer_field."
            )
        if i == 0:
            raise ConfigError("stages[0].kind=finetune: there is no model yet to fine-tune.")
        if stage.finetune.patience is not None and self.trainer.processes > 1:
            raise ConfigError(f"stages[{i}].finetune.patience needs trainer.devices=1.")

    def _check_experts(self, i: int, stage: StageConfig) -> None:
        """Clusters, labels and bundles own experts; each needs ``top_k`` of them."""
        experts = self.model.fewest_experts if i == 0 else stage.grow.experts
        by_group = self.routing.by_label or self.routing.by_document
        grows = i == 0 or self.method == Method.lifelong
        if not by_group or not grows or experts == 0:
            return
        groups = 1 if self.routing.has_bundles else (self.routing.clusters or 1)
        if experts < groups * self.routing.top_k:
            key = "model.experts" if i == 0 else f"stages[{i}].grow.experts"
            raise ConfigError(
                f"{key}={experts} is too few: {groups} group(s) of routing.top_k={self.routing.top_k} experts each "
                f"need {groups * self.routing.top_k}."
            )

    def _check_execution(self) -> None:
        """What cannot be computed together, or at all."""
        if self.trainer.experts_implementation == ExpertsImplementation.grouped_mm:
            for key in ("width", "expert_width"):
                if getattr(self.model, key) % 8:
                    raise ConfigError(
                        f"trainer.experts_implementation=grouped_mm needs model.{key} in multiples of 8, not "
                        f"{getattr(self.model, key)}. Set trainer.experts_implementation=auto."
                    )
            if self.trainer.compile and self.trainer.precision == "32-true":
                raise ConfigError(
                    "trainer.experts_implementation=grouped_mm compiles in bfloat16 only. Set trainer.compile=false or "
                    "trainer.precision=bf16-mixed."
                )
        if self.frozen.offload == Offload.cpu:
            for key in ("activation_checkpointing", "compile"):
                if getattr(self.trainer, key):
                    raise ConfigError(
                        f"frozen.offload=cpu with trainer.{key}=true: a layer would be computed again without its "
                        f"weights. Set one of them off."
                    )

    def _check_growth(self, i: int, stage: StageConfig) -> None:
        """Deltas and partly grown models need a router that can tell them apart."""
        grow, deltas = stage.grow, stage.trunk.train == TrunkTraining.deltas
        if grow.frozen_weights == FrozenWeights.int8 and self.frozen.offload == Offload.cpu:
            raise ConfigError(
                f"stages[{i}].grow.frozen_weights=int8 with frozen.offload=cpu: weights in 8 bits are made whole where "
                f"the backward pass needs them. Set frozen.offload=none or grow.frozen_weights=full."
            )
        if grow.frozen_weights == FrozenWeights.int8 and self.trainer.compile:
            raise ConfigError(
                f"stages[{i}].grow.frozen_weights=int8 with trainer.compile=true: what makes weights whole is not "
                f"compiled. Set trainer.compile=false or grow.frozen_weights=full."
            )
        if grow.init == ExpertInit.upcycle and grow.experts:
            self._check_upcycling(i, stage)
        if grow.experts and not stage.continues and (fixed := self.routing.is_fixed):
            raise ConfigError(f"{fixed} has no place for new experts: set stages[{i}].grow.experts=0.")
        if deltas and (not (grow.experts or stage.continues) or not self.routing.has_bundles):
            raise ConfigError(
                f"stages[{i}].trunk.train=deltas changes the trunk for the tokens of one bundle. Set "
                f"routing.bundles=cluster (or label, or routing.mode=label) and stages[{i}].grow.experts above 0."
            )
        if deltas and self.model.tie_embeddings:
            raise ConfigError(f"stages[{i}].trunk.train=deltas needs model.tie_embeddings=false.")
        if grow.layers is None:
            return
        if not 0 <= min(grow.layers) <= max(grow.layers) < self.model.layers:
            raise ConfigError(f"stages[{i}].grow.layers={grow.layers} must lie in 0 to {self.model.layers - 1}.")
        if dense := sorted(set(grow.layers) - set(self.model.moe_layers)):
            raise ConfigError(f"stages[{i}].grow.layers={grow.layers}: layer {dense[0]} is dense and has no experts.")
        if not self.routing.has_rows or self.routing.has_bundles:
            raise ConfigError(
                f"stages[{i}].grow.layers needs a trained router and routing.bundles=none; every layer must grow "
                f"otherwise."
            )

    def _check_student(self, i: int, stage: StageConfig) -> None:
        """A student has layers that can be told apart from those of its teacher by number alone."""
        layers, routing = stage.distill.student, self.routing
        if layers is None:
            return
        if layers[0] < 0 or layers[-1] >= self.model.layers:
            raise ConfigError(f"stages[{i}].distill.student={layers} must lie in 0 to {self.model.layers - 1}.")
        if i + 1 < len(self.stages):
            raise ConfigError(f"stages[{i}].distill.student is for the last stage: later ones have all layers.")
        if len(self.model.moe_layers) < self.model.layers or not routing.has_rows or routing.has_bundles:
            raise ConfigError(
                f"stages[{i}].distill.student needs a trained router without bundles, and a mixture in every layer."
            )
        if not stage.distill.weight or stage.kind == StageKind.finetune:
            raise ConfigError(f"stages[{i}].distill.student needs distill.weight above 0 and kind=pretrain.")

    def _check_upcycling(self, i: int, stage: StageConfig) -> None:
        """The copies change nothing if the model before is dense and a token's gates sum to 1."""
        routing, before = self.routing, [s.grow.experts for s in self.stages[1:i]]
        if self.model.most_experts > 1 or any(before):
            raise ConfigError(
                f"stages[{i}].grow.init=upcycle copies a dense model: set model.experts=1, and no growth before it."
            )
        plain = routing.mode == "learned" and not routing.has_bundles and routing.capacity is None
        if not (plain and routing.renormalize and routing.gate_scale == 1 and routing.top_k > 1):
            raise ConfigError(
                f"stages[{i}].grow.init=upcycle needs gates that sum to 1: routing.mode=learned with renormalize=true, "
                f"gate_scale=1 and top_k above 1, without capacity and bundles."
            )

    def _check_continued(self, i: int, name: str) -> None:
        """Only a stage that bore experts can be continued."""
        born = [s.name for j, s in enumerate(self.stages[:i]) if j == 0 or (s.grow.experts and not s.continues)]
        require_known(name, born, f"stages[{i}].continues")

    def _check_review(self, i: int, stage: StageConfig) -> None:
        """A review trains this stage's router rows, in whole steps, and leaves some to the stage itself."""
        if not stage.review.fraction:
            return
        if self.routing.mode != "learned" or self.routing.has_bundles or not stage.grow.experts or stage.continues:
            raise ConfigError(
                f"stages[{i}].review.fraction={stage.review.fraction} trains new router rows on old text, too. Set "
                f"routing.mode=learned, routing.bundles=none and stages[{i}].grow.experts above 0, or "
                f"review.fraction=0."
            )
        steps = stage.tokens // stage.optim.batch_tokens
        if not 1 <= round(steps * stage.review.fraction) < steps:
            raise ConfigError(
                f"stages[{i}].review.fraction={stage.review.fraction} of {steps} steps must be at least one step and "
                f"leave one."
            )

    def _check_retention(self, i: int, stage: StageConfig) -> None:
        """A penalty needs old weights that train; generated text has no label."""
        trunk_trains = stage.trunk.train in (TrunkTraining.full, TrunkTraining.gentle)
        if stage.penalty.kind != PenaltyKind.none and not trunk_trains and stage.grow.experts and stage.grow.freezes:
            raise ConfigError(
                f"stages[{i}].penalty.kind={stage.penalty.kind} holds old weights that train, and none does: the trunk "
                f"is {stage.trunk.train} and old experts are frozen. Set penalty.kind=none."
            )
        measures = stage.penalty.kind == PenaltyKind.ewc and stage.penalty.factor > 0
        uses_old_text = stage.replay.fraction or stage.review.fraction or measures
        if stage.replay.source == ReplaySource.generated and uses_old_text and self.routing.by_label:
            raise ConfigError(
                f"stages[{i}].replay.source=generated: text that a model wrote has no label, which this routing needs. "
                f"Set replay.source=stored."
            )

    def _name_stages(self) -> None:
        taken: set[str] = set()
        for i, stage in enumerate(self.stages):
            if stage.name is None:
                candidates = (stage.data if n == 1 else f"{stage.data}-{n}" for n in range(1, len(self.stages) + 1))
                stage.name = next(name for name in candidates if name not in taken)
            elif stage.name in taken:
                raise ConfigError(f"stages[{i}].name={stage.name} is taken by an earlier stage.")
            taken.add(stage.name)

    def _check_scratch(self) -> None:
        """A model from scratch beside the chain has a name of its own."""
        taken = {stage.name for stage in self.stages} | set(self.distributions)
        for i, stage in enumerate(self.stages[1:], start=1):
            name = f"{stage.name}{SCRATCH}"
            if name in taken or not NAME.fullmatch(name):
                problem = "is taken" if name in taken else "is over 64 characters"
                raise ConfigError(
                    f"stages[{i}]: method=unrestrained names the model from scratch beside it {name}, which {problem}; "
                    f"set stages[{i}].name."
                )

    @property
    def evaluated(self) -> list[str]:
        """Distributions measured after each stage: the stream's, in order of first use, then ``evaluate.also``."""
        return list(dict.fromkeys([stage.data for stage in self.stages] + self.evaluate.also))


def _clusters_hidden(routing: RoutingConfig) -> bool:
    return routing.mode == "cluster" and routing.level == Level.token and routing.features == Features.hidden


SECTIONS: dict[str, type] = {
    "tokenizer": TokenizerConfig,
    "model": ModelConfig,
    "routing": RoutingConfig,
    "evaluate": EvaluateConfig,
    "trainer": TrainerConfig,
    "checkpoint": CheckpointConfig,
    "frozen": FrozenConfig,
    "tracking": TrackingConfig,
}
T = TypeVar("T")


def load_config(path: str | Path, overrides: list[str] | None = None) -> tuple[RunConfig, dict[str, Any]]:
    """Read a YAML file, apply ``key=value`` overrides, validate, and build the run's configuration.

    Args:
        path: YAML file.
        overrides: Such as ``seed=1`` or ``stages[1].grow.experts=4``; the value is YAML.

    Returns:
        The configuration, and the same as plain data, which may be logged: interpolations such as ``${oc.env:TOKEN}``
        are left unresolved, and URLs have lost user, password and query.

    Raises:
        ConfigError: One line with the full key or file and line, what was required and what came.
    """
    raw = read_config(path, overrides)
    return build_config(raw), written_config(raw)


def read_config(path: str | Path, overrides: list[str] | None = None) -> DictConfig:
    """Read a YAML file and apply overrides, which may switch the routing's mode; interpolations are unresolved."""
    before = read_yaml(Path(path))
    raw = before.copy()
    for override in overrides or []:
        apply_override(raw, override)
    leave_behind(raw, before, overrides or [])
    return raw


def written_config(raw: DictConfig) -> dict[str, Any]:
    """A configuration as it was written, as plain data that may be logged; see :func:`load_config`."""
    return _without_credentials(OmegaConf.to_container(raw, resolve=False))


def _without_credentials(value: Any) -> Any:
    """Mask what may be secret in every URL within plain data."""
    if isinstance(value, dict):
        return {key: _without_credentials(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_without_credentials(child) for child in value]
    return _CREDENTIALS.sub("***", value) if isinstance(value, str) and "://" in value else value


def build_config(raw: DictConfig, *, is_stored: bool = False) -> RunConfig:
    """Validate plain configuration data and build the dataclasses; see :func:`load_config`.

    Args:
        raw: As from :func:`read_config`.
        is_stored: Whether it is of a run that exists: an earlier version may have let it have what is refused today.
    """
    if is_stored and OmegaConf.select(raw, "routing.capacity") and OmegaConf.select(raw, "routing.balance_scope"):
        raw = raw.copy()  # they may contradict each other; see RoutingConfig.from_json
        del raw.routing.balance_scope
    known = {f.name for f in dataclasses.fields(RunConfig)} | {"stage_defaults"}
    for key in raw:
        require_known(str(key), known, "key")
    if not is_stored:
        refuse_unfit_mode(raw)
    under = {"routing": mode_defaults(raw.get("routing"))}
    values: dict[str, Any] = {
        name: section(cls, raw.get(name), name, under.get(name)) for name, cls in SECTIONS.items()
    }
    sources = _mapping(raw, "distributions")
    names = {str(key): key for key in sources}  # one such as 2024 is a number in YAML
    values["distributions"] = {
        name: section(SourceConfig, sources._get_node(key), f"distributions.{name}") for name, key in names.items()
    }
    values["stages"] = _stages(raw)
    if raw.get("published") is not None:
        values["published"] = section(PublishedConfig, raw.published, "published")
    scalars = section(_Scalars, OmegaConf.masked_copy(raw, ["run", "method", "seed"]), "")
    config = RunConfig(run=scalars.run, method=scalars.method, seed=scalars.seed, **values)
    if not is_stored:
        refuse_lone_choices(config.routing)
        refuse_idle_keys(config.routing)
        refuse_idle_method(config.method, config.routing, config.stages, raw)
        refuse_moving_trunk(config.method, config.routing, config.stages)
    require_finite(config, "")
    return config


def whole_config(raw: DictConfig) -> dict[str, Any]:
    """Everything that a valid configuration says: with all defaults, and ``stage_defaults`` merged under each stage.

    Args:
        raw: As from :func:`read_config`.

    Returns:
        Plain data that may be logged, like that of :func:`written_config`: what refers to a secret still only refers.
    """
    found = _unresolved(_Scalars, OmegaConf.masked_copy(raw, ["run", "method", "seed"]))
    under = {"routing": mode_defaults(raw.get("routing"))}
    found |= {name: _unresolved(cls, raw._get_node(name), under.get(name)) for name, cls in SECTIONS.items()}
    nodes: list[Any] = [raw._get_node(key) for key in ("distributions", "stages", "stage_defaults")]
    sources, stages, defaults = nodes
    found["distributions"] = _each(SourceConfig, sources)
    found["stages"] = _each(StageConfig, stages, None if _refers(defaults) else defaults)
    if raw.get("published") is not None:
        found["published"] = _unresolved(PublishedConfig, raw._get_node("published"))
    return _without_credentials(found)


def _refers(node: Any) -> bool:
    """Whether a node is an interpolation, of which nobody knows what it stands for."""
    return node is not None and bool(node._is_interpolation())


def _each(cls: type, nodes: Any, under: DictConfig | None = None) -> Any:
    """A mapping or list of nodes, each merged over its dataclass."""
    if _refers(nodes):
        return nodes._value()
    if isinstance(nodes, ListConfig):
        return [_unresolved(cls, nodes._get_node(i), under) for i in range(len(nodes))]
    return {str(key): _unresolved(cls, nodes._get_node(key), under) for key in nodes}


def _unresolved(cls: type, node: Any, under: DictConfig | None = None) -> Any:
    """A node merged over its dataclass, as plain data with its interpolations."""
    if _refers(node):
        return node._value()
    parts = [part for part in (_structured(cls), under, node) if part is not None]
    return OmegaConf.to_container(OmegaConf.merge(*parts), resolve=False, enum_to_str=True)


def mode_defaults(routing: Any) -> DictConfig:
    """What ``routing.mode`` sets unless the user does."""
    mode = routing.get("mode") if isinstance(routing, DictConfig) else None
    return OmegaConf.create(DEFAULTS.get(mode, {}) if isinstance(mode, str) else {})


@dataclass(kw_only=True)
class _Scalars:
    run: str
    method: Method = Method.lifelong
    seed: int = 0


def _stages(raw: DictConfig) -> list[StageConfig]:
    stages = raw.get("stages")
    if not isinstance(stages, ListConfig):
        raise ConfigError("stages must be a list, such as stages: [{data: english_docs}, {data: python_code}].")
    defaults = raw.get("stage_defaults") or OmegaConf.create({})
    if not isinstance(defaults, DictConfig):
        raise ConfigError("stage_defaults must be a mapping.")
    with _errors_under("stage_defaults"):
        OmegaConf.merge(_structured(StageConfig), defaults)
    built = []
    for i, stage in enumerate(stages):
        if not isinstance(stage, DictConfig):
            raise ConfigError(f"stages[{i}] must be a mapping with at least data: NAME; got {stage!r}.")
        built.append(section(StageConfig, stage, f"stages[{i}]", under=defaults))
    return built


def _mapping(raw: DictConfig, key: str) -> DictConfig:
    node = raw.get(key)
    if not isinstance(node, DictConfig) or not node:
        raise ConfigError(f"{key} must be a non-empty mapping.")
    return node


_SCHEMAS: dict[type, DictConfig] = {}


def _structured(cls: type) -> DictConfig:
    """A dataclass as OmegaConf sees it, made once; merging copies it."""
    if cls not in _SCHEMAS:
        _SCHEMAS[cls] = OmegaConf.structured(cls)
    return _SCHEMAS[cls]


def section(cls: type[T], node: Any, path: str, under: DictConfig | None = None) -> T:
    """Merge a node over its dataclass and build it; every error carries the full path."""
    if node is None:
        node = OmegaConf.create({})
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{path} must be a mapping; got {node!r}.")
    with _errors_under(path):
        parts = [_structured(cls), *([under] if under else []), node]
        return OmegaConf.to_object(OmegaConf.merge(*parts))  # type: ignore[return-value]


class _errors_under:  # noqa: N801 - a context manager, named like the statement it forms
    """Turn OmegaConf's errors, and ours without a full path, into a one-line ConfigError under ``path``."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OmegaConfBaseException):
            key = getattr(error, "full_key", None) or ""
            missing = isinstance(error, MissingMandatoryValue)
            lines = ["is required."] if missing else str(getattr(error, "msg", None) or error).splitlines()
            extra = re.compile(r"\s*(full_key|object_type|reference_type)")
            text = " ".join(line.strip() for line in lines if not extra.match(line))
            dot = "." if self.path and key and not str(key).startswith("[") else ""
            where = f"{self.path}{dot}{key}" or "config"
            raise ConfigError(f"{where}: {text}") from None
        if isinstance(error, ConfigError):
            text = str(error)
            last = self.path.split(".")[-1]
            if not self.path or text.startswith(f"{last}."):
                raise error
            joint = "." if re.match(r"[a-z_0-9.]+=", text) else ": "
            raise ConfigError(f"{self.path}{joint}{text}") from None


def read_yaml(path: Path) -> DictConfig:
    """Read a YAML file, or a pipe, that holds a mapping; a mistake costs one line with file and line number."""
    path = Path("/dev/stdin") if str(path) == "-" else path
    if path.is_dir() or not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such file.{hint}")
    data = _begins(path) if path.is_file() else _piped(path)
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: over {MAX_CONFIG_BYTES:,} bytes; is this a configuration file?")
    try:
        text = data.decode("utf-8-sig")
        _require_shallow(text)
        loaded = OmegaConf.load(io.StringIO(text))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: invalid UTF-8 at byte {error.start}.") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: {error.reason}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        if mark and "\t" in re.match(r"\s*", text.split("\n")[mark.line])[0]:  # type: ignore[index]
            raise ConfigError(f"{where}: indented with a tab; YAML takes spaces only.") from None
        raise ConfigError(f"{where}: {(getattr(error, 'problem', None) or 'not YAML').rstrip('.')}.") from None
    except (OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0] if str(error) else 'too deeply nested'}") from None
    if not isinstance(loaded, DictConfig) or not loaded:
        raise ConfigError(f"{path}: must hold a mapping such as run: NAME; it is empty or a list.")
    return loaded


def _begins(path: Path) -> bytes:
    """A file's bytes, one more than a configuration may have at most."""
    with path.open("rb") as file:
        return file.read(MAX_CONFIG_BYTES + 1)


@functools.cache
def _piped(path: Path) -> bytes:
    """What comes out of a pipe, which gives it once: the next who asks for it in this process gets the same."""
    return _begins(path)


def _require_shallow(text: str) -> None:
    """Refuse deep nesting before the tree is built: libyaml's composer overflows the stack and kills the process."""
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested over {MAX_YAML_DEPTH} deep", problem_mark=event.start_mark)


def apply_override(raw: DictConfig, override: str) -> None:
    """Set what ``key=value`` says, the value being YAML."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} must have the form key=value.")
    try:
        _require_shallow(value)
        parsed = OmegaConf.from_dotlist([f"value={value}"])._get_node("value")
        OmegaConf.update(raw, key, parsed, force_add=True)
    except (OmegaConfBaseException, yaml.YAMLError, AttributeError, IndexError, TypeError, ValueError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"override {override!r} cannot be applied: {text}") from None


def first_key(override: str) -> str:
    """``stages`` of ``stages[1].tokens=5``."""
    return re.split(r"[.\[=]", override)[0]


def require_known(name: str, known: Any, what: str) -> None:
    """Raise a ConfigError with the nearest known name unless ``name`` is known."""
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(sorted(known))}."
        raise ConfigError(f"{what} {name} is unknown. {hint}" if what == "key" else f"{what}={name} is unknown. {hint}")


def require_finite(value: Any, path: str) -> None:
    """Refuse numbers that are not finite, anywhere in a configuration.

    Raises:
        ConfigError: With the full key.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}={value} must be finite.")
    for key, child in _children(value):
        require_finite(child, f"{path}{key}" if key.startswith("[") or not path else f"{path}.{key}")


def _children(value: Any) -> list[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, dict):
        return [(str(k), v) for k, v in value.items()]
    if isinstance(value, list):
        return [(f"[{i}]", v) for i, v in enumerate(value)]
    return []
