from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from lifelong_moe.clustering.unigrams import UNIFORM, unigram_divergence
from lifelong_moe.config.run import RunConfig
from lifelong_moe.data.tokens.identity import DataIdentity, TokenizerIdentity
from lifelong_moe.plan.advice import growth_advice, idle_retention
from lifelong_moe.plan.stages import plan_stages

MakeRun = Callable[..., RunConfig]
TOKENIZER = TokenizerIdentity({"vocab_size": 300}, "t")


def advice(config: RunConfig, nats: float) -> list[str]:
    plan = plan_stages(config, DataIdentity({"english": "e", "python": "p"}, TOKENIZER, vocab_size=300, bos_id=0))
    return growth_advice(plan, {"python": {"english": nats}}, {"stages": [{}, {}]})


def test_divergence_by_hand() -> None:
    # Old text is all token 0, new text half token 1: smoothed shares by the formula.
    new, old = np.array([0, 1]), np.array([0, 0])
    rare, half, most = UNIFORM / 2, (1 - UNIFORM) / 2 + UNIFORM / 2, 1 - UNIFORM + UNIFORM / 2
    expected = half * (math.log(half / most) + math.log(half / rare))
    assert unigram_divergence(new, old, 2) == pytest.approx(expected)
    assert unigram_divergence(new, new, 2) == 0


def test_few_tokens_a_parameter_do_not_bind(make_run: MakeRun) -> None:
    capacity, shift = advice(make_run(), nats=0.8)  # 1,280 tokens in all
    assert "capacity will hardly bind" in capacity
    assert "told apart after about 5 tokens" in shift  # a margin of 4 nats over 0.8


def test_a_mixture_says_how_long_two_generations_read_a_text(make_run: MakeRun) -> None:
    bundles = ("routing.bundles=cluster", "model.document_mask=true", "stage_defaults.trunk.train=deltas")
    run = make_run(*bundles, "routing.mixture={likelihood: 0.5, drop: 0.1}")
    # ln 10 nats over a power of 0.5 and 0.8 nats a token: 5.8
    assert "leaves it within about 6 tokens" in advice(run, nats=0.8)[1]
    assert "told apart after about 5 tokens" in advice(make_run(*bundles, "routing.mixture=null"), nats=0.8)[1]


def test_many_tokens_bind_and_like_text_is_trained_on(make_run: MakeRun) -> None:
    capacity, shift = advice(make_run("stage_defaults.tokens=64000000"), nats=0.05)
    assert "capacity binds" in capacity and "train on" in shift


def test_between_the_measurements_it_says_so(make_run: MakeRun) -> None:
    first = plan_stages(make_run(), DataIdentity({"english": "e", "python": "p"}, TOKENIZER, vocab_size=300, bos_id=0))[
        0
    ]
    tokens = 64 * round(1.5 * first.parameters.total / 64)  # two stages: 3 tokens a parameter
    assert "not measured" in advice(make_run(f"stage_defaults.tokens={tokens}"), nats=1.0)[0]


def test_one_stage_needs_no_advice(make_run: MakeRun) -> None:
    assert advice(make_run(stages=[{"data": "english"}]), nats=1.0) == []


AGAIN = [{"data": "english"}, {"data": "english"}, {"data": "python"}, {"data": "english", "name": "last"}]


@pytest.mark.parametrize(
    ("overrides", "asked"),
    [
        ([], "replay, distillation on replayed text"),
        (["stage_defaults.distill.weight=0"], "replay"),
        (["stage_defaults.distill.text=new"], "replay"),
        (["stage_defaults.penalty.kind=ewc"], "replay, distillation on replayed text, EWC"),
        (["stage_defaults.review.fraction=0.2"], "replay, distillation on replayed text, review"),
        (["method=replay"], "replay"),
        (["method=ewc"], "EWC"),
    ],
)
def test_a_stage_with_nothing_to_hold_on_to_is_named(make_run: MakeRun, overrides: list[str], asked: str) -> None:
    (said,) = idle_retention(make_run(*overrides, stages=AGAIN))
    assert said.startswith(
        f"stages[1] (english-2): {asked}: off, because no earlier stage learned anything but english"
    )


@pytest.mark.parametrize("method", ["sequential", "static_moe", "l2", "lwf", "joint", "unrestrained"])
def test_what_a_method_does_not_take_is_not_asked_for(make_run: MakeRun, method: str) -> None:
    assert idle_retention(make_run(f"method={method}", stages=AGAIN)) == []


def test_a_stage_that_holds_on_to_something_is_not_named(make_run: MakeRun) -> None:
    everything = ["stage_defaults.penalty.kind=ewc", "stage_defaults.review.fraction=0.2"]
    assert idle_retention(make_run(*everything)) == []
    off = ["stage_defaults.replay.fraction=0", "stage_defaults.distill.weight=0"]
    assert idle_retention(make_run(*off, stages=AGAIN)) == []
    unheld = ["stage_defaults.penalty.kind=ewc", "stage_defaults.penalty.weight=0"]
    assert idle_retention(make_run(*off, *unheld, stages=AGAIN)) == []
