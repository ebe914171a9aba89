"""Reject stages whose sections fit neither each other nor the run's. Torch-free."""

from __future__ import annotations

from math import isqrt

from lifelong_moe.config.growth import ExpertInit, FrozenWeights
from lifelong_moe.config.methods import require_text
from lifelong_moe.config.names import require_known
from lifelong_moe.config.retention import PenaltyKind, ReplaySource, TrunkTraining
from lifelong_moe.config.routing.routers import ClusterConfig
from lifelong_moe.config.routing.topk import LearnedConfig
from lifelong_moe.config.run import Method, RunConfig, StageConfig, StageKind
from lifelong_moe.config.training import Offload
from lifelong_moe.errors import ConfigError


def require_consistent_stage(run: RunConfig, i: int, stage: StageConfig) -> None:
    """Check every rule that relates the ``i``-th stage to the run.

    Raises:
        ConfigError: With the full key, what was required and what came.
    """
    for name in stage.learns:
        require_known(name, run.distributions, f"stages[{i}].data")
    _check_batch(run, i, stage)
    _check_tokens(run, i, stage)
    _check_finetuning(run, i, stage)
    _check_divided(run, i, stage)
    _check_experts(run, i, stage)
    # Other methods use none of these sections as they are in the configuration.
    if run.continues(i) and run.method == Method.lifelong:
        require_text(stage.distill, stage.replay, i)
        _check_student(run, i, stage)
        _check_growth(run, i, stage)
        _check_deltas(run, i, stage)
        _check_grown_layers(run, i, stage)
        _check_review(run, i, stage)
        _check_retention(run, i, stage)
    if run.method == Method.lifelong:
        _check_vocabulary(run, i, stage)
    if stage.continues is not None:
        _check_continued(run, i, stage.continues)


def _check_batch(run: RunConfig, i: int, stage: StageConfig) -> None:
    """Require whole sequences per step, divided evenly among micro-batches and processes."""
    context, tokens = run.model.context, stage.optim.batch_tokens
    if tokens % context:
        raise ConfigError(
            f"stages[{i}].optim.batch_tokens={tokens} must be a multiple of model.context={context}; "
            f"the nearest is {max(1, round(tokens / context)) * context}."
        )
    sequences, accumulate = tokens // context, run.trainer.accumulate_grad_batches
    if sequences % accumulate:
        raise ConfigError(
            f"trainer.accumulate_grad_batches={accumulate} must divide the {sequences} sequences of a step "
            f"(stages[{i}].optim.batch_tokens / model.context); valid are "
            f"{', '.join(map(str, _divisors(sequences)))}."
        )
    # Equal numbers, since Lightning and DDP take plain means over micro-batches and processes.
    micro, processes = sequences // accumulate, run.trainer.processes
    if micro % processes:
        nodes = run.trainer.num_nodes
        where, what = (f" on trainer.num_nodes={nodes} machines", " processes in all") if nodes > 1 else ("", "")
        raise ConfigError(
            f"trainer.devices={run.trainer.processes_here}{where} must divide the {micro} sequences of a micro-batch "
            f"(stages[{i}].optim.batch_tokens / model.context / trainer.accumulate_grad_batches); valid are "
            f"{', '.join(map(str, _divisors(micro)))}{what}."
        )


def _divisors(number: int) -> list[int]:
    """All divisors in ascending order."""
    small = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _check_tokens(run: RunConfig, i: int, stage: StageConfig) -> None:
    """Require enough steps for what a stage does, and enough tokens for what it measures."""
    context, tokens = run.model.context, stage.optim.batch_tokens
    # Whole blocks are sampled, at least one. k-means needs a token for each new expert's centroid.
    if max(1, stage.grow.sample_tokens // context) * context < stage.grow.experts:
        raise ConfigError(
            f"stages[{i}].grow.sample_tokens={stage.grow.sample_tokens} must reach the number of new experts "
            f"({stage.grow.experts})."
        )
    if stage.tokens < tokens:
        raise ConfigError(f"stages[{i}].tokens={stage.tokens} is less than one step of {tokens} tokens.")
    for name in stage.learns if len(stage.learns) > 1 else ():
        # Replay takes of it, so that the plan asks once more.
        if stage.tokens // tokens * tokens * stage.mixture.share(name) < context:
            raise ConfigError(small_share(i, name, context))
    if i == 0 and run.routing.clusters_hidden and stage.tokens < 2 * tokens:
        raise ConfigError(
            f"stages[0].tokens={stage.tokens} is less than two steps of {tokens} tokens; routing.features=hidden "
            f"needs one before clusters are fitted and one after."
        )


def small_share(i: int, name: str, context: int) -> str:
    """What is wrong with a distribution of the ``i``-th stage's mixture that would never be trained on."""
    return (
        f"stages[{i}].data.{name}: its share of the new text is less than a block of model.context={context}. Raise "
        f"its weight or stages[{i}].tokens, or leave it out."
    )


def _check_finetuning(run: RunConfig, i: int, stage: StageConfig) -> None:
    """Require answers for fine-tuning, a stage before it, and one process where ``patience`` keeps the best weights."""
    plain = [name for name in stage.learns if run.distributions[name].answer_field is None]
    answers = [name for name in stage.learns if name not in plain]
    if answers and plain:
        raise ConfigError(
            f"stages[{i}].data mixes text ({plain[0]}) with prompts and answers ({answers[0]}). Learn them in stages "
            f"of their own."
        )
    if stage.kind == StageKind.pretrain:
        if answers:
            raise ConfigError(f"stages[{i}].data={answers[0]} has prompts and answers; set stages[{i}].kind=finetune.")
        return
    if plain:
        raise ConfigError(
            f"stages[{i}].kind=finetune needs prompts and answers: set distributions.{plain[0]}.answer_field."
        )
    if not run.continues(i):
        raise ConfigError("stages[0].kind=finetune: there is no model yet to fine-tune.")
    if stage.finetune.patience is not None and run.trainer.processes > 1:
        raise ConfigError(f"stages[{i}].finetune.patience needs trainer.devices=1.")


def _check_divided(run: RunConfig, i: int, stage: StageConfig) -> None:
    """Require what processes can do that hold parts of the model."""
    if not run.trainer.is_divided:
        return
    grows = run.continues(i) and run.method == Method.lifelong
    sharded = {
        f"method={run.method}": run.method in (Method.l2, Method.ewc),
        "frozen.offload=cpu": run.frozen.offload == Offload.cpu,
        f"stages[{i}].penalty.kind={stage.penalty.kind}": grows and stage.penalty.kind != PenaltyKind.none,
        f"stages[{i}].grow.frozen_weights={stage.grow.frozen_weights}": grows
        and stage.grow.frozen_weights != FrozenWeights.full,
    }
    apart = {
        "frozen.offload=cpu": run.frozen.offload == Offload.cpu,
        # Each token is an input of all experts.
        "routing.competitive=true": run.routing.competitive,
        # Drawn where the expert is, so that results would depend on where that is.
        f"stages[{i}].finetune.expert_dropout={stage.finetune.expert_dropout:g}": stage.kind == StageKind.finetune
        and stage.finetune.expert_dropout > 0,
    }
    number = run.trainer.expert_parallel
    for is_on, refused, setting, remedy in (
        (run.trainer.is_sharded, sharded, "strategy=fsdp", "strategy=ddp"),
        (number > 1, apart, f"expert_parallel={number}", "expert_parallel=1"),
    ):
        if is_on and (key := next((key for key, is_set in refused.items() if is_set), None)):
            raise ConfigError(f"{key} with trainer.{setting} is not supported. Set trainer.{remedy}.")


def _check_experts(run: RunConfig, i: int, stage: StageConfig) -> None:
    """Require ``top_k`` experts for each cluster, label or generation."""
    experts = stage.grow.experts if run.continues(i) else run.model.fewest_experts
    by_group = run.routing.by_label or run.routing.by_document
    # Other methods add no experts after the first stage.
    grows = not run.continues(i) or run.method == Method.lifelong
    if not by_group or not grows or experts == 0:
        return
    routing = run.routing
    groups = 1 if routing.by_generation or not isinstance(routing, ClusterConfig) else (routing.clusters or 1)
    if experts < groups * run.routing.top_k:
        key = f"stages[{i}].grow.experts" if run.continues(i) else "model.experts"
        raise ConfigError(
            f"{key}={experts} is too few: {groups} group(s) of routing.top_k={run.routing.top_k} experts each "
            f"need {groups * run.routing.top_k}."
        )


def _check_growth(run: RunConfig, i: int, stage: StageConfig) -> None:
    """Require a router that can grow, and frozen weights in a form that the trainer supports."""
    grow = stage.grow
    held = f"stages[{i}].grow.frozen_weights={grow.frozen_weights}"
    if grow.frozen_weights != FrozenWeights.full and run.frozen.offload == Offload.cpu:
        raise ConfigError(
            f"{held} with frozen.offload=cpu: weights in fewer bits are made whole where the backward pass needs them. "
            f"Set frozen.offload=none or grow.frozen_weights=full."
        )
    if grow.frozen_weights != FrozenWeights.full and run.trainer.compile:
        raise ConfigError(
            f"{held} with trainer.compile=true: what makes weights whole is not compiled. Set trainer.compile=false or "
            f"grow.frozen_weights=full."
        )
    # Lightning would make these of all numbers, also of those that are held in float16.
    if grow.frozen_weights == FrozenWeights.half and run.trainer.precision == "bf16-true":
        raise ConfigError(f"{held} with trainer.precision=bf16-true, where all weights have 16 bits; leave it out.")
    if grow.init == ExpertInit.upcycle and grow.experts:
        _check_upcycling(run, i, stage)
    if grow.experts and not stage.continues and (fixed := run.routing.fixed_by):
        raise ConfigError(f"{fixed} has no place for new experts: set stages[{i}].grow.experts=0.")


def _check_deltas(run: RunConfig, i: int, stage: StageConfig) -> None:
    """Require generations for low-rank changes."""
    grow = stage.grow
    if stage.trunk.train != TrunkTraining.deltas:
        return
    if not (grow.experts or stage.continues) or not run.routing.by_generation:
        raise ConfigError(
            f"stages[{i}].trunk.train=deltas changes the trunk for the tokens of one bundle. Set "
            f"routing.bundles=cluster (or label, or routing.mode=label) and stages[{i}].grow.experts above 0, "
            f"or stages[{i}].continues to the stage whose bundle trains on."
        )


def _check_vocabulary(run: RunConfig, i: int, stage: StageConfig) -> None:
    """Require a generation of the stage's own for new tokens, which no text but the generation's is read with."""
    key = f"stages[{i}].vocabulary.add={stage.vocabulary.add}"
    if any(earlier.vocabulary.add for earlier in run.stages[: i + 1]) and run.continues(i) and stage.distill.weight:
        # The teacher would read the text in other tokens than the student.
        raise ConfigError(
            f"stages[{i}].distill.weight={stage.distill.weight:g} compares predictions of one vocabulary, and "
            f"vocabulary.add gives this run several. Set stages[{i}].distill.weight=0."
        )
    if not stage.vocabulary.add:
        return
    if mixed := [other for other in run.stages if len(other.learns) > 1]:
        raise ConfigError(
            f"{key}: tokens are found in the text of one distribution, and stage {mixed[0].name} mixes several. Leave "
            f"it out, or train on one distribution a stage."
        )
    if not run.continues(i):
        raise ConfigError(
            f"{key}: the first stage has a tokenizer of its own, as large as tokenizer.vocab_size says; tokens are "
            f"added by later stages, or to a checkpoint's (model.from)."
        )
    if not stage.grow.experts or stage.continues or stage.kind == StageKind.finetune:
        raise ConfigError(
            f"{key}: new tokens belong to a generation of the stage's own. Set stages[{i}].grow.experts above 0, "
            f"kind=pretrain, and no continues."
        )
    if not run.routing.by_label:
        # Elsewhere one vocabulary would have to read text whose generation is not known before it is read, or one
        # softmax would take probability from all old text for tokens that it has never seen.
        raise ConfigError(
            f"{key}: text of an old generation must not be read in new tokens, so its generation must be known. Set "
            f"routing.bundles=label, or routing.mode=label."
        )


def _check_grown_layers(run: RunConfig, i: int, stage: StageConfig) -> None:
    """Require that ``grow.layers`` names layers with experts, under a router that lets single layers grow."""
    grow = stage.grow
    if grow.layers is None:
        return
    if not 0 <= min(grow.layers) <= max(grow.layers) < run.model.layers:
        raise ConfigError(f"stages[{i}].grow.layers={grow.layers} must lie in 0 to {run.model.layers - 1}.")
    if dense := sorted(set(grow.layers) - set(run.model.moe_layers)):
        raise ConfigError(f"stages[{i}].grow.layers={grow.layers}: layer {dense[0]} is dense and has no experts.")
    # A token that uses one generation alone needs experts of it in every layer.
    if not run.routing.has_rows or run.routing.by_generation:
        raise ConfigError(
            f"stages[{i}].grow.layers needs a trained router and routing.bundles=none; every layer must grow otherwise."
        )


def _check_student(run: RunConfig, i: int, stage: StageConfig) -> None:
    """Require a last stage and layers that are all alike, so that a student is described by their numbers."""
    layers, routing = stage.distill.student, run.routing
    if layers is None:
        return
    if layers[0] < 0 or layers[-1] >= run.model.layers:
        raise ConfigError(f"stages[{i}].distill.student={layers} must lie in 0 to {run.model.layers - 1}.")
    if i + 1 < len(run.stages):
        raise ConfigError(f"stages[{i}].distill.student is for the last stage: later ones have all layers.")
    if len(run.model.moe_layers) < run.model.layers or not routing.has_rows or routing.by_generation:
        raise ConfigError(
            f"stages[{i}].distill.student needs a trained router without bundles, and a mixture in every layer."
        )
    if any(earlier.grow.rank and earlier.grow.experts for j, earlier in enumerate(run.stages[:i]) if run.continues(j)):
        raise ConfigError(f"stages[{i}].distill.student has no low-rank experts: leave out grow.rank.")
    if not stage.distill.weight or stage.kind == StageKind.finetune:
        raise ConfigError(f"stages[{i}].distill.student needs distill.weight above 0 and kind=pretrain.")


def _check_upcycling(run: RunConfig, i: int, stage: StageConfig) -> None:
    """Require a dense model before upcycling, and gates that sum to 1, so that copies leave outputs unchanged."""
    routing, before = run.routing, [s.grow.experts for j, s in enumerate(run.stages[:i]) if run.continues(j)]
    if run.model.most_experts > 1 or any(before):
        raise ConfigError(
            f"stages[{i}].grow.init=upcycle copies a dense model: set model.experts=1, and no growth before it."
        )
    sums_to_1 = isinstance(routing, LearnedConfig) and routing.renormalize and routing.gate_scale == 1
    if not sums_to_1 or routing.top_k < 2 or routing.by_generation or routing.capacity is not None:
        raise ConfigError(
            f"stages[{i}].grow.init=upcycle needs gates that sum to 1: routing.mode=learned with renormalize=true, "
            f"gate_scale=1 and top_k above 1, without capacity and bundles."
        )


def _check_continued(run: RunConfig, i: int, name: str) -> None:
    """Require that a continued stage is one that created experts."""
    require_known(name, run.generations(i), f"stages[{i}].continues")


def _check_review(run: RunConfig, i: int, stage: StageConfig) -> None:
    """Require new router rows for a review to train, and at least one step each for stage and review."""
    if not stage.review.fraction:
        return
    if run.routing.mode != "learned" or run.routing.by_generation or not stage.grow.experts or stage.continues:
        raise ConfigError(
            f"stages[{i}].review.fraction={stage.review.fraction} trains new router rows on old text, too. Set "
            f"routing.mode=learned, routing.bundles=none and stages[{i}].grow.experts above 0, or "
            f"review.fraction=0."
        )
    steps = stage.tokens // stage.optim.batch_tokens
    # Rounded as `StageSpec.review_steps` rounds.
    if not 1 <= round(steps * stage.review.fraction) < steps:
        raise ConfigError(
            f"stages[{i}].review.fraction={stage.review.fraction} of {steps} steps must be at least one step and "
            f"leave one."
        )


def _check_retention(run: RunConfig, i: int, stage: StageConfig) -> None:
    """Require trainable old weights for a penalty and an average, and no labels for generated text."""
    trunk_trains = stage.trunk.train in (TrunkTraining.full, TrunkTraining.gentle)
    # Without new experts none is frozen, so the old ones train.
    old_train = trunk_trains or not stage.grow.experts or not stage.grow.freezes
    asked = [(f"penalty.kind={stage.penalty.kind}", "penalty.kind=none", stage.penalty.kind != PenaltyKind.none)]
    asked.append((f"average={stage.average}", "average=0", bool(stage.average)))
    for key, remedy, is_on in asked:
        if is_on and not old_train:
            raise ConfigError(
                f"stages[{i}].{key} holds old weights that train, and none does: the trunk is {stage.trunk.train} and "
                f"old experts are frozen. Set {remedy}."
            )
    if stage.average and stage.distill.student is not None:
        raise ConfigError(
            f"stages[{i}].average={stage.average} with distill.student: a student has fewer layers than the model that "
            f"it begins with. Set average=0."
        )
    # At factor 0 no Fisher information is measured, so no old text is needed.
    measures = stage.penalty.kind == PenaltyKind.ewc and stage.penalty.factor > 0
    uses_old_text = stage.replay.fraction or stage.review.fraction or measures
    if stage.replay.source == ReplaySource.generated and uses_old_text and run.routing.by_label:
        raise ConfigError(
            f"stages[{i}].replay.source=generated: text that a model wrote has no label, which this routing needs. "
            f"Set replay.source=stored."
        )
