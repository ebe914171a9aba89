"""Sentences of the documentation that a plan or a file of results can prove, held against them."""

from __future__ import annotations

import functools
import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from lifelong_moe.config.load import read_config
from lifelong_moe.data.tokens.identity import DataIdentity, TokenizerIdentity
from lifelong_moe.plan.cost import forward_flops_per_token
from lifelong_moe.plan.planned import PlannedStage
from lifelong_moe.plan.stages import chain, plan_stages
from lifelong_moe.reports.seeds import over_seeds

ROOT = Path(__file__).parents[2]
BUNDLES = """model.experts=8 stage_defaults.grow.experts=4 stage_defaults.grow.router=copy routing.bundles=cluster
routing.chunk_tokens=4 stage_defaults.trunk.rank=44 stage_defaults.trunk.train=deltas stage_defaults.replay.fraction=0
stage_defaults.distill.weight=0 stage_defaults.optim.rewarm=2.0 stage_defaults.tokens=200_000"""


FULL = ("routing.bundles=none", "stage_defaults.trunk.train=full")
REPLAY = (
    "routing.bundles=none", "stage_defaults.trunk.train=gentle", "stage_defaults.replay.fraction=0.2",
    "stage_defaults.distill.weight=0.5", "stage_defaults.distill.text=replay", "stage_defaults.review.fraction=0.1",
)  # fmt: skip
EWC = (*FULL, "method=ewc", "stage_defaults.replay.buffer_tokens=20000")
JOINT = (*FULL, "method=joint")


def page(name: str) -> str:
    """A page in one line."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def planned(name: str, overrides: list[str]) -> list[PlannedStage]:
    """The chain of stages of a configuration, without its text."""
    config = read_config(ROOT / "configs" / name, overrides).config
    names = {distribution: distribution for distribution in config.distributions}
    data = DataIdentity(names, TokenizerIdentity({}, ""), config.tokenizer.vocab_size, bos_id=0)
    return chain(plan_stages(config, data))


def by_token(stage: PlannedStage) -> float:
    return stage.flops / stage.tokens


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ((), ("b8d880872ad592c6", "dc6a0a286fec6fd6", "8cbc8c24e7a39090")),
        (("routing.mixture=null",), ("b8d880872ad592c6", "76f505df53c85e93", "b2027ac3827c2b15")),
        (REPLAY, ("b8d880872ad592c6", "273f4c59f0fb725f", "bf3597e41a1837a8")),
        (EWC, ("b8d880872ad592c6", "8a591c007bc2cdc6", "8d383fb1946bbd35")),
        (JOINT, ("be884d144c4f1ee4",)),
    ],
    ids=["quickstart", "selection", "replay", "ewc", "joint"],
)
def test_a_new_version_finds_the_stages_of_the_one_before(overrides: tuple[str, ...], keys: tuple[str, ...]) -> None:
    """Whoever changes these values trains everybody's stages anew: raise ``SCHEMA``, and say so."""
    assert tuple(stage.key[:16] for stage in planned("quickstart.yaml", [*overrides])) == keys


def test_what_a_token_costs_on_the_quickstart() -> None:
    text, stages = page("README.md"), planned("quickstart.yaml", [])
    first, second, third = (stage.parameters.active for stage in stages)
    # By hand: of rank 110, rows plus columns of the embedding, the head, and each layer's four attention matrices (of
    # width 128, two heads of 32 for keys and values); and two new rows of width 128 in each of four routers.
    changes = 110 * (2 * (4096 + 128) + 4 * (2 * (128 + 128) + 2 * (128 + 64)))
    rows = 4 * 2 * 128
    assert (second - first, third - second) == (changes + rows, rows)
    assert f"{first / 1e6:.2f} M active parameters in the first stage, {second / 1e6:.2f} M in the second" in text
    assert f"(+{second / first - 1:.0%}) and {rows:,} more".replace("%)", " %)") in text
    more, further = by_token(stages[1]) / by_token(stages[0]) - 1, by_token(stages[2]) / by_token(stages[1]) - 1
    assert f"the second stage takes {100 * more:.1f} % more FLOPs a token than the first" in text
    assert f"the third {100 * further:.1f} % more than the second" in text
    assert f"`plan` counts {sum(stage.flops for stage in stages) / 1e12:.2f}e+12 FLOPs for the quickstart" in text
    assert f"by {100 * more:.1f} % at the quickstart's second stage, {100 * further:.1f} % at its third" in text


def test_what_a_token_costs_on_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIFELONG_DATA", "nowhere")
    stages = planned("bench.yaml", BUNDLES.split())
    more = re.search(r"the last of four stages takes ([\d.]+) % more than the first", page("README.md"))
    assert more is not None
    assert more[1] == f"{100 * (by_token(stages[-1]) / by_token(stages[0]) - 1):.1f}"


def test_what_a_sampled_token_costs() -> None:
    newest = planned("quickstart.yaml", [])[-1].architecture
    # By hand: a row times both factors of the head's change and of the attention matrices', multiply-adds times two.
    changes = 2 * 110 * ((4096 + 128) + 4 * (2 * (128 + 128) + 2 * (128 + 64)))
    plain = forward_flops_per_token(newest)
    told = f"Sampling one text takes {(plain + changes) / 1e6:.1f} MFLOP a token and generation that reads it"
    assert f"{told}, {changes / 1e6:.1f} of them" in page("README.md")


Arms = dict[str, dict[str, Any]]


@functools.cache
def arms(name: str) -> Arms:
    """The arms of a comparison as it was measured, by name."""
    kept = json.loads((ROOT / f"docs/results/{name}.json").read_text(encoding="utf-8"))
    return {arm["name"]: arm for arm in kept["arms"]}


def of_seed_0(arm: str) -> dict[str, Any]:
    return next(run for run in arms("bench")[arm]["runs"] if run["seed"] == 0)


def number(arm: str, key: str) -> float:
    return float(of_seed_0(arm)["numbers"][key])


PAIRS = {
    "grow": "naive",
    "grow_replay5": "replay5",
    "grow_kl": "kl",
    "grow_kl_strong": "kl_strong",
    "grow_kl_generated25": "kl_generated25",
}
"""Arms that grow under one router, and the same without growth."""


def test_growth_under_one_router_is_called_what_it_is() -> None:
    """It forgets less and learns less; that it is worse in everything was said once, and was not so."""
    for grown, same in PAIRS.items():
        without = [one for one in arms("bench")[grown]["overrides"] if not one.startswith("method=")]
        for override in arms("bench")[same]["overrides"]:  # but for growth they are one configuration
            assert override.startswith("method=") or "grow.experts=0" in override or override in without

    def more(key: str) -> list[float]:
        return [number(grown, key) - number(same, key) for grown, same in PAIRS.items()]

    assert all(difference < 0 for difference in more("forgetting_mean"))
    assert sum(difference < 0 for difference in more("forgetting_max")) == 4
    gaps = sorted(100 * difference for difference in more("plasticity_gap"))
    behind = sorted(more("final_mean_bits_per_byte"))
    text, results = page("README.md"), page("docs/results.md")
    assert f"(plasticity gap {gaps[0]:.0f} to {gaps[-1]:.0f} points wider)" in text
    assert f"(Y {gaps[0]:.0f} to {gaps[-1]:.0f} points more)" in results
    assert f"four of the five end {behind[1]:.2f} to {behind[-1]:.2f} bits per byte behind" in text
    assert f"(`grow` ends {-behind[0]:.3f} ahead)" in results


def test_what_distillation_leaves_of_forgetting() -> None:
    shares = [number("kl", "forgetting_max") / number("replay5", "forgetting_max")]
    shares.append(max(of_seed_0("kl")["forgetting"].values()) / max(of_seed_0("replay5")["forgetting"].values()))
    points = 100 * (number("kl", "plasticity_gap") - number("replay5", "plasticity_gap"))
    text = page("docs/results.md")
    assert f"reduces forgetting to {shares[0]:.2f} of that replay's" in text and f"in nats {shares[1]:.2f})" in text
    assert f"at a cost of {points:.1f} points of plasticity (`kl` against `replay5`)" in text


def test_what_is_said_of_a_base_that_has_learned_something() -> None:
    measured, text, results = arms("trained_base"), page("README.md"), page("docs/results.md")

    def interval(found: dict[str, float], scale: float, form: str) -> tuple[str, str]:
        return format(scale * found["mean"], form), format(scale * (found["high"] - found["mean"]), form)

    own, naive, replay = (measured[name]["summary"] for name in ("lifelong", "naive", "replay25"))
    learned = "{} ± {} %".format(*interval(own["plasticity_gap_mean"], 100, ".1f"))
    assert (
        f"learned to within {learned} of the perplexity" in text
        and f"{learned} of perplexity behind `naive`" in results
    )
    ahead = measured["lifelong"]["differences"]["final_mean_bits_per_byte"]
    mean, half = interval(ahead, 1, ".3f")
    assert f"ends {mean.removeprefix('-')} ± {half} bits per byte behind (p = {ahead['p']:.4f})" in text
    assert f"95 % interval {-ahead['high']:.3f} to {-ahead['low']:.3f}, three seeds, p = {ahead['p']:.4f})" in results
    assert f"perplexity rose by {100 * own['forgetting_max']['mean']:.1f} %" in text
    assert round(1 + naive["forgetting_max"]["mean"]) == 20 and "raised it twentyfold" in text
    assert "loses {} ± {} % of perplexity".format(*interval(replay["forgetting_max"], 100, ".0f")) in results
    assert "{} ± {} % on the worst of them".format(*interval(own["plasticity_gap"], 100, ".1f")) in results

    def behind(name: str, key: str) -> list[float]:
        ends = ([run["numbers"][key] for run in measured[arm]["runs"]] for arm in (name, "lifelong"))
        return [theirs - ours for theirs, ours in zip(*ends, strict=True)]

    bits, nats = behind("lora", "final_mean_bits_per_byte"), over_seeds(behind("lora", "final_mean_nats"))
    assert nats is not None and nats.low is not None and nats.high is not None
    assert f"`lora` ends {bits[0]:.3f}, {bits[1]:.3f} and {bits[2]:.3f} bits per byte behind `lifelong`" in results
    assert f"{nats.mean:.3f} nats a token (95 % interval {nats.low:.3f} to {nats.high:.3f}" in results
    mean, half = interval(asdict(over_seeds(bits)), 1, ".3f")
    assert f"strongest alternative, {mean} ± {half} bits per byte behind" in text
    many = over_seeds(behind("static24_replay25", "final_mean_nats"))
    assert many is not None and many.low is not None and many.high is not None
    assert f"{many.mean:.2f} nats a token ({many.low:.2f} to {many.high:.2f}" in results


FILES = {
    "trained_base": ("trained_base.yaml", "trained_base_arms.yaml", []),
    "trained_base_rates": ("trained_base.yaml", "trained_base_arms.yaml", []),
    "trained_base_stored": ("trained_base.yaml", "trained_base_arms.yaml", []),
    "bench": ("bench.yaml", "bench_arms.yaml", ["stage_defaults.tokens=200_000"]),
    "capacity": ("capacity.yaml", "capacity_arms.yaml", []),
    "capacity8": ("capacity.yaml", "capacity_arms.yaml", []),
    "systems": ("bench.yaml", "systems_arms.yaml", ["stage_defaults.tokens=150_000"]),
}


SAID_SINCE = {"static32_alone": "method=sequential"}
"""By arm, what its configuration has to say by now, and what changes nothing."""


@pytest.mark.parametrize("name", FILES)
def test_commands_of_comparisons_give_the_arms_that_were_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arms today are those of the table: the same overrides, tokens and parameters."""
    monkeypatch.setenv("LIFELONG_DATA", "nowhere")
    base, file, overrides = FILES[name]
    today = yaml.safe_load((ROOT / "configs" / file).read_text(encoding="utf-8"))["arms"]
    # What was measured before generations could predict together says so now, and so does what nothing holds.
    since = {"routing.mixture=null"}
    then = {arm: [one for one in today[arm] if one not in since | {SAID_SINCE.get(arm)}] for arm in arms(name)}
    assert then == {arm: one["overrides"] for arm, one in arms(name).items()}
    # All shapes of the small comparisons; of the bench those that differ, of which a plan takes a quarter of a second.
    shown = ("joint", "dense", "grow_kl", "bundles", "static22_kl_replay25", "label") if name == "bench" else arms(name)
    for arm in shown:
        measured = arms(name)[arm]
        stages, numbers = planned(base, [*overrides, *today[arm]]), measured["runs"][0]["numbers"]
        found = (sum(stage.tokens for stage in stages), *counted(stages[-1]))
        assert found == tuple(numbers[key] for key in ("tokens", "parameters_total", "parameters_active")), arm


def counted(stage: PlannedStage) -> tuple[int, int]:
    return stage.parameters.total, stage.parameters.active


def commands(name: str) -> list[list[str]]:
    """Words of each fenced ``lifelong-moe run`` of a page."""
    blocks = re.findall(r"```\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [one[2:] for one in words if one[:2] == ["lifelong-moe", "run"]]


def test_commands_of_earlier_defaults_give_the_shapes_of_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIFELONG_DATA", "nowhere")
    found = {}
    for file, *overrides in commands("docs/results.md"):
        stages = planned(Path(file).name, overrides)
        name = next(one.removeprefix("run=") for one in overrides if one.startswith("run="))
        experts = [stage.architecture.num_experts for stage in stages]
        found[name] = (stages[0].tokens, experts, f"{stages[-1].parameters.total / 1e6:.2f}")
    assert found == {  # as the page says, and as the configurations of those commits had it
        "lifelong-0": (249_856, [4, 6, 10], "5.18"),
        "naive-0": (249_856, [4, 4, 4], "2.82"),
        "clustered": (249_856, [4, 6, 10], "5.18"),
        "by-document": (249_856, [4, 6, 10], "5.18"),
        "four-earlier": (399_360, [4, 6, 8, 10], "5.18"),
        "four-naive": (399_360, [4, 4, 4, 4], "2.82"),
        "written": (598_016, [8, 8], "4.40"),
        # Without the rows of tokens that are added, whose number is found in the text.
        **dict.fromkeys(("german", "german-2000", "german-2000-text"), (399_360, [8, 12], "6.50")),
    }
    text = page("docs/results.md")
    assert "4 → 6 → 10 experts per layer under `lifelong` (5.18 M parameters in the end)" in text
    assert "Three stages of 249,856 tokens" in text and "Four stages of 399,360 tokens" in text


def test_flops_by_the_current_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIFELONG_DATA", "nowhere")
    text, checked = page("docs/results.md"), 0
    sentence = text[text.index("Whole runs by the current count") :].split("arms in which everything trains")[0]
    for arm, now, then in re.findall(r"`(\w+)` ([\d.]+)e\+12 \(([\d.]+)(?:e\+12 before)?\)", sentence):
        name = next(name for name in FILES if arm in arms(name))
        base, _, overrides = FILES[name]
        stages = planned(base, [*overrides, *arms(name)[arm]["overrides"]])
        assert f"{sum(stage.flops for stage in stages) / 1e12:.2f}" == now, arm
        assert f"{arms(name)[arm]['runs'][0]['numbers']['active_flops'] / 1e12:.2f}" == then, arm
        checked += 1
    assert checked == 6


def test_mutants_that_are_not_noticed_are_listed() -> None:
    found = json.loads((ROOT / "docs/results/mutation.json").read_text(encoding="utf-8"))
    rooms, kinds = found["rooms"], ("change_nothing", "survive")
    assert sum(room["mutants"] for room in rooms) == 600
    for room in rooms:
        assert room["mutants"] == sum(room[kind] for kind in ("noticed", *kinds))
        assert room["noticed"] >= 0.97 * (room["mutants"] - room["change_nothing"])
        listed = [one for one in found["not_noticed"] if one["file"].split("/")[1] == room["room"]]
        assert sum(one["mutants"] for one in listed) == sum(room[kind] for kind in kinds)
        assert all(one["reason"] for one in listed)
    noticed, nothing = (sum(room[name] for room in rooms) for name in ("noticed", "change_nothing"))
    assert f"tests notice {noticed} of the {600 - nothing} that change anything" in page("CONTRIBUTING.md")


def test_what_the_quickstart_s_default_pays_for_what_it_keeps() -> None:
    found = json.loads((ROOT / "docs/results/quickstart.json").read_text(encoding="utf-8"))
    default, naive = (report["bits_per_byte"] for report in found["reports"])
    first, second = (default[i][i] - naive[i][i] for i in (1, 2))
    assert f"the two new distributions {first:.2f} and {second:.2f} bits per byte" in page("README.md")
    assert f"That is {(first + second) / 2:.2f} in the mean" in page("README.md")
