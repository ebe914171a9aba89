"""From a run's configuration to the stages that its method trains. Pure.

A method says which of a stage's sections it takes from the configuration; the rest stays off. ``average`` is
``lifelong``'s alone.

================  =====  =====  =======  ======  =======  ======  ==============================================
method            grow   trunk  distill  replay  penalty  review  stages
================  =====  =====  =======  ======  =======  ======  ==============================================
``lifelong``      yes    yes    yes      yes     yes      yes     a chain
``sequential``    –      full   –        –       –        –       a chain
``static_moe``    –      full   –        –       –        –       a chain that begins with all experts there will be
``replay``        –      full   –        yes     –        –       a chain
``l2``            –      full   –        –       L2       –       a chain
``ewc``           –      full   –        –       EWC      –       a chain
``lwf``           –      full   on new   –       –        –       a chain
``joint``         –      full   –        –       –        –       one, with all experts, on all text at once
``unrestrained``  –      full   –        –       –        –       ``sequential``'s chain, each also from scratch
================  =====  =====  =======  ======  =======  ======  ==============================================

The first stage has no parent to grow from and no earlier text to replay or preserve, so it is the same stage under
every method that begins with the same experts.

Source:
    ``lwf``: Learning without Forgetting (arXiv:1606.09282), on the new text, with one head. ``ewc``: see
    :mod:`lifelong_moe.retention.penalty`. ``lifelong`` with ``replay.fraction=0``, ``distill.text=new`` and
    ``distill.weight=1`` is Lifelong-MoE (arXiv:2305.12281).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, replace
from math import gcd

from lifelong_moe.config.names import SCRATCH
from lifelong_moe.config.retention import DistillText, PenaltyKind, ReplayConfig, ReplaySource
from lifelong_moe.config.rules import require_consistent
from lifelong_moe.config.run import Method, RunConfig, StageConfig, StageKind
from lifelong_moe.data.tokens.identity import AddedVocabulary
from lifelong_moe.plan.spec import BASE, BASE_NAME, StageSpec

MOST_TURNS = 1000
"""Longest round of turns of the joint stage's distributions; shares that would need more are rounded."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which sections of a stage a method takes from the configuration."""

    grow: bool = False
    trunk: bool = False
    distill: bool = False
    distill_text: DistillText | None = None
    """Text to distil on, in place of the configured one."""
    replay: bool = False
    penalty: bool = False
    penalty_kind: PenaltyKind | None = None
    """Kind of the penalty, in place of the configured one."""
    average: bool = False
    review: bool = False
    all_experts: bool = False
    """Begin with all experts that the stages would add."""


RECIPES = {
    Method.lifelong: Recipe(grow=True, trunk=True, distill=True, replay=True, penalty=True, average=True, review=True),
    Method.sequential: Recipe(),
    Method.static_moe: Recipe(all_experts=True),
    Method.replay: Recipe(replay=True),
    Method.l2: Recipe(penalty=True, penalty_kind=PenaltyKind.l2),
    Method.ewc: Recipe(penalty=True, penalty_kind=PenaltyKind.ewc),
    Method.lwf: Recipe(distill=True, distill_text=DistillText.new),
    Method.joint: Recipe(all_experts=True),
    Method.unrestrained: Recipe(),
}


def stage_specs(config: RunConfig, gone: Collection[str] = ()) -> list[StageSpec]:
    """The run's stages in order of training; each names its parent by index.

    The last one is the end of the run. Stages without a parent after the first are from scratch, beside the chain. A
    stage appended to the stream comes after all that there were.

    Args:
        config: The run.
        gone: Distributions whose text was removed, so that the next stage neither replays it nor measures on it.
    """
    recipe = RECIPES[config.method]
    if recipe.all_experts:
        config = with_all_experts(config)
    _require_groups(config, recipe)
    if config.method == Method.joint:
        return [_joint(config)]
    chain = [_spec(config, recipe, i, stage, gone) for i, stage in enumerate(config.stages)]
    return _with_scratch(chain) if config.method == Method.unrestrained else chain


def _require_groups(config: RunConfig, recipe: Recipe) -> None:
    """Each generation's experts form the groups that routing asks for."""
    for num in sorted(set(config.model.experts_by_layer) - {0}):
        config.routing.require_groups(num, "model.experts", is_first=True)
    for i, stage in enumerate(config.stages):
        if config.continues(i) and _grows(recipe, stage):
            key = f"stages[{i}].grow.experts"
            config.routing.require_groups(stage.grow.experts, key, is_first=False)


def with_all_experts(config: RunConfig) -> RunConfig:
    """The same run, whose first stage begins with all experts that later stages would add to a layer."""
    added, first = sum(stage.grow.experts for stage in config.stages[1:]), config.model.experts
    experts = [number + added for number in first] if isinstance(first, list) else first + added
    whole = dataclasses.replace(config, model=replace(config.model, experts=experts))
    # Once more, for some rules between sections depend on the number of experts.
    require_consistent(whole)
    return whole


def earlier_distributions(config: RunConfig, i: int) -> tuple[str, ...]:
    """What stage ``i`` could forget: distributions of the stages before it, without its own."""
    own = config.stages[i].learns
    return tuple(dict.fromkeys(name for s in config.stages[:i] for name in s.learns if name not in own))


def _spec(config: RunConfig, recipe: Recipe, i: int, stage: StageConfig, gone: Collection[str] = ()) -> StageSpec:
    # Only mechanisms that have an effect are set, so that equal work has equal keys.
    later = config.continues(i)
    earlier = earlier_distributions(config, i)
    if stage.replay.source == ReplaySource.stored:
        earlier = tuple(name for name in earlier if name not in gone)
    elif config.base.is_given:
        # Of a checkpoint there is no text, but what it writes itself.
        earlier = (BASE_NAME, *earlier)
    reviews = later and recipe.review and stage.review.fraction > 0 and bool(earlier)
    replays = later and recipe.replay and stage.replay.fraction > 0 and bool(earlier)
    replayed = earlier if replays or reviews else ()
    distill = replace(stage.distill, text=recipe.distill_text or stage.distill.text)
    # On replayed text there is nothing to distil unless some is replayed.
    distils = later and recipe.distill and distill.weight > 0 and (replays or distill.text == DistillText.new)
    penalty = replace(stage.penalty, kind=recipe.penalty_kind or stage.penalty.kind)
    # EWC needs text of earlier distributions for its Fisher information; L2 needs none.
    measures = penalty.kind == PenaltyKind.ewc
    holds = penalty.kind != PenaltyKind.none and penalty.factor > 0 and (bool(earlier) or not measures)
    penalizes = later and recipe.penalty and holds
    grows = later and _grows(recipe, stage)
    grown = any(config.continues(j) and _grows(recipe, one) for j, one in enumerate(config.stages[: i + 1]))
    fisher_data = earlier if penalizes and measures and stage.replay.source == ReplaySource.stored else ()
    uses_old_text = bool(replayed) or (penalizes and measures)
    return replace(
        _plain(config, stage, grown),
        parent=(i - 1 if i else BASE) if later else None,
        replayed=replayed,
        replay_weights=(1,) * len(replayed),
        replay=ReplayConfig(
            fraction=stage.replay.fraction if replays else 0.0,
            source=stage.replay.source if uses_old_text else ReplaySource.stored,
            buffer_tokens=stage.replay.buffer_tokens if replayed or fisher_data else None,
        ),
        fisher_data=fisher_data,
        grow=stage.grow if grows else None,
        vocabulary=stage.vocabulary if grows and stage.vocabulary.add else None,
        continues=stage.continues if later and recipe.grow else None,
        trunk=stage.trunk if later and recipe.trunk else None,
        distill=distill if distils else None,
        penalty=penalty if penalizes else None,
        average=stage.average if later and recipe.average else 0.0,
        review=stage.review if reviews else None,
        text_ends=tuple(config.base.ends),
    ).effective()


def _grows(recipe: Recipe, stage: StageConfig) -> bool:
    """Whether a stage that continues a model adds experts."""
    trains_old = stage.continues is not None or stage.kind == StageKind.finetune or stage.distill.student is not None
    return recipe.grow and bool(stage.grow.experts) and not trains_old


def added_vocabulary(config: RunConfig) -> AddedVocabulary | None:
    """What the run's stages add to its first vocabulary; None if nothing."""
    # Other methods take no part of a stage's growth from the configuration.
    wanted = tuple(stage.vocabulary.add if RECIPES[config.method].grow else 0 for stage in config.stages)
    return AddedVocabulary(wanted, config.base.vocab_size) if any(wanted) else None


def _plain(config: RunConfig, stage: StageConfig, grown: bool) -> StageSpec:
    """A first stage that trains everything, without growth, replay or retention."""
    assert stage.name is not None
    return StageSpec(
        name=stage.name,
        data=stage.learns[0],
        mixed=stage.learns[1:],
        mix_weights=stage.mixture.weights if len(stage.learns) > 1 else (),
        parent=None,
        replayed=(),
        replay_weights=(),
        replay=ReplayConfig(fraction=0.0),
        fisher_data=(),
        tokens=stage.tokens,
        grow=None,
        continues=None,
        trunk=None,
        distill=None,
        penalty=None,
        review=None,
        optim=stage.optim,
        finetune=stage.finetune if stage.kind == StageKind.finetune else None,
        model=config.model,
        routing=config.routing.effective(grown=grown),
        seed=config.seed,
        precision=config.trainer.precision,
        # YAML gives an int or a float; a key must not tell 1 from 1.0.
        gradient_clip=float(config.trainer.gradient_clip),
        accumulate=config.trainer.accumulate_grad_batches,
        processes=config.trainer.processes,
    )


def base_spec(config: RunConfig) -> StageSpec:
    """What the record of a checkpoint's stage says of its training here: none."""
    plain = _plain(config, StageConfig(data=BASE_NAME, name=BASE_NAME), grown=False)
    return replace(plain, tokens=0, seed=0, text_ends=tuple(config.base.ends))


def _first(config: RunConfig, stage: StageConfig, name: str) -> StageSpec:
    """A stage that begins with random weights."""
    return replace(_spec(config, Recipe(), 0, stage), name=name)


def _joint(config: RunConfig) -> StageSpec:
    """One stage on all distributions, each with the tokens that its stages have."""
    tokens: dict[str, int] = {}
    for stage in config.stages:
        for name in stage.learns:
            tokens[name] = tokens.get(name, 0) + max(1, round(stage.tokens * stage.mixture.share(name)))
    first, *others = tokens
    total, shared = sum(stage.tokens for stage in config.stages), [tokens[name] for name in others]
    # In units of the greatest common divisor, so that a round of turns is as short as exact shares allow.
    unit = max(gcd(*shared), -(-sum(shared) // MOST_TURNS)) or 1
    return replace(
        _first(config, config.stages[0], "joint"),
        mixed=(),
        mix_weights=(),
        replayed=tuple(others),
        replay_weights=tuple(max(1, round(count / unit)) for count in shared),
        replay=ReplayConfig(fraction=1 - tokens[first] / total if others else 0.0),
        tokens=total,
    ).effective()


def _with_scratch(chain: list[StageSpec]) -> list[StageSpec]:
    """Insert before each later stage a model of its distribution from scratch."""
    first, *later = chain
    stages, newest = [first], 0
    for stage in later:
        # effective() again: without a parent fewer settings have an effect.
        scratch = replace(stage, name=f"{stage.name}{SCRATCH}", parent=None).effective()
        stages += [scratch, replace(stage, parent=newest)]
        newest = len(stages) - 1
    return stages
