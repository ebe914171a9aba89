"""Tokens at equal active FLOPs: at most the reference's, and not a step less than possible."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lifelong_moe.config.run import Method, RunConfig
from lifelong_moe.data.tokens.identity import DataIdentity, TokenizerIdentity
from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.budget import tokens_within
from lifelong_moe.plan.planned import PlannedStage, planned_base
from lifelong_moe.plan.stages import plan_stages

MakeRun = Callable[..., RunConfig]
TOKENIZER = TokenizerIdentity({}, "t")
BATCH, TOKENS = 64, 64 * 100


def planned(make_run: MakeRun, *overrides: str) -> list[PlannedStage]:
    config = make_run(f"stage_defaults.tokens={TOKENS}", *overrides)
    return plan_stages(config, DataIdentity({"english": "e", "python": "p"}, TOKENIZER, vocab_size=300, bos_id=0))


def within(make_run: MakeRun, reference: list[PlannedStage], *overrides: str) -> dict[str, int]:
    tokens = {"english": TOKENS, "python": TOKENS}
    return tokens_within(planned(make_run, *overrides), reference, tokens)


def after(make_run: MakeRun, tokens: dict[str, int], *overrides: str) -> list[int]:
    """FLOPs of the stages with these tokens."""
    given = [f"stages[{i}].tokens={count}" for i, count in enumerate(tokens.values())]
    return [stage.flops for stage in planned(make_run, *given, *overrides)]


def test_the_same_arm_keeps_its_tokens(make_run: MakeRun) -> None:
    reference = planned(make_run, "method=sequential")
    assert within(make_run, reference, "method=sequential") == {"english": TOKENS, "python": TOKENS}
    unrestrained = within(make_run, reference, "method=unrestrained")  # models beside the chain have no say
    assert unrestrained == {"english": TOKENS, "python": TOKENS}


HUNGRY = ("stage_defaults.distill.text=new", "stage_defaults.distill.fraction=1")


def test_a_teacher_costs_tokens(make_run: MakeRun) -> None:
    reference = planned(make_run, "method=sequential")
    allowed = within(make_run, reference, *HUNGRY)
    assert allowed["english"] == TOKENS  # the same first stage, which stays shared
    # Three forward passes a token against nearly four, 3 / (3 + 0.95), and some more tokens for the weight gradients
    # that frozen experts leave out.
    assert 0.75 < allowed["python"] / TOKENS < 0.80 and allowed["python"] % BATCH == 0
    assert after(make_run, allowed, *HUNGRY)[1] <= reference[1].flops
    one_more = allowed | {"python": allowed["python"] + BATCH}
    assert after(make_run, one_more, *HUNGRY)[1] > reference[1].flops


def test_a_cheaper_arm_gets_more(make_run: MakeRun) -> None:
    reference = planned(make_run, *HUNGRY)
    allowed = within(make_run, reference, "method=sequential")
    assert allowed["english"] == TOKENS and allowed["python"] > 1.25 * TOKENS
    assert after(make_run, allowed, "method=sequential")[1] <= reference[1].flops


def test_one_stage_is_measured_against_all(make_run: MakeRun) -> None:
    reference = planned(make_run, "method=sequential")
    allowed = within(make_run, reference, "method=joint")
    (cost,) = after(make_run, allowed, "method=joint")
    total = sum(stage.flops for stage in reference)
    assert cost <= total < cost * (1 + 2 / 200)
    assert sum(allowed.values()) % BATCH == 0
    assert 0 <= allowed["python"] - allowed["english"] <= 1


BASE = ("base.path=ck", f"base.sha256={'0' * 64}", "base.vocab_size=300", "stage_defaults.grow.experts=2")


def test_a_first_stage_after_a_checkpoint_is_measured_too(make_run: MakeRun) -> None:
    """A teacher, which the checkpoint is to its first stage, costs tokens there as well."""
    reference = planned(make_run, *BASE, "stage_defaults.distill.weight=0")
    base = planned_base(make_run(*BASE), 0)
    assert base is not None
    tokens = {"english": TOKENS, "python": TOKENS}
    allowed = tokens_within(planned(make_run, *BASE, *HUNGRY), reference, tokens, base.architecture)
    assert 0.7 < allowed["english"] / TOKENS < 0.9 and allowed["english"] % BATCH == 0
    assert after(make_run, allowed, *BASE, *HUNGRY)[0] <= reference[0].flops
    one_more = allowed | {"english": allowed["english"] + BATCH}
    assert after(make_run, one_more, *BASE, *HUNGRY)[0] > reference[0].flops


def test_what_does_not_fit_is_refused(make_run: MakeRun) -> None:
    small = planned(make_run, "stages[1].tokens=64", "method=sequential")
    with pytest.raises(ConfigError, match=r"stages\[1\] \(python\) would get less than one step"):
        within(make_run, small, *HUNGRY)
    renamed = planned(make_run, "stages[1].name=second")
    with pytest.raises(ConfigError, match="the reference has no stage python"):
        within(make_run, renamed)


RECIPES: dict[str, tuple[str, ...]] = {method.value: (f"method={method}",) for method in Method} | {
    "distil on new": HUNGRY,
    "generated": ("stage_defaults.replay={fraction: 0.25, source: generated}",),
    "review": ("stage_defaults.review={fraction: 0.3}", *HUNGRY),
    "review, nearly all": ("stage_defaults.review={fraction: 0.9, replay_fraction: 0.9}", *HUNGRY),
    "review and generated": (
        "stage_defaults.review={fraction: 0.5, replay_fraction: 0.75}",
        "stage_defaults.replay={fraction: 0.25, source: generated}",
    ),
    "review and EWC": (
        "stage_defaults.review={fraction: 0.2}",
        "stage_defaults.penalty={kind: ewc, fisher_tokens: 640}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_more_step_would_exceed_the_budget(make_run: MakeRun, recipe: str) -> None:
    settings = ("stage_defaults.penalty.fisher_tokens=640", *RECIPES[recipe])
    reference = planned(make_run, "method=sequential")
    allowed = within(make_run, reference, *settings)
    if recipe == "joint":
        budgets, grown = [sum(stage.flops for stage in reference)], [allowed | {"python": allowed["python"] + BATCH}]
    else:
        budgets = [stage.flops for stage in reference]
        grown = [allowed | {name: allowed[name] + BATCH} for name in allowed]

    def costs(tokens: dict[str, int]) -> list[int]:
        given = [f"stages[{i}].tokens={count}" for i, count in enumerate(tokens.values())]
        return [stage.flops for stage in planned(make_run, *settings, *given) if not stage.is_from_scratch]

    assert all(cost <= budget for cost, budget in zip(costs(allowed), budgets, strict=True))
    assert all(costs(more)[i] > budgets[i] for i, more in enumerate(grown))
