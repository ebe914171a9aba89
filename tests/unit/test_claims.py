"""Sentences of the documentation that a plan or a file of results can prove, held against them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lifelong_moe.config import load_config
from lifelong_moe.methods.plan import PlannedStage, chain, plan_stages
from lifelong_moe.model.cost import forward_flops_per_token, pass_flops
from lifelong_moe.model.products import Text

ROOT = Path(__file__).parents[2]
BUNDLES = """model.experts=8 stage_defaults.grow.experts=4 stage_defaults.grow.router=copy routing.bundles=cluster
routing.chunk_tokens=4 stage_defaults.trunk.rank=44 stage_defaults.trunk.train=deltas stage_defaults.replay.fraction=0
stage_defaults.distill.weight=0 stage_defaults.optim.rewarm=2.0 stage_defaults.tokens=200_000"""


def page(name: str) -> str:
    """A page in one line."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def planned(name: str, overrides: list[str]) -> list[PlannedStage]:
    """The chain of stages of a configuration, without its text."""
    config, _ = load_config(ROOT / "configs" / name, overrides)
    names = {distribution: distribution for distribution in config.distributions}
    tokenizer = {"recipe": {}, "hash": "", "vocab_size": config.tokenizer.vocab_size}
    return chain(plan_stages(config, names, tokenizer, 0))


def by_token(stage: PlannedStage) -> float:
    return stage.flops / stage.tokens


def test_what_a_token_costs_on_the_quickstart() -> None:
    text, stages = page("README.md"), planned("quickstart.yaml", [])
    first, second, third = (stage.parameters.active for stage in stages)
    # By hand: of rank 44, rows plus columns of the embedding, the head, and each layer's four attention matrices (of
    # width 128, two heads of 32 for keys and values); and four new rows of width 128 in each of four routers.
    changes = 44 * (2 * (4096 + 128) + 4 * (2 * (128 + 128) + 2 * (128 + 64)))
    rows = 4 * 4 * 128
    assert (second - first, third - second) == (changes + rows, rows)
    assert f"{first / 1e6:.2f} M active parameters in the first stage, {second / 1e6:.2f} M in the second" in text
    assert f"(+{second / first - 1:.0%}) and {rows:,} more".replace("%)", " %)") in text
    more, further = by_token(stages[1]) / by_token(stages[0]) - 1, by_token(stages[2]) / by_token(stages[1]) - 1
    assert f"the second stage takes {100 * more:.1f} % more FLOPs a token than the first" in text
    assert f"the third {100 * further:.1f} % more than the second" in text
    assert f"by {100 * more:.1f} % at the quickstart's second stage, {100 * further:.1f} % at its third" in text


def test_what_a_token_costs_on_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIFELONG_DATA", "nowhere")
    stages = planned("bench.yaml", BUNDLES.split())
    more = re.search(r"the last of four stages takes ([\d.]+) % more than the first", page("README.md"))
    assert more is not None
    assert more[1] == f"{100 * (by_token(stages[-1]) / by_token(stages[0]) - 1):.1f}"


def test_what_a_written_token_costs() -> None:
    newest = planned("quickstart.yaml", [])[-1].architecture
    # By hand: `up down`, multiply-adds times two, of the head and of the attention matrices above.
    changes = 2 * 44 * (4096 * 128 + 4 * (2 * 128 * 128 + 2 * 128 * 64))
    assert pass_flops(newest, Text.of(newest)) == changes
    told = f"adding up the changes is {changes / 1e6:.0f} MFLOP where the token itself takes"
    assert f"{told} {forward_flops_per_token(newest) / 1e6:.1f}" in page("README.md")
