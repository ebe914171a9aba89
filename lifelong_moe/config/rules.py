"""Reject combinations of a run's sections that cannot work together. Torch-free."""

from __future__ import annotations

from lifelong_moe.config.model import ExpertsImplementation
from lifelong_moe.config.names import NAME, SCRATCH, require_known
from lifelong_moe.config.routing.base import Bundles, Centroids, Score
from lifelong_moe.config.routing.modes import FOR_ENCODERS
from lifelong_moe.config.routing.topk import LearnedConfig
from lifelong_moe.config.run import Method, RunConfig
from lifelong_moe.config.stage_rules import require_consistent_stage
from lifelong_moe.config.training import Offload
from lifelong_moe.errors import ConfigError


def require_consistent(run: RunConfig) -> None:
    """Check every rule that relates one section of a run to another.

    Raises:
        ConfigError: With the full key, what was required and what came.
    """
    _check_execution(run)
    if run.base.is_given:
        _check_base(run)
    for i, stage in enumerate(run.stages):
        require_consistent_stage(run, i, stage)
    _check_evaluated(run)
    _check_tokenizer(run)
    _check_competition(run)
    _check_causality(run)
    _check_document_routing(run)
    _check_number_of_experts(run)
    if run.method == Method.unrestrained:
        _check_scratch(run)


def _check_execution(run: RunConfig) -> None:
    """Reject combinations of execution settings that cannot be computed."""
    if run.trainer.experts_implementation == ExpertsImplementation.grouped_mm:
        # The kernel needs rows of a multiple of 16 bytes: 8 numbers in bfloat16.
        for key in ("width", "expert_width"):
            if getattr(run.model, key) % 8:
                raise ConfigError(
                    f"trainer.experts_implementation=grouped_mm needs model.{key} in multiples of 8, not "
                    f"{getattr(run.model, key)}. Set trainer.experts_implementation=auto."
                )
        if run.trainer.compile and run.trainer.precision in ("32-true", "auto"):
            raise ConfigError(
                "trainer.experts_implementation=grouped_mm compiles in bfloat16 only. Set trainer.compile=false or "
                "trainer.precision=bf16-mixed."
            )
    if run.frozen.offload == Offload.cpu:
        for key in ("activation_checkpointing", "compile"):
            if getattr(run.trainer, key):
                raise ConfigError(
                    f"frozen.offload=cpu with trainer.{key}=true: a layer would be computed again without its "
                    f"weights. Set one of them off."
                )


def _check_base(run: RunConfig) -> None:
    """Require a method and a router that leave a checkpoint's model as it is, and need no text of its pretraining."""
    if run.method in (Method.static_moe, Method.joint, Method.unrestrained):
        raise ConfigError(f"method={run.method} begins with random weights, and model.from with a checkpoint.")
    for i, stage in enumerate(run.stages):
        if stage.name == "base":
            raise ConfigError(f"stages[{i}].name=base is the name of the checkpoint's experts; set another one.")
    routing = run.routing
    if not isinstance(routing, LearnedConfig) or routing.score != Score.softmax or routing.gate_scale != 1:
        raise ConfigError(
            "model.from needs routing.mode=learned with score=softmax and gate_scale=1, as checkpoints have it."
        )
    if routing.capacity is not None or routing.bias_rate or routing.expert_groups > 1:
        raise ConfigError("model.from needs routing without capacity, bias_rate and expert_groups.")
    # Each block that it writes begins a document.
    documents, clusters = max(1, routing.sample_tokens // run.model.context), routing.num_clusters(1)
    if routing.bundles == Bundles.cluster and routing.centroids == Centroids.fitted and documents < clusters:
        raise ConfigError(
            f"routing.sample_tokens={routing.sample_tokens} are {documents} documents of the checkpoint's own, and "
            f"{clusters} clusters need as many. Set it to {clusters * run.model.context} or more."
        )


def _check_evaluated(run: RunConfig) -> None:
    """Require that distributions which are only evaluated are known, too."""
    for i, name in enumerate(run.evaluate.also):
        require_known(name, run.distributions, f"evaluate.also[{i}]")


def _check_tokenizer(run: RunConfig) -> None:
    """Require that the tokenizer is trained on the first stage's text."""
    first = run.stages[0].learns[0]
    if run.tokenizer.train_on not in (None, first):
        which = "distribution" if len(run.stages[0].learns) == 1 else "distribution with the largest share"
        raise ConfigError(
            f"tokenizer.train_on={run.tokenizer.train_on} must be the first stage's {which} ({first}): "
            f"a tokenizer that saw later stages leaks the future."
        )


def _check_competition(run: RunConfig) -> None:
    """Require that competing experts are the last modules before the head."""
    # Each predicts by itself through the head, so nothing may be added to or normalize its output.
    last_is_dense = run.model.layers - 1 not in run.model.moe_layers
    if run.routing.competitive and (last_is_dense or run.model.shared_experts or run.model.sandwich_norms):
        raise ConfigError(
            "routing.competitive needs experts in the last layer, without shared_experts and sandwich_norms."
        )


def _check_causality(run: RunConfig) -> None:
    """Reject routing that lets later tokens change earlier ones, unless it is explicitly allowed."""
    if run.routing.mode in FOR_ENCODERS:
        raise ConfigError(
            f"routing.mode={run.routing.mode} mixes each token with all later ones; it is for encoders, see "
            "lifelong_moe/model/encoder.py."
        )
    if run.routing.noncausal_by and not run.routing.allow_noncausal:
        raise ConfigError(
            f"{run.routing.noncausal_by} lets later tokens change earlier ones, which a decoder must not. Set "
            f"routing.allow_noncausal=true to try it nevertheless."
        )


def _check_document_routing(run: RunConfig) -> None:
    """Require document masks, and float32 features, where experts are assigned by document."""
    bundles = run.routing.bundles
    by_what = "routing.level=document" if bundles == Bundles.none else f"routing.bundles={bundles}"
    # Otherwise attention would carry text of one document into another, perhaps of another generation.
    if (run.routing.by_document or bundles != Bundles.none) and not run.model.document_mask:
        raise ConfigError(
            f"{by_what} assigns experts a document at a time, so attention must stop at document borders. Set "
            f"model.document_mask=true."
        )
    if run.routing.by_document and run.trainer.precision == "bf16-true":
        raise ConfigError(
            f"{by_what} compares features in float32, which trainer.precision=bf16-true would round. Set "
            f"trainer.precision=bf16-mixed."
        )


def _check_number_of_experts(run: RunConfig) -> None:
    """Require a sampled token for each centroid, and ``top_k`` experts for each token."""
    most = max(run.model.most_experts, *(stage.grow.experts for stage in run.stages))
    if run.routing.is_clustered and not run.routing.by_generation and run.routing.sample_tokens < most:
        raise ConfigError(
            f"routing.sample_tokens={run.routing.sample_tokens} must reach the number of experts that a stage "
            f"begins ({most})."
        )
    # A dense model that is going to be upcycled has one expert, whatever `top_k` its later stages use.
    dense = run.model.most_experts == 1 and run.routing.mode == "learned" and not run.routing.by_generation
    # A checkpoint that is dense stays so for its own text, whatever else uses several.
    dense |= run.base.is_given and run.model.most_experts == 1
    if run.routing.top_k > run.model.fewest_experts and not dense:
        raise ConfigError(f"routing.top_k={run.routing.top_k} must not exceed model.experts={run.model.experts}.")


def _check_scratch(run: RunConfig) -> None:
    """Require a free and valid name for each model that is trained from scratch beside a stage."""
    taken = {stage.name for stage in run.stages} | set(run.distributions)
    for i, stage in enumerate(run.stages[1:], start=1):
        name = f"{stage.name}{SCRATCH}"
        # The suffix can make a valid name too long.
        if name in taken or not NAME.fullmatch(name):
            problem = "is taken" if name in taken else "is over 64 characters"
            raise ConfigError(
                f"stages[{i}]: method=unrestrained names the model from scratch beside it {name}, which {problem}; "
                f"set stages[{i}].name."
            )
