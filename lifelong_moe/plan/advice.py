"""Advice on growth, and warnings of settings without effect, from a plan and its data. Pure.

The rules are those that docs/results.md found on models of 0.2 to 2.3 million parameters, from few measurements. Two
quantities decide:

- *Tokens per parameter*: training tokens of all stages over the parameters of the first stage.
- *Divergence*: nats per token of new text against the old text's token frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lifelong_moe.config.methods import holds_old_text, in_generations, replaying, training_on
from lifelong_moe.config.retention import DistillText, PenaltyKind, ReplaySource
from lifelong_moe.config.run import Method, RunConfig, StageConfig, StageKind
from lifelong_moe.plan.methods import RECIPES, Recipe, earlier_distributions
from lifelong_moe.plan.planned import PlannedStage
from lifelong_moe.plan.stages import chain

FEW_TOKENS, MANY_TOKENS = 1.0, 10.0
"""Tokens per parameter below which capacity does not bind, and above which it does."""
# Measured: it did not bind at 0.35 and did at 14. Nothing was measured in between.
CLOSE = 0.1
"""Nats per token below which two distributions count as the same kind of text."""


def growth_advice(
    planned: list[PlannedStage], divergence: Mapping[str, Mapping[str, float]], raw: Mapping[str, Any]
) -> list[str]:
    """Sentences on whether to grow, each with all the keys that it takes: a half of them may forget.

    Args:
        planned: The run's stages.
        divergence: For each distribution of a later stage, nats per token against each one of an earlier stage.
        raw: The run's configuration as written, plain data.

    Returns:
        One sentence on capacity and one per distribution of a later stage; none for a single stage.
    """
    stages = chain(planned)
    if len(stages) < 2:
        return []
    ratio = sum(stage.tokens for stage in stages) / stages[0].parameters.total
    return [_capacity(ratio, stages, raw)] + [
        _shift(i, stages, name, divergence[name])
        for i, stage in enumerate(stages)
        for name in stage.spec.new
        if i and divergence.get(name)
    ]


def unheld(config: RunConfig, raw: Mapping[str, Any]) -> list[str]:
    """One sentence per stage that adds experts while the rest trains on, and nothing else holds what it knew."""
    if config.method != Method.lifelong or config.routing.by_generation:
        return []
    return [
        f"stages[{i}] ({stage.name}): old experts are frozen, but trunk and router train on and nothing holds old "
        f"text, which will be forgotten. Add {' '.join(replaying(raw))}, or {' '.join(in_generations(raw))}."
        for i, stage in enumerate(config.stages)
        if earlier_distributions(config, i) and stage.grow.experts and not stage.continues
        if not stage.trunk.is_frozen and not holds_old_text(stage) and stage.kind != StageKind.finetune
    ]


def noncausal_routing(config: RunConfig) -> list[str]:
    """A warning if routing is not causal."""
    if not config.routing.noncausal_by:
        return []
    # Losses of such a model are computed with knowledge of the future, which sampling does not have.
    when = "in training, not in evaluation" if config.routing.mode == "base" else "also in evaluation"
    key = config.routing.noncausal_by
    return [f"{key} lets later tokens change earlier ones, {when}: its losses say little of generation."]


def beginning(config: RunConfig, bos_id: int, name: str) -> list[str]:
    """What documents begin with, where that is a checkpoint's to say; see :func:`other_separator`."""
    return [f"documents begin with token {bos_id} ({name})"] if config.base.is_given else []


def other_separator(config: RunConfig, bos_id: int) -> list[str]:
    """A warning if documents begin with another token than the checkpoint's own did.

    Args:
        config: The run.
        bos_id: The tokenizer's document separator.
    """
    if not config.base.is_given or config.base.bos_id == bos_id:
        return []
    return [
        f"documents begin with token {bos_id} of the tokenizer, and with {config.base.bos_id} by the files of "
        f"{config.base.path}: its losses may be far off."
    ]


def idle_retention(config: RunConfig) -> list[str]:
    """One sentence per stage whose retention settings have no effect, since no earlier stage had other text."""
    # Only sections that the method takes from the configuration count as asked for.
    if config.method == Method.joint:
        return []
    recipe, found = RECIPES[config.method], []
    for i, stage in enumerate(config.stages):
        writes = config.base.is_given and stage.replay.source == ReplaySource.generated
        if writes or not config.continues(i):
            continue
        if i == 0 and (asked := _asked(recipe, stage)):
            found.append(
                f"stages[0] ({stage.name}): {', '.join(asked)}: off, because no text of the checkpoint is here. "
                f"replay.source=generated, distill.text=new, penalty.kind=l2, average and bundles need none."
            )
        elif (asked := _asked(recipe, stage)) and not earlier_distributions(config, i):
            found.append(
                f"stages[{i}] ({stage.name}): {', '.join(asked)}: off, because no earlier stage learned anything but "
                f"{', '.join(stage.learns)}."
            )
    return found


def _asked(recipe: Recipe, stage: StageConfig) -> list[str]:
    """Retention that a stage asks for and that needs the text of other distributions."""
    # L2 and distillation on new text need none.
    replays = recipe.replay and stage.replay.fraction > 0
    on_replay = (recipe.distill_text or stage.distill.text) == DistillText.replay
    ewc = (recipe.penalty_kind or stage.penalty.kind) == PenaltyKind.ewc
    factor = replace(stage.penalty, kind=PenaltyKind.ewc).factor
    wanted = {
        "replay": replays,
        "distillation on replayed text": replays and recipe.distill and on_replay and stage.distill.weight > 0,
        "EWC": recipe.penalty and ewc and factor > 0,
        "review": recipe.review and stage.review.fraction > 0,
    }
    return [name for name, asked in wanted.items() if asked]


def _capacity(ratio: float, stages: list[PlannedStage], raw: Mapping[str, Any]) -> str:
    seen = f"{ratio:.2g} training tokens a parameter of the first stage"
    if ratio < FEW_TOKENS:
        grown = any(stage.spec.routing.by_generation for stage in stages)
        keys = "as here" if grown else f"add {' '.join(_as_lifelong(raw, in_generations(raw)))}"
        return (
            f"{seen}: capacity will hardly bind. More experts earn little; grow to keep old text ({keys}), or keep all "
            f"experts trainable with replay and distillation (add {' '.join(_as_lifelong(raw, training_on(raw)))})."
        )
    if ratio > MANY_TOKENS:
        return f"{seen}: capacity binds. Begin with more experts (model.experts) if you can, or grow."
    return f"{seen}: whether capacity binds was not measured there; compare grow.experts=0 with a larger model.experts."


def _as_lifelong(raw: Mapping[str, Any], keys: list[str]) -> list[str]:
    """Overrides that only this method reads."""
    return keys if raw.get("method", "lifelong") == "lifelong" else ["method=lifelong", *keys]


def _shift(i: int, stages: list[PlannedStage], name: str, against: Mapping[str, float]) -> str:
    stage = stages[i]
    nearest = min(against, key=lambda name: against[name])
    nats, routing = against[nearest], stage.spec.routing
    begins = f"{stage.spec.name}{f', {name}' if stage.spec.mixed else ''}: {nats:.2f} nats a token from {nearest}"
    if nats < CLOSE:
        return f"{begins}, the same kind of text: {_train_on(i, stages, nearest)}"
    if (mixture := routing.mixture) is not None and routing.mixes and mixture.drop and mixture.likelihood:
        # Models tell text apart at least as fast as frequencies of tokens do.
        tokens = math.ceil(-math.log(mixture.drop) / (mixture.likelihood * nats))
        return (
            f"{begins}: the generation that does not know a text leaves it within about {tokens:,} tokens "
            f"(routing.mixture), so bundles can keep old text."
        )
    # Chunks are assigned once the log-likelihood ratio of the preceding text exceeds routing.margin, in nats.
    return (
        f"{begins}: told apart after about {max(1, round(routing.margin / nats)):,} tokens "
        f"(routing.margin={routing.margin:g}), so bundles can keep old text exactly."
    )


def _train_on(i: int, stages: list[PlannedStage], nearest: str) -> str:
    """What trains the model on with text that it knows, and what then has to hold the rest."""
    spec = stages[i].spec
    if spec.continues or spec.grow is None:
        return "train on, as here."
    if spec.routing.by_generation:
        # The generation that knows this kind of text; all others stay as they are.
        born = [
            one.spec.name for one in stages[:i] if nearest in one.spec.new and (one.spec.grow or not one.spec.parent)
        ]
        if born:
            return f"train on (add stages[{i}].continues={born[-1]}); a generation of its own could not be told apart."
        return "a generation of its own could not be told apart."
    held = "" if spec.replay.fraction or spec.distill or spec.penalty else f" stages[{i}].replay.fraction=0.25"
    return f"train on (add stages[{i}].grow.experts=0{held})."
