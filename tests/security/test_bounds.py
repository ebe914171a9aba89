"""Numbers, keys and lists of any size cost one line and exit code 2, before memory or processes are taken."""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from lifelong_moe.config.load import build_config, read_config
from lifelong_moe.config.routing import bounds
from lifelong_moe.config.routing.modes import ROUTERS, stored_routing
from lifelong_moe.config.routing.topk import CustomRouterConfig
from lifelong_moe.config.run import RunConfig, StageConfig
from lifelong_moe.config.yaml_file import MAX_CONFIG_BYTES, MAX_YAML_DEPTH
from lifelong_moe.errors import ConfigError, CorruptError
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.comparison import load_comparison
from lifelong_moe.plan.retraining import RetrainConfig, load_retraining
from lifelong_moe.storage.plain import PlainError
from lifelong_moe.training.restore import build_model as restore
from pipelines.cli import app, exit_code
from tests.conftest import build_architecture, build_model
from tests.retrain_lab import RETRAIN, base_config
from tests.tiny import tiny_config, write_config

ENDLESS = 10**30
DEEP = 5_000


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory but for three configurations."""
    monkeypatch.chdir(tmp_path)
    write_config(tiny_config())
    compare = {"compare": "c", "base": "tiny.yaml", "arms": {"one": ["method=lifelong"]}}
    Path("compare.yaml").write_text(yaml.safe_dump(compare))
    Path("base.yaml").write_text(yaml.safe_dump(base_config()))
    Path("retrain.yaml").write_text(yaml.safe_dump(RETRAIN | {"base": "base.yaml"}))
    return tmp_path


def sections(cls: type, seen: set[type]) -> Iterator[type]:
    """All dataclasses of a configuration."""
    if cls in seen:
        return
    seen.add(cls)
    yield cls
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        for one in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(one):
                yield from sections(one, seen)  # type: ignore[arg-type]


def numbers() -> Iterator[tuple[type, str]]:
    """Each key that is a whole number, of each section and mode."""
    classes: set[type] = set()
    roots = (RunConfig, RetrainConfig, StageConfig, CustomRouterConfig, *(mode.settings for mode in ROUTERS.values()))
    for cls in (one for root in roots for one in sections(root, classes)):
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if hints[field.name] is int or int in typing.get_args(hints[field.name]):
                yield cls, field.name


REQUIRED: dict[str, Any] = {"data": "x", "builtin": "english_docs", "run": "x", "distributions": {}, "stages": []}


@pytest.mark.parametrize(("cls", "key"), sorted(numbers(), key=str), ids=lambda one: getattr(one, "__name__", one))
def test_every_whole_number_is_bounded(cls: type, key: str) -> None:
    if cls.__name__ == "PublishedConfig":
        return  # trains nothing: parameters are counted, and a product may be as large as it likes
    names = {field.name for field in dataclasses.fields(cls)}
    given = {name: value for name, value in REQUIRED.items() if name in names}
    if cls is RunConfig:
        given["stages"] = [StageConfig(data="x")]
    with pytest.raises(ConfigError, match=rf"{key}={ENDLESS} must (be at most|lie between)"):
        cls(**given | {key: ENDLESS})


def test_a_stored_stage_is_bounded_too() -> None:
    """A number of layers would be a list of as many numbers before anybody compares it with the tensors."""
    plain: dict[str, Any] = build_architecture().to_json()
    for section, key in (("model", "layers"), ("model", "width"), ("routing", "top_k")):
        stored = {**plain, section: {**plain[section], key: 10**16}}
        with pytest.raises(PlainError, match=f"{section}.{key}={10**16} must be at most"):
            Architecture.from_json(stored)
    with pytest.raises(PlainError, match="expert_groups: must be a number of at most 64 bits"):
        stored_routing({"mode": "hash", "expert_groups": ENDLESS})


def cost(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The one line that a command costs, which must end with 2 and write nothing."""
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr(sys, "argv", ["lifelong-moe", *arguments])
    capsys.readouterr()
    code, said = exit_code(app), capsys.readouterr().err
    assert (code, said.count("\n")) == (2, 1), said
    assert sorted(Path().rglob("*")) == before
    return said


TOO_MUCH = {
    "model.layers=1000000000": "model.layers=1000000000 must be at most 1,000.",
    "model.layers=1e9": "could not be converted to Integer",
    "stage_defaults.optim.batch_tokens=30000000000": "optim.batch_tokens=30000000000 must be at most 1,073,741,824.",
    "trainer.num_workers=100000": "trainer.num_workers=100000 must be at most 1,024.",
    "trainer.devices=100000": "trainer.devices=100000 must be at most 1,024.",
    "trainer.devices='100000'": "trainer.devices=100000 must be at most 1,024 devices.",
    f"trainer.devices='{'9' * DEEP}'": "must be at most 1,024 devices.",
    f"seed={'9' * DEEP}": "cannot be applied",
    f"seed=0x{'f' * DEEP}": "a whole number of 20,000 bits; at most 63 are read",
    f"seed={'1:' * DEEP}1": "bits; at most 63 are read",
    f"model.experts=[4, 0x{'f' * 16}]": "a whole number of 64 bits; at most 63 are read",
    f"seed{'.x' * DEEP}=1": f"its key is over {MAX_YAML_DEPTH} deep",
    f"stages{'[0]' * DEEP}=1": f"its key is over {MAX_YAML_DEPTH} deep",
    f"seed={'[' * DEEP}{']' * DEEP}": f"nested over {MAX_YAML_DEPTH} deep",
    f"seed={'${' * DEEP}a{'}' * DEEP}": f"nested over {MAX_YAML_DEPTH} deep",
    f"seed='${{oc.decode:{'[' * DEEP}{']' * DEEP}}}'": f"nested over {MAX_YAML_DEPTH} deep",
    f"stages=[{'{data: fruit},' * 10_000}]": f"at most {MAX_CONFIG_BYTES:,} are read",
    "model=${model}": "Recursive interpolation detected",
    "stages=${nothing}": "Interpolation key 'nothing' not found",
    "stage_defaults.optim.batch_tokens=1048576 trainer.accumulate_grad_batches=3": "valid are 1, 2, 4, 8,",
    "model.width=1000000": "GB of memory, and this machine has",
    "model.layers=1000 model.width=65536": "Set model.width or model.layers lower.",
    "model.experts=1000000 model.expert_width=1000000": "Set model.experts, model.expert_width or grow.experts lower.",
    "tokenizer.vocab_size=1000000 model.width=1000000 model.expert_width=2": "lower.",
    "stage_defaults.optim.batch_tokens=1073741824 stage_defaults.tokens=1073741824 model.layers=999": (
        "Set optim.batch_tokens lower, or trainer.accumulate_grad_batches higher."
    ),
    "stage_defaults.tokens=1000000000000000 stage_defaults.replay={fraction: 0.5, source: generated}": (
        "Set replay.fraction or penalty.fisher_tokens lower."
    ),
}


@pytest.mark.parametrize("given", TOO_MUCH, ids=lambda given: given[:40])
def test_a_configuration_that_asks_for_too_much_costs_one_line(
    given: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = re.split(r" (?=[a-z_]+\.)", given)
    commands = [("plan", "tiny.yaml"), ("run", "tiny.yaml"), ("prepare", "tiny.yaml"), ("compare", "compare.yaml")]
    # A comparison sets the seeds itself, and says so first.
    for command in commands[:3] if given.startswith("seed") else commands:
        assert TOO_MUCH[given] in cost(capsys, monkeypatch, *command, *overrides), command[0]


def test_a_comparison_that_asks_for_too_much_costs_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = "[1, 2, 3, 4, 5, 6, 7, 8, 9, 0]"
    grid = ", ".join(f"{key}: {values}" for key in ("a", "b", "c", "d", "e", "f", "g", "h"))
    deep = f"arms.x={{grid: {{model{'.x' * 500}: [1]}}}}"  # YAML reads no key of over 1024 characters
    for given, said in (
        (f"arms.x={{grid: {{{grid}}}}}", "arms.x.grid has 100,000,000 combinations; there may be at most 1,000."),
        (
            f"arms.x={{grid: {{a: {values}}}}} seeds={[*range(1000)]}",
            "make 11 arms and 11,000 runs; there may be at most",
        ),
        (deep, "its key is over 32 deep"),
        (f"arms.x=[seed{'.x' * DEEP}=1]", "its key is over 32 deep"),
        ("arms.x=[model.width=1000000]", "arm x: stage fruit needs at least"),
        ("arms=${arms}", "Recursive interpolation detected"),
    ):
        seeds = [f"seeds={text}" for text in given.split(" seeds=")[1:]]
        assert said in cost(capsys, monkeypatch, "compare", "compare.yaml", *given.split(" seeds=")[:1], *seeds), said
    many = [*(f"arms.a{i}={{grid: {{seed: {list(range(999))}}}}}" for i in range(2))]
    with pytest.raises(ConfigError, match=r"make 1,999 arms and 1,999 runs; there may be at most 1,000 and 10,000"):
        load_comparison("compare.yaml", many)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("gate.resamples=1000000000", r"gate\.resamples=1000000000 must be at most 100,000"),
        ("drift.permutations=1000000000", r"drift\.permutations=1000000000 must be at most 100,000"),
        ("stage.grow={experts: 20000, sample_tokens: 20000}", "stage batch needs at least .* of memory"),
        ("probe.grow=[" + "{experts: 2}," * 101 + "]", "probe.grow holds 101 ways to grow; there may be at most 100"),
        ("base=${base}", "Recursive interpolation detected"),
        ("stage=${stage}", "Recursive interpolation detected"),
        ("inbox=${nothing}", "Interpolation key 'nothing' not found"),
        (f"stage{'.x' * DEEP}=1", "its key is over 32 deep"),
    ],
)
def test_a_retraining_that_asks_for_too_much_costs_one_line(given: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_retraining("retrain.yaml", [given, "model.width=4096", "model.expert_width=4096"])


def test_lists_of_stages_and_distributions_are_counted_before_any_is_built() -> None:
    raw = tiny_config()
    many = raw | {"stages": [{"data": "fruit"}] * (bounds.MOST_STAGES + 1)}
    with pytest.raises(ConfigError, match=r"stages holds 1,001; there may be at most 1,000\."):
        build_config(OmegaConf.create(many))
    source = next(iter(raw["distributions"].values()))
    wide = raw | {"distributions": {f"d{i}": source for i in range(bounds.MOST_DISTRIBUTIONS + 1)}}
    with pytest.raises(ConfigError, match=r"distributions holds 1,001; there may be at most 1,000\."):
        build_config(OmegaConf.create(wide))


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * DEEP,
        "".join(" " * i + "a:\n" for i in range(DEEP // 50)),
        "a: &a [*a]",
        "a: &a [1, 1]\n" + "".join(f"{b}: &{b} [{f'*{a},' * 30}]\n" for a, b in pairwise("abcdefghi")),
        "a: '" + "${" * 100 + "'",
        "seed: 0x" + "f" * DEEP,
        "? 0x" + "f" * DEEP + "\n: 1",
        "seed: " + "9" * DEEP,
    ],
    ids=["flow", "block", "an alias of itself", "aliases multiply", "interpolations", "hexadecimal", "a key", "digits"],
)
def test_a_file_that_is_deep_or_multiplies_costs_one_line(text: str) -> None:
    Path("hostile.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_config("hostile.yaml")
    assert str(caught.value).startswith("hostile.yaml") and "\n" not in str(caught.value)


NAMES = [f"k{i}" for i in range(41)]


@pytest.mark.parametrize(
    "written",
    [
        "'${{{0}}}${{{0}}}'",
        "'${{oc.select:{0}}}-${{oc.select:{0}}}'",
        "['${{{0}}}', '${{{0}}}']",
        "{{x: '${{{0}}}', y: '${{{0}}}'}}",
    ],
)
def test_references_that_double_cost_one_line(
    written: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty levels come to a million million characters."""
    lines = [f"{a}: {written.format(b)}" for a, b in pairwise(NAMES)]
    given = [f"{a}={written.format(b)}" for a, b in pairwise(NAMES)]
    texts = {name: Path(f"{name}.yaml").read_text() for name in ("tiny", "compare", "retrain")}
    for command, name in (("plan", "tiny"), ("compare", "compare"), ("retrain", "retrain")):
        Path("hostile.yaml").write_text("\n".join([texts[name], *lines, f"{NAMES[-1]}: x", ""]))
        assert "comes to over 1,048,576 characters" in cost(capsys, monkeypatch, command, "hostile.yaml")
    for command, name in (("plan", "tiny"), ("compare", "compare")):
        said = cost(capsys, monkeypatch, command, f"{name}.yaml", f"{NAMES[-1]}=x", *reversed(given), "k0.a=1")
        assert "comes to over" in said or "key" in said


def test_references_that_add_up_to_little_are_resolved() -> None:
    config = read_config("tiny.yaml", ["method=lifelong", "seed=7", "run='${method}-${seed}-${seed}'"]).config
    assert config.run == "lifelong-7-7"


def test_references_in_a_long_row_cost_one_line() -> None:
    row = [f"k{i}: ${{k{i + 1}}}" for i in range(3000)]
    Path("hostile.yaml").write_text("\n".join([Path("tiny.yaml").read_text(), *row, "k3000: x"]))
    with pytest.raises(ConfigError, match=r"^hostile\.yaml: [^\n]+$"):
        read_config("hostile.yaml")


def test_a_stored_model_larger_than_its_tensors_is_not_built() -> None:
    """Within all bounds it has some 10**18 parameters; the file beside it has those of two small layers."""
    small = build_model()
    restored = restore(small.architecture, small.state_dict())
    assert restored.state_dict().keys() == small.state_dict().keys()
    wide = {"width": 1_000_000, "expert_width": 1_000_000}
    for architecture, message in (
        (build_architecture(model=wide), r"tensor \S+ is "),
        (build_architecture(model={"layers": 1000}), r"has 1,000 layers, but \d+ tensors"),
        (build_architecture(generations=(1000,)), r"has 2,000 experts, but \d+ tensors"),
    ):
        with pytest.raises(CorruptError, match=message):
            restore(architecture, small.state_dict())
    first = small.architecture.generations[0]
    many = dataclasses.replace(small.architecture, generations=(first, *[dataclasses.replace(first, experts=0)] * 1000))
    with pytest.raises(CorruptError, match=r"has 1,001 generations"):
        restore(many, small.state_dict())
