"""Comparison files: what they expand to, and what they must not say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lifelong_moe.config.load import read_config
from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.comparison import Budget, Comparison, load_comparison

Write = Callable[..., Comparison]


@pytest.fixture
def load(tmp_path: Path, make_raw: Callable[..., dict[str, Any]]) -> Write:
    """Write a comparison beside its base and load it."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(make_raw()))

    def call(*overrides: str, **keys: Any) -> Comparison:
        raw = {"compare": "c", "base": "base.yaml", "arms": {"naive": ["method=sequential"], "lifelong": []}} | keys
        (tmp_path / "compare.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
        return load_comparison(tmp_path / "compare.yaml", overrides)

    return call


def test_defaults_and_names(load: Write) -> None:
    comparison = load()
    assert (comparison.settings.budget, comparison.settings.seeds) == (Budget.tokens, [0])
    assert [arm.name for arm in comparison.arms] == ["naive", "lifelong"]
    assert comparison.reference == "naive"
    assert comparison.run_name(comparison.arms[1], 3) == "c.lifelong.s3"
    assert load(reference="lifelong").reference == "lifelong"


def test_order_of_overrides(load: Write) -> None:
    comparison = load("routing.top_k=3", "method=sequential", arms={"two": ["routing.top_k=2"], "plain": []})
    two, plain = comparison.arms
    assert comparison.overrides(two, 2) == [
        "routing.top_k=3", "method=sequential", "routing.top_k=2", "run=c.two.s2", "seed=2"
    ]  # fmt: skip
    config = read_config(comparison.base, comparison.overrides(plain, 2)).config
    assert (config.run, config.seed, config.routing.top_k) == ("c.plain.s2", 2, 3)


def test_what_an_arm_refers_to_is_not_resolved(load: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "canary")
    refers = "tracking.experiment=${oc.env:SECRET}"
    comparison = load(arms={"one": [refers], "two": {"grid": {"model.experts": [4, 8]}, "set": [refers]}})
    assert "canary" not in str(comparison)  # overrides are recorded
    for arm in comparison.arms:
        assert read_config(comparison.base, comparison.overrides(arm, 0)).config.tracking.experiment == "canary"


def test_overrides_of_the_comparison_itself(load: Write) -> None:
    comparison = load("seeds=[4, 5]", "budget=flops", "compare=d", "arms.more=[routing.top_k=3]", "seeds[1]=6")
    settings = comparison.settings
    assert (settings.seeds, settings.budget, settings.compare) == ([4, 6], Budget.flops, "d")
    assert [arm.name for arm in comparison.arms] == ["naive", "lifelong", "more"]
    assert comparison.common == ()


def test_a_grid_is_every_combination(load: Write) -> None:
    grid = {"model.experts": [4, 8], "routing.top_k": [1, 2]}
    comparison = load(arms={"size": {"grid": grid, "set": ["routing.renormalize=false"]}, "naive": []})
    assert [arm.name for arm in comparison.arms] == [
        "size.experts-4.top_k-1", "size.experts-4.top_k-2", "size.experts-8.top_k-1", "size.experts-8.top_k-2", "naive"
    ]  # fmt: skip
    assert comparison.arms[1].overrides == ("routing.renormalize=false", "model.experts=4", "routing.top_k=2")
    assert [arm.entry for arm in comparison.arms] == ["size"] * 4 + ["naive"]


def test_labels_of_a_grid_tell_keys_and_values_apart(load: Write, tmp_path: Path) -> None:
    (arm,) = load(arms={"g": {"grid": {"model.experts": [4], "stages[1].grow.experts": [2]}}}).arms
    assert arm.name == "g.model.experts-4.grow.experts-2"
    grid = {"stage_defaults.optim.lr": [0.001], "model.tie_embeddings": [True], "stages[1].name": [None]}
    (arm,) = load(arms={"g": {"grid": grid}}).arms
    assert arm.name == "g.lr-0.001.tie_embeddings-true.name-null"
    assert arm.overrides == ("stage_defaults.optim.lr=0.001", "model.tie_embeddings=true", "stages[1].name=null")
    assert read_config(tmp_path / "base.yaml", list(arm.overrides)).config.stages[1].name == "python"


def test_selecting_arms(load: Write) -> None:
    comparison = load(arms={"size": {"grid": {"model.experts": [4, 8]}}, "naive": [], "lifelong": []})
    names = [arm.name for arm in comparison.select(["size", "lifelong"])]
    assert names == ["size.experts-4", "size.experts-8", "lifelong"]
    assert [arm.name for arm in comparison.select(["size.experts-8"])] == ["size.experts-8"]
    assert comparison.select([]) == comparison.arms
    with pytest.raises(ConfigError, match=r"--only=lifelon is unknown\. Did you mean lifelong\?"):
        comparison.select(["lifelon"])


MISTAKES: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
    ({}, ("modle.width=64",), r"^key modle is unknown\. Did you mean model\?"),
    ({}, ("sedes=[0]",), r"^key sedes is unknown\. Did you mean seeds\?"),
    ({"sedes": [0]}, (), r"^key sedes is unknown\. Did you mean seeds\?"),
    ({"arms": {"a": ["model.widht=3"]}}, (), r"^arm a: model\.widht: .*Did you mean"),
    ({"arms": {"a": [], "b": ["method=magic"]}}, (), r"^arm b: method: "),
    ({"arms": {"a": ["stages[1].grow.expert=3"]}}, (), r"^arm a: stages\[1\]\.grow\.expert: "),
    ({"arms": {"a": ["seed=3"]}}, (), r"^arm a: seed=3: set compare=NAME and seeds=\[…\] instead"),
    ({}, ("run=x",), r"^arm naive: run=x: set compare=NAME"),
    ({"arms": {"a": "method=sequential"}}, (), r"^arms\.a must be a list of key=value"),
    ({"arms": {"a": ["method"]}}, (), r"^arms\.a must be a list of key=value"),
    ({"arms": {}}, (), r"^arms is empty"),
    ({"arms": {"a b": []}}, (), r"^arm a b: its run would be named c\.a b\.s0; "),
    ({"arms": {"a": []}, "compare": "x" * 60}, (), r"^arm a: its run would be named x{60}\.a\.s0; at most 64"),
    ({"arms": {"a": []}, "compare": "x/y"}, (), r"^compare=x/y may hold"),
    ({"arms": {"g": {"grid": [1]}}}, (), r"^arms\.g\.grid must map keys to lists"),
    ({"arms": {"g": {"set": []}}}, (), r"^arms\.g\.grid must map keys to lists"),
    ({"arms": {"g": {"gird": {}}}}, (), r"^arms\.g: key=gird is unknown\. Did you mean grid\?"),
    ({"arms": {"g": {"grid": {"model.experts": 4}}}}, (), r"^arms\.g\.grid\.model\.experts must be a list"),
    ({"arms": {"g": {"grid": {"model.experts": []}}}}, (), r"^arms\.g\.grid\.model\.experts must be a list"),
    ({"arms": {"g": {"grid": {"model.experts": [[4]]}}}}, (), r"^arms\.g\.grid\.model\.experts must be a list"),
    ({"arms": {"g": {"grid": {"model.experts": [4]}, "set": "x=1"}}}, (), r"^arms\.g\.set must be a list"),
    ({"arms": {"g": {"grid": {"model.exprts": [4]}}}}, (), r"^arm g\.exprts-4: model\.exprts: "),
    (
        {"arms": {"g": {"grid": {"experts": [1], "model.experts": [4]}}}},
        (),
        r"^arm g\.experts-1\.model\.experts-4: key experts",
    ),
    ({"arms": {"g": {"grid": {"seed": [1, 2]}}}}, (), r"^arm g\.seed-1: seed=1: set "),
    ({"arms": {"g.experts-4": [], "g": {"grid": {"model.experts": [4]}}}}, (), r"^arm g\.experts-4 is there twice"),
    ({"arms": {"g": {"grid": {"model.experts": [4, 4]}}}}, (), r"^arm g\.experts-4 is there twice"),
    ({"reference": "naif"}, (), r"^reference=naif is unknown\. Did you mean naive\?"),
    ({"joint": "all"}, (), r"^joint=all is unknown\. There are lifelong, naive\."),
    ({"unrestrained": "all"}, (), r"^unrestrained=all is unknown"),
    ({"seeds": []}, (), r"^seeds=\[\] must hold at least one"),
    ({"seeds": [1, 1]}, (), r"^seeds=\[1, 1\] must hold"),
    ({"seeds": [-1]}, (), r"^seeds=\[-1\] must lie between"),
    ({"seeds": 3}, (), r"^seeds: "),
    ({"compare": float("inf")}, (), r"^compare=inf must be finite"),
    ({"budget": "flop"}, (), r"^budget: "),
    # What a token is, and which are counted, is the same for all arms.
    ({"arms": {"a": [], "b": ["tokenizer.vocab_size=512"]}}, (),
     r"^arm b: tokenizer\.vocab_size=512, but 4096 in arm a; .* would not compare"),
    ({"arms": {"a": [], "b": ["tokenizer.file=t.json"]}}, (), r"^arm b: tokenizer\.file=t\.json, but null in arm a; "),
    ({"arms": {"a": [], "b": ["stages=[{data: python}, {data: english}]"]}}, (),
     r"^arm b: tokenizer\.train_on=python, but english in arm a; "),
    ({"arms": {"a": [], "b": ["model.context=32"]}}, (), r"^arm b: model\.context=32, but 16 in arm a; "),
    ({"arms": {"a": [], "b": ["evaluate.tokens=9"]}}, (), r"^arm b: evaluate\.tokens=9, but 50000 in arm a; "),
    ({"arms": {"a": [], "b": ["distributions.python.heldout_fraction=0.2"]}}, (),
     r"^arm b: distributions\.python\.heldout_fraction=0\.2, but 0\.05 in arm a; "),
    ({"arms": {"a": ["evaluate.tokens=9"], "b": []}, "reference": "b"}, (),
     r"^arm a: evaluate\.tokens=9, but 50000 in"),
    ({"base": "bas.yaml"}, (), r"bas\.yaml: no such file\. Did you mean .*base\.yaml\?"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "overrides", "message"), MISTAKES)
def test_mistakes_cost_one_line(load: Write, keys: dict[str, Any], overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(*overrides, **keys)
    assert "\n" not in str(caught.value)


def test_what_changes_no_token_that_is_counted_is_compared(load: Write) -> None:
    file = "tokenizer.file=t.json"
    arms = {
        "plain": [file],
        "size_of_a_given_tokenizer": [file, "tokenizer.vocab_size=512"],
        "other_order": [file, "stages=[{data: python}, {data: english}]"],
        "fewer": [file, "stages=[{data: english}]", "distributions.python.heldout_fraction=0.2"],  # not measured on it
        "shape": [file, "model.width=32", "evaluate.batch_tokens=64", "routing.mode=label"],
        "twice_the_text": [file, "distributions.english.max_bytes=9"],  # its held-out text is looked at later
    }
    assert [arm.name for arm in load(arms=arms).arms] == list(arms)
