"""A user's mistake costs one clear line that names the full key."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from lifelong_moe.config.growth import ExpertInit
from lifelong_moe.config.load import build_config, overridden, read_config, whole_config, written_config
from lifelong_moe.config.routing.base import Level
from lifelong_moe.config.run import Method, RunConfig, StageConfig
from lifelong_moe.config.sections import run_keys, suggestion
from lifelong_moe.config.yaml_file import read_yaml
from lifelong_moe.errors import ConfigError
from tests.tiny import tiny_config, write_config

YAML = """\
run: tiny
distributions: {english: {builtin: english_docs}, python: {builtin: python_code}}
model: {layers: 2, width: 16, heads: 4, kv_heads: 2, expert_width: 8, experts: 4, context: 16}
stage_defaults: {tokens: 640, grow: {experts: 2, init: copy}, optim: {batch_tokens: 64}}
stages: [{data: english}, {data: python}]
"""
Load = Callable[..., RunConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Write a file, load it with overrides."""

    def write_and_load(*overrides: str, text: str | bytes = YAML) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_config(path, list(overrides)).config

    return write_and_load


def error(load: Load, *overrides: str, text: str | bytes = YAML) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides, text=text)
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_code == 2
    return message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("run: a\nmodel:\n\twidth: 64\n", 3),
        ("run: a\nmodel:\n  width: 64\n\tlayers: 2\n", 4),
        ("run: a\nstages:\n  - data: x\n  \ttokens: 1\n", 4),
    ],
)
def test_a_tab_is_called_by_its_name(load: Load, text: str, line: int) -> None:
    assert error(load, text=text).endswith(f"run.yaml:{line}: indented with a tab; YAML takes spaces only.")


def test_a_tab_between_key_and_value_is_a_space(load: Load) -> None:
    assert load(text=YAML.replace("run: ", "run:\t")).run == "tiny"


def test_a_configuration_may_come_out_of_a_pipe() -> None:
    """As ``<(sed …)`` and ``-`` give it."""
    reading, writing = os.pipe()
    os.write(writing, YAML.encode())
    os.close(writing)
    assert read_config(f"/dev/fd/{reading}", ["seed=2"]).config.seed == 2
    os.close(reading)
    reading, writing = os.pipe()
    os.write(writing, b"run: [\n")
    os.close(writing)
    before = os.dup(0)
    os.dup2(reading, 0)
    try:
        with pytest.raises(ConfigError, match=r"^/dev/stdin:2: "):
            read_config("-")
    finally:
        os.dup2(before, 0)
        os.close(before)
        os.close(reading)


def test_defaults_are_merged_under_each_stage(load: Load) -> None:
    config = load("stage_defaults.grow.experts=3", "stages[1].grow.init=random")
    assert [stage.tokens for stage in config.stages] == [640, 640]
    assert [stage.grow.experts for stage in config.stages] == [3, 3]
    assert [stage.grow.init for stage in config.stages] == [ExpertInit.copy, ExpertInit.random]
    assert [stage.name for stage in config.stages] == ["english", "python"]
    assert config.method is Method.lifelong and config.evaluated == ["english", "python"]


OVERRIDES: list[tuple[str, Callable[[RunConfig], Any], Any]] = [
    ("seed=7", lambda c: c.seed, 7),
    ("method=sequential", lambda c: c.method, Method.sequential),
    ("run=other", lambda c: c.run, "other"),
    ("run=1", lambda c: c.run, "1"),
    ("stages[1].grow.experts=4", lambda c: [s.grow.experts for s in c.stages], [2, 4]),
    ("stages.1.tokens=704", lambda c: [s.tokens for s in c.stages], [640, 704]),
    ("stages[1].grow={experts: 3, noise: 0.5}", lambda c: (c.stages[1].grow.experts, c.stages[1].grow.noise), (3, 0.5)),
    ("stage_defaults.optim.lr=1e-2", lambda c: c.stages[0].optim.lr, 0.01),
    ("evaluate.also=[python]", lambda c: c.evaluate.also, ["python"]),
    ("stages=[{data: python}]", lambda c: [s.name for s in c.stages], ["python"]),
    ("distributions.c={builtin: cpp_headers}", lambda c: sorted(c.distributions), ["c", "english", "python"]),
    ("tracking.uri=sqlite:///a=b.db", lambda c: c.tracking.uri, "sqlite:///a=b.db"),
    ("tracking.uri=null", lambda c: c.tracking.uri, None),
    ("routing.clusters=2", lambda c: c.routing.clusters, 2),
    ("trainer.devices=[1]", lambda c: c.trainer.devices, [1]),
    ("trainer.devices=auto", lambda c: c.trainer.devices, "auto"),
    ("model.tie_embeddings=true", lambda c: c.model.tie_embeddings, True),
    ("tokenizer.train_on=english", lambda c: c.tokenizer.train_on, "english"),
]


@pytest.mark.parametrize(("override", "read", "expected"), OVERRIDES, ids=[o[0] for o in OVERRIDES])
def test_overrides(load: Load, override: str, read: Callable[[RunConfig], Any], expected: Any) -> None:
    assert read(load(override)) == expected


def test_later_overrides_win(load: Load) -> None:
    assert load("seed=1", "seed=2").seed == 2


def test_what_was_built_before_is_built_again(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load()
    width, tokens = first.model.width, first.stages[0].tokens
    first.model.width, first.stages[0].tokens = -1, -1  # whoever has one may change it
    assert (load().model.width, load().stages[0].tokens) == (width, tokens)
    monkeypatch.setenv("WIDTH", "32")
    assert load("model.width=${oc.env:WIDTH}").model.width == 32
    monkeypatch.setenv("WIDTH", "48")  # what is written is the same, what it says is not
    assert load("model.width=${oc.env:WIDTH}").model.width == 48
    assert load("seed=1", "stages[0].grow.experts=1").stages[0].grow.experts == 1
    for _ in range(2):  # true equals 1, but is no number; and what was refused is refused again
        with pytest.raises(ConfigError, match="could not be converted"):
            load("stages[0].grow.experts=true")


def test_only_plain_dataclasses_come_out(load: Load) -> None:
    config = load("routing.mode=a.b.C", "routing.options={x: {y: [1]}}")
    assert type(config.routing.options) is dict and type(config.routing.options["x"]["y"]) is list
    assert type(config.stages) is list and type(config.distributions) is dict
    assert load("routing.mode=cluster").routing.level is Level.token


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("modle.layers=3", "key modle is unknown. Did you mean model?"),
        ("model.layer=3", "model.layer: there is no key 'layer'. Did you mean: 'layers'?"),
        ("routing.topk=3", "routing.topk: there is no key 'topk'. Did you mean: 'top_k'?"),
        (
            "trainer.precisoin=x",
            "trainer.precisoin: there is no key 'precisoin'. Did you mean: 'precision'?",
        ),
        (
            "stages[1].grow.expert=3",
            "stages[1].grow.expert: there is no key 'expert'. Did you mean: 'experts'?",
        ),
        (
            "trainer.gradient_clip_val=1",
            "trainer.gradient_clip_val: there is no key 'gradient_clip_val'. Did you mean: 'gradient_clip'?",
        ),
        ("stages[0].token=3", "stages[0].token: there is no key 'token'. Did you mean: 'tokens'?"),
        (
            "stage_defaults.grow.expert=3",
            "stage_defaults.grow.expert: there is no key 'expert'. Did you mean: 'experts'?",
        ),
        (
            "distributions.english.bultin=x",
            "distributions.english.bultin: there is no key 'bultin'. Did you mean: 'builtin'?",
        ),
        ("stages[0].data=englsh", "stages[0].data=englsh is unknown. Did you mean english?"),
        ("evaluate.also=[python, pyton]", "evaluate.also[1]=pyton is unknown. Did you mean python?"),
    ],
)
def test_a_typo_shows_the_full_path_and_what_was_meant(load: Load, override: str, expected: str) -> None:
    assert error(load, override) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=1", "key optim is unknown. Did you mean stage_defaults.optim.lr?"),
        ("optim.learning_rate=1", "key optim is unknown. Did you mean stage_defaults.optim.lr?"),
        ("learning_rate=1", "key learning_rate is unknown. Did you mean stage_defaults.optim.lr?"),
        ("model.hidden_size=8", "model.hidden_size: there is no key 'hidden_size'. Did you mean model.width?"),
        ("optm={lr: 1}", "key optm is unknown. Did you mean stage_defaults.optim.lr?"),
        ("tokens=5", "key tokens is unknown. Did you mean evaluate.tokens or stage_defaults.tokens?"),
        ("top_k=2", "key top_k is unknown. Did you mean routing.top_k?"),
        ("files=x", "key files is unknown. Did you mean distributions.NAME.files?"),
        ("stages[0].lr=1", "stages[0].lr: there is no key 'lr'. Did you mean stages[0].optim.lr?"),
        ("stage_defaults.lr=1", "stage_defaults.lr: there is no key 'lr'. Did you mean stage_defaults.optim.lr?"),
        ("stages[1].optim.experts=1", "stages[1].optim.experts: there is no key 'experts'. Did you mean "
         "stages[1].grow.experts?"),
        ("model.lr=1", "model.lr: there is no key 'lr'. Did you mean stage_defaults.optim.lr?"),
        ("model.zzz=1", "model.zzz: there is no key 'zzz'"),
    ],
)  # fmt: skip
def test_a_key_of_another_section_is_found(load: Load, override: str, expected: str) -> None:
    assert error(load, override) == expected


def test_suggested_keys_are_keys() -> None:
    """Each can be set where it is said to stand, whatever else may then be missing."""
    assert {"stage_defaults.optim.lr", "routing.chunk_tokens", "trainer.devices"} <= run_keys()
    assert not [key for key in run_keys() if key.startswith("base")]
    assert all(suggestion(key, whole=True).startswith(" Did you mean") for key in run_keys())


def test_an_unknown_key_near_nothing_lists_what_there_is(load: Load) -> None:
    message = error(load, "zzz=3")
    assert message.startswith("key zzz is unknown. There are base, checkpoint, distributions, ")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=abc", "seed: Value 'abc' of type 'str' could not be converted to Integer"),
        ("seed=1.5", "seed: Value '1.5' of type 'float' could not be converted to Integer"),
        ("seed=true", "seed: Value 'True' of type 'bool' could not be converted to Integer"),
        ("model.layers=two", "model.layers: Value 'two' of type 'str' could not be converted to Integer"),
        ("model.layers=null", "model.layers: must not be null"),
        ("run=", "run: must not be null"),
        ("method=null", "method: must not be null"),
        ("stages[0].grow=null", "stages[0].grow: must not be null"),
        ("stages[0].optim=7", "stages[0]: must be a mapping; got 7"),
        ("model.layers=[2]", "model.layers: Value '[2]' of type 'list' could not be converted to Integer"),
        ("model.layers={a: 2}", "model.layers: Value '{'a': 2}' of type 'mapping' could not be converted to Integer"),
        (
            "method=lifelnog",
            "method: Invalid value 'lifelnog', expected one of [lifelong, sequential, static_moe, replay, "
            "l2, ewc, lwf, joint, unrestrained]",
        ),
        ("routing.score=sigmoyd", "routing.score: Invalid value 'sigmoyd', expected one of [softmax, sigmoid]"),
        ("routing.level=document", "routing.level is for routing.mode=cluster, not for learned. Leave it out."),
        ("routing.second=random", "routing.second is for routing.mode=gshard, not for learned. Leave it out."),
        (
            "routing={mode: hash, bias_rate: 1}",
            "routing.bias_rate is for routing.mode=learned or switch, not for hash. Leave it out.",
        ),
        (
            "routing={mode: label, options: {x: 1}}",
            "routing.options is for routers named by dotted path, not for label. Leave it out.",
        ),
        ("model=3", "model must be a mapping; got 3."),
        ("distributions=null", "distributions must be a non-empty mapping."),
        ("distributions.english=3", "distributions.english must be a mapping; got 3."),
        ("stage_defaults=3", "stage_defaults must be a mapping."),
        ("stages=[english]", "stages[0] must be a mapping with at least data: NAME; got 'english'."),
        ("stages=3", "stages must be a list, such as stages: [{data: english_docs}, {data: python_code}]."),
        (
            "base=quickstart.yaml",
            "base=quickstart.yaml names a run's configuration in files of lifelong-moe compare and retrain, and this "
            "is a run's own. A checkpoint to begin with is model.from=FOLDER.",
        ),
    ],
)
def test_a_value_of_the_wrong_kind(load: Load, override: str, expected: str) -> None:
    assert error(load, override) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stage_defaults.optim.lr=.nan", "stages[0].optim.lr=nan must be finite."),
        ("stages[1].optim.lr=.inf", "stages[1].optim.lr=inf must be finite."),
        ("run=.inf", "run=inf must be finite."),
        ("tracking.experiment=.nan", "tracking.experiment=nan must be finite."),
        ("routing.z_loss=.nan", "routing.z_loss=nan must be finite."),
        ("routing.mode=a.b routing.options={x: [1, .inf]}", "routing.options.x[1]=inf must be finite."),
        ("seed=-1", "seed=-1 must lie between 0 and 2**32 - 1."),
        ("seed=4294967296", "seed=4294967296 must lie between 0 and 2**32 - 1."),
        ("run=a/b", "run=a/b may hold letters, digits, '_', '-' and '.' only."),
        ("stages=[]", "stages is empty; a run needs at least one, such as stages: [{data: NAME}]."),
        ("stages[1].optim.lr=-1", "stages[1].optim.lr=-1.0 must be positive."),
        ("stages[1].tokens=0", "stages[1].tokens=0 must be positive."),
        ("stages[1].grow.experts=-1", "stages[1].grow.experts=-1 must not be negative."),
        ("model.layers=0", "model.layers=0 must be at least 1."),
        ("model.kv_heads=3", "model.heads=4 must be a multiple of model.kv_heads=3."),
        ("model.context=4", "model.context=4 must be at least 8."),
        ("stages[1].name=english", "stages[1].name=english is taken by an earlier stage."),
        ("routing.top_k=5", "routing.top_k=5 must not exceed model.experts=4."),
        ("trainer.devices=1.5", "trainer.devices=1.5 must be a number, a list or a string."),
        ("checkpoint.keep=0", "checkpoint.keep=0 must be at least 1."),
        (
            "distributions.english.builtin=englsh",
            "distributions.english.builtin=englsh is unknown; there are english_docs, python_code, cpp_headers.",
        ),
        (
            "distributions.english.hf=x",
            "distributions.english: a distribution needs exactly one of builtin, files and hf; got builtin, hf.",
        ),
        (
            "routing.top_k=1",
            "routing.renormalize=true with routing.top_k=1 makes every gate weight 1, so the router gets no gradient. "
            "Set routing.renormalize=false or routing.top_k=2.",
        ),
        (
            "stage_defaults.replay.fraction=0 stage_defaults.distill.text=replay",
            "stages[1].distill.text=replay needs stages[1].replay.fraction above 0. Set it, or distill.text=new, or "
            "distill.weight=0.",
        ),
        (
            "stages[1].optim.batch_tokens=100",
            "stages[1].optim.batch_tokens=100 must be a multiple of model.context=16; the nearest is 96.",
        ),
        (
            "stages[1].optim.batch_tokens=7",
            "stages[1].optim.batch_tokens=7 must be a multiple of model.context=16; the nearest is 16.",
        ),
        ("stages[1].tokens=63", "stages[1].tokens=63 is less than one step of 64 tokens."),
        (
            "trainer.accumulate_grad_batches=3",
            "trainer.accumulate_grad_batches=3 must divide the 4 sequences of a step (stages[0].optim.batch_tokens / "
            "model.context); valid are 1, 2, 4.",
        ),
        (
            "tokenizer.train_on=python",
            "tokenizer.train_on=python must be the first stage's distribution (english): a tokenizer that saw later "
            "stages leaks the future.",
        ),
        (
            "routing.mode=cluster routing.level=document",
            "routing.level=document assigns experts a document at a time, so attention must stop at document borders. "
            "Set model.document_mask=true.",
        ),
        (
            "routing.bundles=label",
            "routing.bundles=label assigns experts a document at a time, so attention must stop at document borders. "
            "Set model.document_mask=true.",
        ),
        (
            "routing.bundles=cluster model.document_mask=true trainer.precision=bf16-true",
            "routing.bundles=cluster compares features in float32, which trainer.precision=bf16-true would round. Set "
            "trainer.precision=bf16-mixed.",
        ),
        (
            "routing.bundles=cluster routing.mode=hash",
            "routing.bundles=cluster needs routing.mode=learned, or cluster with level=token and features=embedding; "
            "got routing.mode=hash. Set routing.bundles=none otherwise.",
        ),
        (
            "routing.mode=label stages[1].grow.experts=1",
            "stages[1].grow.experts=1 is too few: 1 group(s) of routing.top_k=2 experts each need 2.",
        ),
        (
            "model.document_mask=true routing.mode=cluster routing.level=document routing.clusters=3",
            "model.experts=4 is too few: 3 group(s) of routing.top_k=2 experts each need 6.",
        ),
        (
            "stages[1].trunk.train=deltas",
            "stages[1].trunk.train=deltas changes the trunk for the tokens of one bundle. Set routing.bundles=cluster "
            "(or label, or routing.mode=label) and stages[1].grow.experts above 0, or stages[1].continues to the stage "
            "whose bundle trains on.",
        ),
        (
            "stages[1].trunk.train=deltas routing.mode=label stages[1].grow.experts=0",
            "stages[1].trunk.train=deltas changes the trunk for the tokens of one bundle. Set routing.bundles=cluster "
            "(or label, or routing.mode=label) and stages[1].grow.experts above 0, or stages[1].continues to the stage "
            "whose bundle trains on.",
        ),
        (
            "model.document_mask=true routing.bundles=cluster routing.sample_tokens=99",
            "routing.sample_tokens counts what a checkpoint writes; it has no effect without model.from, nor on other "
            "modes than cluster.",
        ),
        ("stages[1].grow.rank=-1", "stages[1].grow.rank=-1 must not be negative."),
        (
            "stages[1].grow.rank=2 stages[1].grow.init=random",
            "stages[1].grow.rank=2 changes older experts, which stay as they are: set grow.init=copy and "
            "grow.old_lr_scale=0.",
        ),
        (
            "stages[1].grow.rank=2 stages[1].grow.old_lr_scale=0.5",
            "stages[1].grow.rank=2 changes older experts, which stay as they are: set grow.init=copy and "
            "grow.old_lr_scale=0.",
        ),
        ("stages[1].grow.layers=[0,2]", "stages[1].grow.layers=[0, 2] must lie in 0 to 1."),
        ("stages[1].grow.layers=[-1,1]", "stages[1].grow.layers=[-1, 1] must lie in 0 to 1."),
        ("stages[1].grow.layers=[]", "stages[1].grow.layers=[] must name layers in ascending order, each once."),
        (
            "stages[1].grow.layers=[0] routing.mode=hash",
            "stages[1].grow.layers needs a trained router and routing.bundles=none; every layer must grow otherwise.",
        ),
        (
            "stages[1].review.fraction=0.5 routing.mode=label",
            "stages[1].review.fraction=0.5 trains new router rows on old text, too. Set routing.mode=learned, "
            "routing.bundles=none and stages[1].grow.experts above 0, or review.fraction=0.",
        ),
        (
            "stages[1].review.fraction=0.5 stages[1].grow.experts=0",
            "stages[1].review.fraction=0.5 trains new router rows on old text, too. Set routing.mode=learned, "
            "routing.bundles=none and stages[1].grow.experts above 0, or review.fraction=0.",
        ),
        (
            "stages[1].review.fraction=0.5 routing.bundles=cluster model.document_mask=true",
            "stages[1].review.fraction=0.5 trains new router rows on old text, too. Set routing.mode=learned, "
            "routing.bundles=none and stages[1].grow.experts above 0, or review.fraction=0.",
        ),
        (
            "stages[1].review.fraction=0.04",
            "stages[1].review.fraction=0.04 of 10 steps must be at least one step and leave one.",
        ),
        (
            "stages[1].review.fraction=0.96",
            "stages[1].review.fraction=0.96 of 10 steps must be at least one step and leave one.",
        ),
        (
            "stages[1].penalty.kind=l2 stages[1].trunk.train=frozen",
            "stages[1].penalty.kind=l2 holds old weights that train, and none does: the trunk is frozen and old "
            "experts are frozen. Set penalty.kind=none.",
        ),
        (
            "stages[1].average=0.5 stages[1].trunk.train=frozen",
            "stages[1].average=0.5 holds old weights that train, and none does: the trunk is frozen and old "
            "experts are frozen. Set average=0.",
        ),
        (
            "stages[1].replay.source=generated routing.mode=label",
            "stages[1].replay.source=generated: text that a model wrote has no label, which this routing needs. Set "
            "replay.source=stored.",
        ),
        (
            "stages[1].replay.source=generated stages[1].replay.buffer_tokens=9",
            "stages[1].replay.buffer_tokens=9 bounds stored text; with replay.source=generated there is none. Set "
            "replay.buffer_tokens=null.",
        ),
        (
            "routing.mode=cluster routing.features=hidden stages[0].tokens=64",
            "stages[0].tokens=64 is less than two steps of 64 tokens; routing.features=hidden needs one before "
            "clusters are fitted and one after.",
        ),
    ],
)
def test_a_combination_that_cannot_work(load: Load, override: str, expected: str) -> None:
    parts = override.split(" ") if "{" not in override else override.split(" ", 1)
    assert error(load, *parts) == expected


def test_what_the_mistakes_above_leave_alone(load: Load) -> None:
    sequential = ["method=sequential", "stage_defaults.replay.fraction=0", "stage_defaults.distill.text=replay"]
    assert load(*sequential).stages[1].replay.fraction == 0
    assert load("method=sequential", "routing.mode=label", "stages[1].grow.experts=1").stages[1].grow.experts == 1
    assert load("routing.mode=label", "stages[1].grow.experts=0").stages[1].grow.experts == 0
    assert load("routing.top_k=1", "routing.renormalize=false").routing.top_k == 1
    # Only lifelong takes these sections, and only from the second stage on.
    unused = ["trunk.train=deltas", "grow.layers=[7]", "review.fraction=0.01", "trunk.rank=3"]
    assert load("method=ewc", *(f"stage_defaults.{override}" for override in unused)).method is Method.ewc
    assert load(*(f"stages[0].{override}" for override in unused)).method is Method.lifelong


@pytest.mark.parametrize(
    "overrides",
    [
        ["trunk.train=frozen", "grow.old_lr_scale=0.1"],  # old experts train
        ["trunk.train=frozen", "grow.experts=0"],  # those of before train on
        ["trunk.train=gentle"],
    ],
)
def test_a_penalty_with_something_to_hold(load: Load, overrides: list[str]) -> None:
    config = load("stages[1].penalty.kind=ewc", *(f"stages[1].{override}" for override in overrides))
    assert config.stages[1].penalty.factor == 1000.0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "override 'seed' must have the form key=value."),
        ("=3", "override '=3' must have the form key=value."),
        ("stages[5].tokens=3", "override 'stages[5].tokens=3' cannot be applied: list index out of range"),
        ("stages[x].tokens=3", "override 'stages[x].tokens=3' cannot be applied: Index 'x' (str) is not an int"),
        ("seed=[1", "override 'seed=[1' cannot be applied: while parsing a flow sequence"),
    ],
)
def test_an_override_that_cannot_be_applied(load: Load, override: str, expected: str) -> None:
    assert error(load, override) == expected


def bomb(opening: str, closing: str, item: str) -> str:
    lines = [f"a0: &a0 [{','.join('x' * 10)}]"]
    for i in range(1, 9):
        items = ",".join(item.format(j) + f"*a{i - 1}" for j in range(10))
        lines.append(f"a{i}: &a{i} {opening}{items}{closing}")
    return YAML + "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.yaml: must hold a mapping such as run: NAME; it is empty or a list."),
        ("# nothing\n", "run.yaml: must hold a mapping such as run: NAME; it is empty or a list."),
        ("- a\n", "run.yaml: must hold a mapping such as run: NAME; it is empty or a list."),
        (YAML + "seed: 1\nseed: 2\n", "run.yaml:7: found duplicate key seed."),
        (YAML.replace("layers: 2,", "layers: 2, layers: 3,"), "run.yaml:3: found duplicate key layers."),
        ("run: [1\n", "run.yaml:2: did not find expected ',' or ']'."),
        ("run: x\n\tseed: 3\n", "run.yaml:2: indented with a tab; YAML takes spaces only."),
        ("run: é\n".encode("latin1"), "run.yaml:1: invalid UTF-8 at byte 5."),
        (b"run: a\x00b\n", "run.yaml:1: control characters are not allowed."),
        ("run: !!python/object/apply:os.getcwd []\n", "run.yaml:1: could not determine a constructor for the tag"),
        (YAML + "---\nrun: b\n", "run.yaml:6: but found another document."),
        (YAML + "x: &x [*x]\n", "run.yaml:6: YAML recursive aliases are not supported."),
        ("run: " + "[" * 5000 + "]" * 5000, "run.yaml:1: nested over 32 deep."),
        (YAML + "#" + "x" * (1 << 16), "run.yaml: over 65,536 bytes; is this a configuration file?"),
        (bomb("[", "]", ""), "YAML node expansion exceeds the configured limit"),
        (bomb("{", "}", "k{}: "), "YAML node expansion exceeds the configured limit"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_file_that_cannot_be_read(load: Load, text: str | bytes, message: str) -> None:
    began = time.process_time()
    assert message in error(load, text=text)
    assert time.process_time() - began < 2


def test_a_missing_file_names_one_like_it(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(YAML)
    with pytest.raises(ConfigError, match=r"quikstart\.yaml: no such file\. Did you mean .*/quickstart\.yaml\?"):
        read_config(tmp_path / "quikstart.yaml")
    with pytest.raises(ConfigError, match="no such file"):
        read_config(tmp_path)


def test_a_name_that_yaml_takes_for_a_number(load: Load) -> None:
    config = load(text=YAML.replace("python:", "2024:").replace("data: python", "data: 2024"))
    assert list(config.distributions) == ["english", "2024"] and config.stages[1].data == "2024"


def test_stages_on_one_distribution_are_numbered(load: Load) -> None:
    stages = "stages=[{data: english}, {data: english, name: english-2}, {data: english}, {data: python}]"
    assert [s.name for s in load(stages).stages] == ["english", "english-2", "english-3", "python"]


SHIPPED = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


# A checkpoint's folder completes its run, which tests of such runs have.
WHOLE = [path for path in SHIPPED if (raw := read_yaml(path)).get("run") and "from" not in raw.get("model", {})]


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_the_whole_configuration_is_the_same_configuration(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIFELONG_DATA", "corpora")  # which some of them refer to
    raw = read_config(path, ["seed=3"]).raw
    whole = whole_config(raw)
    assert OmegaConf.to_container(OmegaConf.create(whole)) == whole  # plain data
    copy = tmp_path / "whole.yaml"
    copy.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    assert read_config(copy).config == build_config(raw)


def test_the_whole_configuration_of_an_earlier_run_is_written(tmp_path: Path) -> None:
    """Earlier versions took keys of other modes, which had no effect."""
    path = tmp_path / "old.yaml"
    path.write_text(YAML + "routing: {mode: hash, jitter: 0.1}\n", encoding="utf-8")
    raw = read_yaml(path)
    assert build_config(raw, is_stored=True).routing.mode == "hash"
    assert "jitter" not in whole_config(raw)["routing"]


def test_the_whole_configuration_resolves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "canary")
    monkeypatch.setenv("WHOLE", "{canary: 1}")
    path = tmp_path / "run.yaml"
    path.write_text(YAML, encoding="utf-8")
    for override, where in {
        "tracking.experiment=${oc.env:SECRET}": lambda whole: whole["tracking"]["experiment"],
        "tracking=${oc.decode:${oc.env:WHOLE}}": lambda whole: whole["tracking"],
        "stage_defaults.optim.schedule=${oc.env:SECRET}": lambda whole: whole["stages"][1]["optim"]["schedule"],
        "stages[1].grow=${oc.decode:${oc.env:WHOLE}}": lambda whole: whole["stages"][1]["grow"],
        "stages[1]=${oc.decode:${oc.env:WHOLE}}": lambda whole: whole["stages"][1],
        "stages=${oc.decode:${oc.env:WHOLE}}": lambda whole: whole["stages"],
        "distributions.english=${oc.decode:${oc.env:WHOLE}}": lambda whole: whole["distributions"]["english"],
        "distributions=${oc.decode:${oc.env:WHOLE}}": lambda whole: whole["distributions"],
        "model.experts=${oc.decode:${oc.env:SECRET}}": lambda whole: whole["model"]["experts"],
        "seed=${oc.decode:${oc.env:SECRET}}": lambda whole: whole["seed"],
    }.items():
        whole = whole_config(overridden(read_yaml(path), [override]))
        assert where(whole) == override.partition("=")[2]
        assert "canary" not in str(whole), override
    whole = whole_config(overridden(read_yaml(path), ["stage_defaults=${oc.decode:${oc.env:WHOLE}}"]))
    assert "canary" not in str(whole)
    whole = whole_config(overridden(read_yaml(path), ["tracking.uri=http://me:canary@host/x?key=canary"]))
    assert whole["tracking"]["uri"] == "http://***@host/***"


def test_secrets_stay_out_of_what_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKING", "http://user:secret@host")
    (tmp_path / "run.yaml").write_text(YAML + "tracking: {uri: '${oc.env:TRACKING}'}\n")
    loaded = read_config(tmp_path / "run.yaml")
    assert loaded.config.tracking.uri == "http://user:secret@host"
    assert written_config(loaded.raw)["tracking"]["uri"] == "${oc.env:TRACKING}"
    monkeypatch.delenv("TRACKING")
    with pytest.raises(ConfigError, match=r"tracking\.uri: .*TRACKING.* not found"):
        read_config(tmp_path / "run.yaml")


def test_what_only_clusters_need_is_not_asked_of_others(make_run: Callable[..., RunConfig]) -> None:
    assert make_run("stage_defaults.grow.sample_tokens=1").routing.mode == "learned"


def test_what_is_offloaded_is_not_in_eight_bits_too(load: Load) -> None:
    assert load("frozen.offload=cpu").frozen.offload == "cpu"
    with pytest.raises(ConfigError, match=r"stages\[1\]\.grow\.frozen_weights=int8 with frozen\.offload=cpu: "):
        load("frozen.offload=cpu", "stages[1].grow.frozen_weights=int8")
    with pytest.raises(ConfigError, match=r"stages\[1\]\.grow\.frozen_weights=half with trainer\.precision=bf16-true"):
        load("trainer.precision=bf16-true", "stages[1].grow.frozen_weights=half")
    with pytest.raises(ConfigError, match=r"stages\[1\]\.grow\.frozen_weights=int8 with trainer\.compile=true: "):
        load("trainer.compile=true", "stages[1].grow.frozen_weights=int8")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.experts_implementation=grouped_mm", "model.expert_width=12"],
            "grouped_mm needs model.expert_width in multiples of 8, not 12",
        ),
        (["frozen.offload=cpu", "trainer.compile=true"], "frozen.offload=cpu with trainer.compile=true"),
        (
            ["frozen.offload=cpu", "trainer.activation_checkpointing=true"],
            "frozen.offload=cpu with trainer.activation_checkpointing=true",
        ),
        (["trainer.experts_implementation=triton"], "triton"),
        (
            ["trainer.experts_implementation=grouped_mm", "trainer.compile=true"],
            "grouped_mm compiles in bfloat16 only",
        ),
        (
            ["trainer.experts_implementation=grouped_mm", "trainer.compile=true", "trainer.precision=auto"],
            "grouped_mm compiles in bfloat16 only",
        ),
    ],
)
def test_what_cannot_be_computed_is_said(load: Load, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(*overrides)


@pytest.mark.parametrize("name", ["checkpoint", "evaluate", "tracking", "trainer", "routing", "frozen"])
def test_a_section_that_is_null_is_the_default_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is built, so it is written out for MLflow."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config()
    write_config({key: value for key, value in config.items() if key != name})
    default = whole_config(read_config("tiny.yaml").raw)
    write_config(config | {name: None})
    assert whole_config(read_config("tiny.yaml").raw) == default


def test_a_default_that_no_stage_takes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"

    def stages(*overrides: str, **last: Any) -> list[StageConfig]:
        both = [{"data": "fruit", "tokens": 1024}, {"data": "code", "optim": {"lr": 1e-3}} | last]
        both[0]["optim"] = {"lr": 1e-3}
        path.write_text(yaml.safe_dump(tiny_config() | {"stages": both}), encoding="utf-8")
        return read_config(path, overrides).config.stages

    with pytest.raises(ConfigError) as caught:
        stages("stage_defaults.tokens=512", tokens=2048)
    assert str(caught.value) == (
        f"stage_defaults.tokens=512 changes nothing: each stage of {path} has a value of its own. Set "
        f"stages[0].tokens, stages[1].tokens, or take them out of the file."
    )
    with pytest.raises(ConfigError, match=r"^stage_defaults\.optim\.lr=1e-4 changes nothing"):
        stages("stage_defaults.optim.lr=1e-4")
    # A section is merged with theirs, and one stage that takes a value is enough.
    assert stages("stage_defaults.optim={lr: 1e-4, beta2: 0.9}")[1].optim.beta2 == 0.9
    assert [stage.tokens for stage in stages("stage_defaults.tokens=512")] == [1024, 512]
