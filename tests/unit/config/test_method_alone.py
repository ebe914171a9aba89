"""``method: lifelong`` alone is the recommended method, and a half of any method is refused or said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from lifelong_moe.config.load import LoadedConfig, read_config
from lifelong_moe.config.methods import in_generations, replaying, stands_alone, training_on
from lifelong_moe.data.tokens.identity import DataIdentity, TokenizerIdentity
from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.advice import growth_advice, unheld
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.plan.stages import plan_stages

ALONE = {
    "run": "own",
    "method": "lifelong",
    "distributions": {"notes": {"files": "a"}, "wiki": {"files": "b"}, "code": {"files": "c"}},
    "model": {"width": 64, "heads": 4, "kv_heads": 2, "context": 32},
    "stages": [{"data": "notes"}, {"data": "wiki"}, {"data": "code"}],
}
Read = Callable[..., LoadedConfig]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def written(*overrides: str, **sections: object) -> LoadedConfig:
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump(ALONE | sections), encoding="utf-8")
        return read_config(path, list(overrides))

    return written


def test_the_word_alone_is_the_recommended_method(read: Read) -> None:
    config = read().config
    assert config.routing.bundles == "cluster" and config.routing.mixes and config.model.document_mask
    second = config.stages[1]
    assert (second.trunk.train, second.trunk.rank, second.grow.router) == ("deltas", 55, "copy")
    assert (second.replay.fraction, second.distill.weight, second.optim.rewarm) == (0, 0, 2)
    # Written out, as it is logged and stored, it means the same without the word.
    written = OmegaConf.to_container(read().raw)
    assert isinstance(written, dict) and written["routing"]["bundles"] == "cluster"
    assert read("model.width=128").config.stages[1].trunk.rank == 110


@pytest.mark.parametrize(
    ("overrides", "of_second"),
    [
        (["stage_defaults.replay.fraction=0.1"], lambda one: one.replay.fraction == 0.1),
        (["stage_defaults.grow.experts=4"], lambda one: one.grow.experts == 4),
        (["stage_defaults.trunk.train=frozen"], lambda one: one.trunk.train == "frozen"),
        (["stage_defaults.trunk.rank=3"], lambda one: one.trunk.rank == 3),
        (["stages[1].optim.lr=0.01"], lambda one: one.optim.lr == 0.01 and one.optim.rewarm == 2),
    ],
)
def test_an_override_changes_a_key_of_it_and_not_the_method(
    read: Read, overrides: list[str], of_second: Callable[..., bool]
) -> None:
    config = read(*overrides).config
    assert of_second(config.stages[1]) and config.routing.mixes


@pytest.mark.parametrize("section", ["stage_defaults", "stage_defaults.trunk", "stage_defaults.optim", "routing"])
def test_an_empty_section_is_as_an_absent_one(read: Read, section: str) -> None:
    first, _, second = section.partition(".")
    for loaded in (read(f"{section}=null"), read(**{first: {second: None} if second else None})):
        assert loaded.config == read().config


@pytest.mark.parametrize("value", [[], 3, "x"])
@pytest.mark.parametrize(
    "section", ["model", "routing", "stage_defaults", "stage_defaults.trunk", "stage_defaults.grow"]
)
def test_a_section_of_a_wrong_type_costs_a_line(read: Read, section: str, value: object) -> None:
    first, _, second = section.partition(".")
    for overrides, sections in (([f"{section}={value}"], {}), ([], {first: {second: value} if second else value})):
        with pytest.raises(ConfigError, match=first) as error:
            read(*overrides, **sections)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "sections",
    [
        {"method": "sequential"},
        {"routing": {"bundles": "none"}},
        {"routing": {"mode": "switch"}},
        {"stage_defaults": {"replay": {"fraction": 0.1}}},
        {"stage_defaults": {"trunk": {"train": "full"}}},
        {"stage_defaults": {"grow": {"experts": 0}}},
        {"stages": [{"data": "notes"}, {"data": "wiki", "average": 0.5}]},
        {"stages": [3], "routing": None},
        {"stages": [{"data": "notes", "trunk": "${oc.env:X}"}]},
    ],
)
def test_a_file_that_says_how_is_taken_at_its_word(sections: dict[str, object]) -> None:
    assert not stands_alone(OmegaConf.create(ALONE | sections))  # type: ignore[arg-type]
    without = {key: value for key, value in ALONE.items() if key != "method"}
    assert not stands_alone(OmegaConf.create(without))


@pytest.mark.parametrize("overrides", [["stage_defaults.tokens=40_000"], ["stages[1].grow.experts=0"]])
def test_what_an_earlier_version_began_is_read_as_it_was(read: Read, tmp_path: Path, overrides: list[str]) -> None:
    read()
    earlier = read_config(tmp_path / "own.yaml", overrides, begun=lambda config: config.routing.bundles == "none")
    assert earlier.config.routing.bundles == "none" and earlier.config.stages[1].replay.fraction == 0.25
    assert "was begun when method: lifelong alone meant replay" in earlier.left_behind[0]
    # Other stages than both readings have: today's is told.
    with pytest.raises(ConfigError, match="unknown"):
        read_config(tmp_path / "own.yaml", ["nothing=1"], begun=lambda config: False)
    assert read_config(tmp_path / "own.yaml", begun=lambda config: False).config.routing.bundles == "cluster"


def test_training_on_with_nothing_that_holds_old_text_is_refused(read: Read) -> None:
    half = ["stage_defaults.grow.experts=0", "stage_defaults.trunk.train=full", "routing.bundles=none"]
    with pytest.raises(ConfigError, match=r"stages\[1\]: what earlier stages learned trains on and nothing") as error:
        read(*half)
    # The keys that it names are enough.
    named = str(error.value).split("Add ")[1].split(",")[0].split()
    assert named == ["stage_defaults.replay.fraction=0.25", "stage_defaults.distill.weight=0.5"]
    assert read(*half, *named).config.stages[1].replay.fraction == 0.25
    assert read(*half, "method=sequential").config.method == "sequential"
    # The same text again is nothing that could be forgotten.
    same = [{"data": "notes"}, {"data": "notes"}]
    assert read(*half, stages=same).config.stages[1].grow.experts == 0
    # A frozen trunk alone does not hold experts that train; generations that were there before do stay.
    with pytest.raises(ConfigError, match="nothing holds it"):
        read("stage_defaults.grow.experts=0", "stage_defaults.trunk.train=frozen")
    read("stages[2].grow.experts=0", "stages[2].trunk.train=frozen")


def plan_and_advice(loaded: LoadedConfig, nats: float) -> list[str]:
    names = ("notes", "wiki", "code")
    data = DataIdentity({n: n for n in names}, TokenizerIdentity({"vocab_size": 300}, "t"), vocab_size=300, bos_id=0)
    divergence = {"wiki": {"notes": 1.0}, "code": {"notes": 1.0, "wiki": nats}}
    raw = OmegaConf.to_container(loaded.raw)
    assert isinstance(raw, dict)
    return growth_advice(plan_stages(loaded.config, data), divergence, raw)


def overrides_in(sentence: str) -> list[list[str]]:
    """Each list of overrides that a sentence tells to add."""
    return [part.split(")")[0].rstrip(".").split() for part in sentence.split("add ")[1:]]


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"routing": {"bundles": "none"}},
        {"method": "sequential"},
        {"stages": [{"data": "notes"}, {"data": "wiki", "trunk": {"train": "gentle"}}, {"data": "code"}]},
        {"routing": {"bundles": "none"}, "stage_defaults": {"replay": {"fraction": 0}, "distill": {"weight": 0}}},
    ],
)
def test_what_is_advised_is_whole(read: Read, sections: dict[str, object]) -> None:
    loaded = read("stage_defaults.tokens=1024", "stage_defaults.optim.batch_tokens=64", **sections)
    capacity, _, shift = plan_and_advice(loaded, nats=0.01)
    assert "capacity will hardly bind" in capacity and "the same kind of text" in shift
    wholes = [*overrides_in(capacity), *overrides_in(shift)]
    assert len(wholes) >= 2
    for whole in wholes:
        config = read("stage_defaults.optim.batch_tokens=64", *whole, **sections).config
        assert config.method == "lifelong"
        last = stage_specs(config)[2]
        assert last.continues or last.routing.mixes or (last.replay.fraction and last.grow is None)


def test_growth_beside_a_trunk_that_moves_is_told(read: Read) -> None:
    loaded = read("routing.bundles=none", "stage_defaults.trunk.train=full")
    raw = OmegaConf.to_container(loaded.raw)
    assert isinstance(raw, dict)
    said = unheld(loaded.config, raw)
    assert len(said) == 2 and "stages[1] (wiki): old experts are frozen, but trunk and router train on" in said[0]
    for keys in (replaying(raw), in_generations(raw)):
        assert " ".join(keys) in said[0]
        again = read("routing.bundles=none", "stage_defaults.trunk.train=full", *keys)
        assert unheld(again.config, raw) == []
    assert unheld(read().config, raw) == []
    alone = OmegaConf.to_container(read().raw)
    assert unheld(read(*training_on(alone)).config, raw) == []
