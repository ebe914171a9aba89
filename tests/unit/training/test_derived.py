"""Models without a generation, committed; and what of a stage's text remains in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lifelong_moe.config.growth import ExpertInit, GrowConfig
from lifelong_moe.config.retention import (
    DistillConfig,
    PenaltyConfig,
    PenaltyKind,
    ReplayConfig,
    ReplaySource,
    TrunkConfig,
    TrunkTraining,
)
from lifelong_moe.config.routing.base import Bundles
from lifelong_moe.errors import ConfigError
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.training.derived import commit_derived, derived_stage, generation_of, what_remains
from tests.conftest import routing_of
from tests.records import METRICS, made_record, made_spec

KEY, HOLDER = "ab" * 32, "cd" * 32


@pytest.fixture
def source(
    tmp_path: Path, make_model: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> tuple[StageStore, CommittedStage]:
    """A model of two generations of two experts, its embedding held by another stage."""
    monkeypatch.setattr(StageStore, "tokenizer", lambda _, stage: SimpleNamespace(vocab_size=61))
    store, model = StageStore(tmp_path), make_model("learned", (2, 2))
    tensors = dict(model.state_dict())
    if model.architecture.model.tie_embeddings:
        tensors.pop("head.weight")
    held = {"embedding.weight": tensors.pop("embedding.weight")}
    store.commit(made_record(HOLDER, "before"), METRICS, held)
    borrowed = {"embedding.weight": HOLDER}
    # As an earlier version wrote it.
    record = made_record(KEY, "two", parent=HOLDER, architecture=model.architecture, data={"x": KEY}, borrowed=borrowed)
    return store, store.commit(record, METRICS, tensors)


def test_what_a_drop_leaves_is_committed_and_what_keeps_name_and_bits_is_borrowed(source: Any) -> None:
    store, stage = source
    with pytest.raises(ConfigError):
        derived_stage(store, stage, "s0")  # the first generation stays
    dropped = derived_stage(store, stage, "s1")
    assert (dropped.name, dropped.parent, dropped.data) == ("s1.dropped", KEY, {})
    assert dropped.derived == {"derived": "drop", "from": KEY, "stage": "s1"}
    assert dropped.spec == stage.spec and dropped.metrics == {}
    architecture = dropped.architecture
    assert [generation.stage for generation in architecture.generations] == ["s0"]
    before, after = store.tensors(stage), store.tensors(dropped)
    expected = LanguageModel(architecture).state_dict()
    assert set(after) | {"head.weight"} == set(expected) | {"head.weight"}
    assert all(torch.equal(after[name], before[name]) for name in after if before[name].shape == after[name].shape)
    borrowed = store.holders(dropped)
    assert borrowed["embedding.weight"] == HOLDER and set(borrowed.values()) == {HOLDER, KEY}
    # What is gone has no holder, and is all that the record lists.
    assert borrowed.keys() <= after.keys() and set(dropped.removed or ()) == before.keys() - after.keys()
    assert derived_stage(store, stage, "s1").key == dropped.key and len(list(store.root.iterdir())) == 3


def test_tensors_that_changed_are_stored_and_those_of_another_model_are_a_bug(source: Any) -> None:
    store, stage = source
    tensors, architecture = store.tensors(stage), stage.architecture
    name = min(tensors)
    changed = tensors | {name: tensors[name] + 1}
    made = commit_derived(store, stage, {"derived": "merge", "from": stage.key}, "merged", architecture, changed)
    assert set(store.holders(made)) == set(tensors) - {name}
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

FROZEN, BUNDLES = TrunkConfig(train=TrunkTraining.frozen), routing_of(bundles=Bundles.cluster)
GROW, COPIES = GrowConfig(init=ExpertInit.random), GrowConfig(init=ExpertInit.copy)
L2, EWC = PenaltyConfig(kind=PenaltyKind.l2), PenaltyConfig(kind=PenaltyKind.ewc)
WRITES: dict[str, Any] = {"replay": ReplayConfig(fraction=0.0, source=ReplaySource.generated)}
GENERATED = {"replayed": ("own",), **WRITES}


def remains(own: dict[str, Any], later: dict[str, Any]) -> list[str]:
    def stage(name: str, derived: dict[str, Any] | None = None, **spec: Any) -> CommittedStage:
        plain: dict[str, Any] = {"data": "x", "parent": 0, "trunk": FROZEN, "routing": BUNDLES}
        record = made_record(KEY, name, spec=made_spec(name, **plain | spec), derived=derived)
        return CommittedStage(**vars(record), path=Path(name), metrics={}, weights_hash="")

    chain = [
        stage("before", data="own", distill=DistillConfig(), fisher_data=("own",)),  # came before
        stage("gone", **{"data": "own"} | own),
        stage("merged", {"derived": "merge"}, data="own"),  # learned nothing
        stage("later", **later),
    ]
    return what_remains(chain, "gone")


@pytest.mark.parametrize(
    ("own", "later", "found"),
    [
        ({}, {}, []),
        ({"trunk": None}, {}, ["the trunk trained on it (trunk.train=full), and all later"]),
        ({"trunk": TrunkConfig(train=TrunkTraining.gentle)}, {}, ["the trunk trained on it (trunk.train=gentle)"]),
        ({"trunk": TrunkConfig(train=TrunkTraining.deltas)}, {}, []),
        ({"grow": GROW}, {}, []),
        ({"grow": replace(GROW, old_lr_scale=0.25)}, {}, ["older experts trained on it (grow.old_lr_scale=0.25)"]),
        ({}, {"data": "own"}, ["stage later learned own itself"]),
        ({}, {"replayed": ("own",)}, ["stage later replayed own"]),
        ({}, {"data": "own", "replayed": ("own",)}, ["stage later learned own itself"]),
        ({}, {"replayed": ("other",)}, []),
        ({}, GENERATED, ["stage later trained on text that a model with it had written"]),
        ({}, WRITES, []),
        ({}, {"distill": DistillConfig()}, ["stage later was distilled from a model with it"]),
        ({}, {"penalty": EWC}, []),
        ({}, {"penalty": L2} | WRITES, []),
        ({}, {"penalty": EWC} | WRITES, ["stage later weighted its penalty by text"]),
        ({}, {"fisher_data": ("own",)}, ["stage later weighted its penalty by own"]),
        ({}, {"fisher_data": ("other",)}, []),
        # Earlier versions measured on stored text though they replayed generated text.
        ({}, {"penalty": EWC, "fisher_data": ("own",)} | WRITES, ["stage later weighted its penalty by own"]),
        ({}, {"grow": GROW}, []),
        ({}, {"grow": COPIES}, ["stage later initialized its experts as copies"]),
        (
            {},
            {"grow": GROW, "routing": routing_of()},
            ["stage later trained its router rows"],
        ),
        ({}, {"routing": routing_of()}, []),
        ({}, {"grow": GROW, "routing": routing_of(mode="hash")}, []),
    ],
)
def test_what_remains_of_a_stage_s_text(own: dict[str, Any], later: dict[str, Any], found: list[str]) -> None:
    said = remains(own, later)
    assert len(said) == len(found) and all(line.startswith(begin) for line, begin in zip(said, found, strict=True))
