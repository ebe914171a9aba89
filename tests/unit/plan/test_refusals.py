"""What a new run is refused, because it would not be what it is called, or would forget what it promises to keep."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from lifelong_moe.config.load import build_config
from lifelong_moe.config.parts import Part
from lifelong_moe.config.run import Method, RunConfig
from lifelong_moe.config.yaml_file import apply_override, read_yaml
from lifelong_moe.data.tokens.identity import DataIdentity, TokenizerIdentity
from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.stages import plan_stages
from tests.conftest import build_raw

ROOT = Path(__file__).parents[3] / "configs"
RUNS = ["quickstart", "bench", "capacity", "four_distributions", *(f"presets/{p.stem}" for p in ROOT.glob("presets/*"))]
TOKENIZER = TokenizerIdentity({"vocab_size": 300}, "t")
MakeRun = Callable[..., RunConfig]


def keys(config: RunConfig) -> list[str]:
    """Stage keys, later ones after the first."""
    return [
        stage.key
        for stage in plan_stages(
            config, DataIdentity({n: n for n in config.distributions}, TOKENIZER, vocab_size=300, bos_id=0)
        )
    ]


def build(raw: DictConfig, *overrides: str) -> RunConfig:
    raw = raw.copy()
    for override in overrides:
        apply_override(raw, override)
    return build_config(raw)


@pytest.mark.parametrize("name", RUNS)
def test_every_method_does_something_or_says_what_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each configuration that is shipped; what the refusal says makes it start, and differ from plain training."""
    monkeypatch.setenv("LIFELONG_DATA", "/somewhere")
    raw = read_yaml(ROOT / f"{name}.yaml")
    naive = keys(build(raw, "method=sequential"))
    for method in set(Method) - {Method.sequential}:
        try:
            found = keys(build(raw, f"method={method}"))
        except ConfigError as error:
            assert error.exit_code == 2
            said = re.search(rf"method={method} with [\w.]+=0 .* Set (.*)\.$", str(error))
            assert said is not None, error
            found = keys(build(raw, f"method={method}", *said[1].split(" ")))
        assert found[1:] != naive[1:], method


def test_the_quickstart_lacks_old_text_and_a_teacher() -> None:
    raw = read_yaml(ROOT / "quickstart.yaml")
    for method, key, value in (("replay", "replay.fraction", 0.25), ("lwf", "distill.weight", 0.5)):
        with pytest.raises(ConfigError) as caught:
            build(raw, f"method={method}")
        assert str(caught.value) == (
            f"method={method} with {key}=0 in every later stage is method=sequential. Set stage_defaults.{key}={value}."
        )


@pytest.mark.parametrize(
    ("method", "key", "default"),
    [
        ("replay", "replay.fraction", "0.25"),
        ("lwf", "distill.weight", "0.5"),
        ("l2", "penalty.weight", "0.1"),
        ("ewc", "penalty.weight", "1000.0"),
        ("static_moe", "grow.experts", "2"),
    ],
)
def test_a_method_without_its_part_is_refused(make_run: MakeRun, method: str, key: str, default: str) -> None:
    part, name = key.split(".")
    three = [{"data": "english"}, {"data": "python"}, {"data": "python", part: {name: 0}}]
    refused = f"method={method} with {key}=0 in every later stage is method=sequential. Set "
    with pytest.raises(ConfigError, match=re.escape(f"{refused}stage_defaults.{key}={default}.")):
        make_run(f"method={method}", f"stage_defaults.{key}=0")
    with pytest.raises(ConfigError, match=re.escape(f"{refused}stage_defaults.{key}={default} stages[2].{key}=")):
        make_run(f"method={method}", f"stage_defaults.{key}=0", stages=three)
    with pytest.raises(ConfigError, match=re.escape(f"{refused}stages[1].{key}={default}.")):
        make_run(f"method={method}", f"stages[1].{key}=0")
    one = make_run(f"method={method}", f"stage_defaults.{key}=0", f"stages[2].{key}={default}", stages=three)
    assert keys(one)[1:] != keys(make_run("method=sequential", stages=three))[1:]  # one stage has it: on purpose
    alone = make_run(f"method={method}", f"stage_defaults.{key}=0", stages=[{"data": "english"}])
    assert keys(alone) == keys(make_run("method=sequential", stages=[{"data": "english"}]))  # nothing to forget yet


BUNDLES = ("model.document_mask=true", "routing.bundles=label")


@pytest.mark.parametrize("train", ["gentle", "full"])
def test_bundles_refuse_a_trunk_that_moves(make_run: MakeRun, train: str) -> None:
    moves = (*BUNDLES, f"stage_defaults.trunk.train={train}")
    with pytest.raises(ConfigError) as caught:
        make_run(*moves)
    assert str(caught.value) == (
        f"stages[1].trunk.train={train} changes what old bundles compute, and routing.bundles=label keeps them as they "
        f"are. Set stages[1].trunk.train=deltas (or frozen), or routing.bundles=none and replay."
    )
    stored = build(OmegaConf.create(build_raw()), *BUNDLES[:1], "stage_defaults.trunk.train=frozen", BUNDLES[1])
    assert stored.stages[1].trunk.train == "frozen"
    raw = OmegaConf.create(build_raw())
    for override in moves:
        apply_override(raw, override)
    assert build_config(raw, is_stored=True).stages[1].trunk.train == train  # an earlier version let it be
    assert len(keys(make_run(*moves, "method=sequential"))) == 2  # without growth there are no bundles
    assert len(keys(make_run(*moves, "routing.bundles=none", "routing.mode=label"))) == 2  # its trunk is everybody's


def test_fine_tuning_of_experts_alone_moves_no_trunk(make_run: MakeRun) -> None:
    tuned = {
        "distributions": {"english": {"builtin": "english_docs"}, "qa": {"files": "a.jsonl", "answer_field": "a"}},
        "stages": [{"data": "english"}, {"data": "qa", "kind": "finetune", "trunk": {"train": "full"}}],
    }
    assert make_run(*BUNDLES, "stages[1].finetune.trainable=moe", **tuned)
    for trainable in ("all", "non_moe", "attention"):
        with pytest.raises(ConfigError, match="changes what old bundles compute"):
            make_run(*BUNDLES, f"stages[1].finetune.trainable={trainable}", **tuned)


@pytest.mark.parametrize("train", ["frozen", "deltas"])
def test_what_bundles_may_train_is_new(make_run: MakeRun, train: str) -> None:
    """With a frozen trunk a stage trains its own experts and router rows; with deltas its low-rank changes too."""
    config = make_run(*BUNDLES, f"stage_defaults.trunk.train={train}")
    hashes = {name: name for name in config.distributions}
    planned = plan_stages(config, DataIdentity(hashes, TOKENIZER, vocab_size=300, bos_id=0))[1]
    trains = {
        (part, generation)
        for part in Part
        for generation in (None, 0, 1)
        if planned.spec.trains_part(planned.architecture, part, generation)
    }
    assert {generation for _, generation in trains} == {1}
