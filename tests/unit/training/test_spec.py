from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest

from lifelong_moe.config import RunConfig
from lifelong_moe.methods.graph import stage_specs
from lifelong_moe.model.cost import forward_flops_per_token
from lifelong_moe.retention.config import TrunkConfig, TrunkTraining
from lifelong_moe.training.spec import Phase, StageSpec

MakeRun = Callable[..., RunConfig]
TOKENIZER = {"recipe": {"vocab_size": 300}, "hash": "t"}
HASHES = {"english": "e", "python": "p"}


def later_spec(make_run: MakeRun, *overrides: str) -> StageSpec:
    return stage_specs(make_run(*overrides))[1]


@pytest.fixture(scope="module")
def later(make_run: MakeRun) -> StageSpec:
    """The second stage of the run as it is."""
    return later_spec(make_run)


def key_of(spec: StageSpec, parent: str | None = "parent", **changes: Any) -> str:
    arguments = {"data_hash": HASHES[spec.data], "replay_hashes": HASHES, "tokenizer": TOKENIZER} | changes
    return spec.key(parent, **arguments)


def different(value: Any) -> Any:
    """Another value of the same kind, valid or not."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, Enum):
        return next(member for member in type(value) if member != value)
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, dict):
        return {"x": 1}
    return 7


def changed(config: Any, field: str) -> Any:
    """A copy with one field changed and no validation."""
    other = copy.copy(config)
    object.__setattr__(other, field, different(getattr(config, field)))
    return other


def fields_of(*sections: str) -> list[tuple[str, str]]:
    from lifelong_moe.growth.config import GrowConfig
    from lifelong_moe.model.config import ModelConfig
    from lifelong_moe.retention.config import DistillConfig, TrunkConfig
    from lifelong_moe.routing.config import RoutingConfig
    from lifelong_moe.training.config import OptimConfig

    types: dict[str, Any] = {
        "grow": GrowConfig, "trunk": TrunkConfig, "distill": DistillConfig, "optim": OptimConfig,
        "model": ModelConfig, "routing": RoutingConfig,
    }  # fmt: skip
    return [(section, f.name) for section in sections for f in dataclasses.fields(types[section])]


WITHOUT_EFFECT = {("grow", "min_share"), ("trunk", "lr_scale")}  # a warning's threshold; a rate that only gentle uses


@pytest.mark.parametrize(
    ("section", "field"),
    [f for f in fields_of("grow", "trunk", "distill", "optim", "model", "routing") if f not in WITHOUT_EFFECT],
)
def test_every_field_of_every_section_is_in_the_key(later: StageSpec, section: str, field: str) -> None:
    other = dataclasses.replace(later, **{section: changed(getattr(later, section), field)})
    assert key_of(other) != key_of(later)


def test_what_has_no_effect_is_not(later: StageSpec) -> None:
    assert later.grow is not None and later.trunk is not None
    full = dataclasses.replace(later, trunk=TrunkConfig(train=TrunkTraining.full))
    for other in (
        dataclasses.replace(full, grow=dataclasses.replace(later.grow, min_share=0.5)),
        dataclasses.replace(full, trunk=TrunkConfig(train=TrunkTraining.full, lr_scale=0.5)),
        dataclasses.replace(full, tokens=full.tokens + 1),  # the same number of whole steps
    ):
        assert key_of(other) == key_of(full)


SCALARS: dict[str, Any] = {
    "name": "other",
    "replayed": (),
    "replay_fraction": 0.5,
    "tokens": 10_000_000,
    "seed": 9,
    "precision": "bf16-mixed",
    "gradient_clip": 9.0,
    "accumulate": 4,
    "grow": None,
    "trunk": None,
    "distill": None,
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(StageSpec) if f.name not in ("parent", "data")])
def test_every_field_of_the_stage_is_in_the_key(later: StageSpec, field: str) -> None:
    if field in SCALARS:
        assert key_of(dataclasses.replace(later, **{field: SCALARS[field]})) != key_of(later)
    else:  # sections: field by field above
        assert field in {"optim", "model", "routing"}


def test_the_parent_s_index_is_not_its_content_is(later: StageSpec) -> None:
    assert key_of(dataclasses.replace(later, parent=5)) == key_of(later)
    assert key_of(later, parent="other") != key_of(later)


@pytest.mark.parametrize(
    "change",
    [
        {"data_hash": "x"},
        {"replay_hashes": HASHES | {"english": "x"}},
        {"tokenizer": TOKENIZER | {"hash": "x"}},
        {"tokenizer": TOKENIZER | {"recipe": {"vocab_size": 301}}},
    ],
)
def test_what_it_reads_is_in_the_key(later: StageSpec, change: dict[str, Any]) -> None:
    assert key_of(later, **change) != key_of(later)


def test_text_that_is_not_replayed_is_not(make_run: MakeRun, later: StageSpec) -> None:
    assert later.replayed == ("english",)
    assert key_of(later, replay_hashes=HASHES | {"python": "x"}) == key_of(later)
    none = later_spec(make_run, "stage_defaults.replay.fraction=0", "stage_defaults.distill.text=new")
    assert key_of(none, replay_hashes={}) == key_of(none)


def test_a_key_is_a_function_of_the_config(make_run: MakeRun) -> None:
    key = key_of(later_spec(make_run))
    assert len(key) == 64 and set(key) <= set("0123456789abcdef")
    assert key_of(later_spec(make_run)) == key


def test_sizes_by_hand(make_run: MakeRun) -> None:
    spec = later_spec(make_run, "stage_defaults.tokens=1000")  # 64 tokens a step, 16 a sequence
    assert (spec.steps, spec.global_batch) == (15, 4)


def test_teacher_tokens_by_hand(make_run: MakeRun) -> None:
    tokens = 640
    half = ["stage_defaults.replay.fraction=0.25", "stage_defaults.distill.fraction=0.5"]
    assert later_spec(make_run, *half, "stage_defaults.distill.text=replay").teacher_tokens == tokens // 8
    assert later_spec(make_run, *half, "stage_defaults.distill.text=new").teacher_tokens == 240
    assert later_spec(make_run, "stage_defaults.distill.weight=0").teacher_tokens == 0


def test_flops_include_the_teacher_s(make_run: MakeRun) -> None:
    spec = later_spec(make_run, "stage_defaults.replay.fraction=0.25", "stage_defaults.distill.text=replay")
    parent = stage_specs(make_run())[0].architecture(None, 300, 0)
    after = spec.architecture(parent, 300, 0)
    expected = 3 * 640 * forward_flops_per_token(after) + 160 * forward_flops_per_token(parent)
    assert spec.flops(after, parent) == expected


@pytest.mark.parametrize(
    ("routing", "first", "later"),
    [
        ({}, [Phase("train", 10, False)], [Phase("train", 10, False)]),
        ({"mode": "label"}, [Phase("train", 10, False)], [Phase("train", 10, False)]),
        ({"mode": "cluster"}, [Phase("train", 10, True)], [Phase("train", 10, True)]),
        (
            {"mode": "cluster", "features": "hidden"},
            [Phase("hash", 1, False), Phase("train", 9, True)],
            [Phase("train", 10, True)],
        ),
    ],
)
def test_phases(make_run: MakeRun, routing: dict[str, Any], first: list[Phase], later: list[Phase]) -> None:
    specs = stage_specs(make_run(routing=routing))
    assert [spec.phases() for spec in specs] == [first, later]


def test_document_clusters_are_fitted_before_the_stage(make_run: MakeRun) -> None:
    run = make_run("model.document_mask=true", routing={"mode": "cluster", "level": "document"})
    assert [spec.phases() for spec in stage_specs(run)] == [[Phase("train", 10, True)]] * 2


def test_without_growth_old_clusters_stay(make_run: MakeRun) -> None:
    spec = later_spec(make_run, "routing.mode=cluster", "stage_defaults.grow.experts=0")
    assert spec.grow is None and spec.phases() == [Phase("train", 10, False)]


def test_the_architecture_at_the_end(make_run: MakeRun) -> None:
    first, second = stage_specs(make_run("routing.mode=label"))
    begun = first.architecture(None, 300, 2)
    grown = second.architecture(begun, 300, 2)
    assert (begun.vocab_size, begun.bos_id, begun.frozen) == (300, 2, 0)
    assert [(g.stage, g.experts) for g in grown.generations] == [("english", 4), ("python", 2)]
    assert grown.frozen == 1 and grown.labels == (("english", 0), ("python", 1))
