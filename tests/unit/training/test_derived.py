"""Models without a generation, committed; and what of a stage's text remains in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lifelong_moe.errors import ConfigError
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.stages.store import CommittedStage, StageStore
from lifelong_moe.training.derived import commit_derived, derived_stage, generation_of, what_remains

KEY, HOLDER = "ab" * 32, "cd" * 32


@pytest.fixture
def source(tmp_path: Path, make_model: Callable[..., LanguageModel]) -> tuple[StageStore, CommittedStage]:
    """A model of two generations of two experts, its embedding held by another stage."""
    store, model = StageStore(tmp_path), make_model("learned", (2, 2))
    tensors = dict(model.state_dict())
    if model.architecture.model.tie_embeddings:
        tensors.pop("head.weight")
    held = {"embedding.weight": tensors.pop("embedding.weight")}
    store.commit({"key": HOLDER, "name": "before", "parent": None}, {}, held, {})
    config = {
        "key": KEY, "name": "two", "parent": None, "spec": {"name": "two"}, "tokenizer": {"hash": "t"},
        "architecture": model.architecture.to_json(), "data": {"x": "1"},
    }  # fmt: skip
    return store, store.commit(config, {}, tensors, {"embedding.weight": HOLDER})


def test_what_a_drop_leaves_is_committed_and_what_keeps_name_and_bits_is_borrowed(source: Any) -> None:
    store, stage = source
    with pytest.raises(ConfigError):
        derived_stage(store, stage, "s0")  # the first generation stays
    dropped = derived_stage(store, stage, "s1")
    assert (dropped.name, dropped.config["parent"], dropped.config["data"]) == ("s1.dropped", KEY, {})
    assert dropped.config["derived"] == {"derived": "drop", "from": KEY, "stage": "s1"}
    assert dropped.config["spec"] == stage.config["spec"] and dropped.metrics == {}
    architecture = Architecture.from_json(dropped.config["architecture"])
    assert [generation.stage for generation in architecture.generations] == ["s0"]
    before, after = store.tensors(stage), store.tensors(dropped)
    expected = LanguageModel(architecture).state_dict()
    assert set(after) | {"head.weight"} == set(expected) | {"head.weight"}
    assert all(torch.equal(after[name], before[name]) for name in after if before[name].shape == after[name].shape)
    assert dropped.config["borrowed"]["embedding.weight"] == HOLDER
    assert set(dropped.config["borrowed"].values()) == {HOLDER, KEY}
    assert derived_stage(store, stage, "s1").key == dropped.key and len(list(store.root.iterdir())) == 3


def test_tensors_that_changed_are_stored_and_those_of_another_model_are_a_bug(source: Any) -> None:
    store, stage = source
    tensors, architecture = store.tensors(stage), Architecture.from_json(stage.config["architecture"])
    name = min(tensors)
    changed = tensors | {name: tensors[name] + 1}
    made = commit_derived(store, stage, {"derived": "merge"}, "merged", architecture, changed)
    assert name not in made.config["borrowed"] and set(made.config["borrowed"]) == set(tensors) - {name}
    assert torch.equal(store.tensors(made)[name], tensors[name] + 1)
    for wrong in ({k: v for k, v in tensors.items() if k != name}, tensors | {"more": torch.zeros(1)}):
        with pytest.raises(AssertionError):
            commit_derived(store, stage, {"derived": "x"}, "wrong", architecture, wrong)


def test_a_generation_is_found_by_the_stage_that_bore_it(make_architecture: Callable[..., Architecture]) -> None:
    architecture = make_architecture("learned", (4, 2))
    assert [generation_of(architecture, name) for name in ("s0", "s1")] == [0, 1]
    with pytest.raises(ConfigError, match="no experts born in stage s2"):
        generation_of(architecture, "s2")


# What remains of a stage's text

SPEC: dict[str, Any] = {
    "data": "x", "trunk": {"train": "none"}, "grow": None, "replayed": [], "replay_source": "text", "distill": None,
    "penalty": None, "fisher_data": [], "routing": {"bundles": "cluster", "mode": "learned"},
}  # fmt: skip


def remains(own: dict[str, Any], later: dict[str, Any] | None = None) -> list[str]:
    chain = [
        {"name": "before", "spec": SPEC | {"data": "own", "distill": {}, "fisher_data": ["own"]}},  # came before
        {"name": "gone", "spec": SPEC | {"data": "own"} | own},
        {"name": "merged", "spec": SPEC | {"data": "own"}, "derived": {}},  # learned nothing
        {"name": "later", "spec": SPEC | (later or {})},
    ]
    return what_remains(chain, "gone")


GROW = {"old_lr_scale": 0.0, "init": "random"}
GENERATED = {"replayed": ["own"], "replay_source": "generated"}


@pytest.mark.parametrize(
    ("own", "later", "found"),
    [
        ({}, {}, []),
        ({"trunk": None}, {}, ["the trunk trained on it (trunk.train=full), and all later"]),
        ({"trunk": {"train": "gentle"}}, {}, ["the trunk trained on it (trunk.train=gentle)"]),
        ({"trunk": {"train": "deltas"}}, {}, []),
        ({"grow": GROW}, {}, []),
        ({"grow": GROW | {"old_lr_scale": 0.25}}, {}, ["older experts trained on it (grow.old_lr_scale=0.25)"]),
        ({}, {"data": "own"}, ["stage later learned own itself"]),
        ({}, {"replayed": ["own"]}, ["stage later replayed own"]),
        ({}, {"data": "own", "replayed": ["own"]}, ["stage later learned own itself"]),
        ({}, {"replayed": ["other"]}, []),
        ({}, GENERATED, ["stage later trained on text that a model with it had written"]),
        ({}, {"replay_source": "generated"}, []),
        ({}, {"distill": {"weight": 1.0}}, ["stage later was distilled from a model with it"]),
        ({}, {"penalty": {"kind": "ewc"}}, []),
        ({}, {"penalty": {"kind": "l2"}, "replay_source": "generated"}, []),
        ({}, {"penalty": {"kind": "ewc"}, "replay_source": "generated"}, ["stage later weighed its penalty by text"]),
        ({}, {"fisher_data": ["own"]}, ["stage later weighed its penalty by own"]),
        ({}, {"fisher_data": ["other"]}, []),
        ({}, {"grow": GROW}, []),
        ({}, {"grow": GROW | {"init": "copy"}}, ["stage later began its experts as copies"]),
        (
            {},
            {"grow": GROW, "routing": {"bundles": "none", "mode": "learned"}},
            ["stage later trained its router rows"],
        ),
        ({}, {"routing": {"bundles": "none", "mode": "learned"}}, []),
        ({}, {"grow": GROW, "routing": {"bundles": "none", "mode": "hash"}}, []),
    ],
)
def test_what_remains_of_a_stage_s_text(own: dict[str, Any], later: dict[str, Any], found: list[str]) -> None:
    said = remains(own, later)
    assert len(said) == len(found) and all(line.startswith(begin) for line, begin in zip(said, found, strict=True))
