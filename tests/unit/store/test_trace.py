"""From an expert to the text that made it, and from text to the experts that learned from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lifelong_moe.config.growth import ExpertInit, GrowConfig
from lifelong_moe.config.parts import expert_tensor
from lifelong_moe.config.retention import DistillConfig, ReplayConfig, ReplaySource
from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.architecture import Architecture, Generation
from lifelong_moe.store.stages import CommittedStage
from lifelong_moe.store.trace import Birth, readers, trace_expert, trained_experts
from tests.records import made_record, made_spec

FIRST, GROWN = Generation("a", 2), Generation("b", 3, layers=(1,))


def named(stage: CommittedStage) -> Mapping[str, str]:
    """Stages here name the holders themselves."""
    return stage.borrowed


@pytest.fixture
def chain(make_architecture: Callable[..., Architecture]) -> list[CommittedStage]:
    """Two experts everywhere; three more in layer 1; then a stage that trains none, and one derived from that."""

    def stage(
        name: str,
        generations: tuple[Generation, ...],
        borrowed: dict[str, str],
        grow: GrowConfig | None = None,
        **changes: Any,
    ) -> CommittedStage:
        record = made_record(
            f"key of {name}",
            name,
            spec=made_spec(name, parent=0 if changes else None, grow=grow),
            architecture=replace(make_architecture("learned"), generations=generations),
            data={f"{name}_text": name * 64},
            borrowed=borrowed,
            **changes,
        )
        more: dict[str, Any] = {"path": Path(name), "metrics": {"epochs": 0.5}, "weights_hash": f"weights of {name}"}
        return CommittedStage(**vars(record), **more)

    def held(key: str, *experts: tuple[int, int]) -> dict[str, str]:
        return {expert_tensor(layer, expert, "down"): key for layer, expert in experts}

    old = held("key of a", (0, 0), (0, 1), (1, 0), (1, 1))
    new = held("key of b", (1, 2), (1, 3), (1, 4))
    both = (FIRST, GROWN)
    return [
        stage("a", (FIRST,), {}),
        stage("b", both, old, GrowConfig(init=ExpertInit.copy), parent="key of a"),
        stage("c", both, old | {k: v for k, v in new.items() if k != expert_tensor(1, 3, "down")}, parent="key of b"),
        stage("a.dropped", (GROWN,), held("key of b", (1, 0)), parent="key of c", derived={"derived": "drop"}),
    ]


def test_an_expert_s_history_goes_over_all_stages_since_its_birth(chain: list[CommittedStage]) -> None:
    found = trace_expert(chain, named, "b/L1/E1")  # the second of its generation: the first one is gone, so it moved up
    assert found.born == Birth(
        stage="b", key="key of b", data={"b_text": "b" * 64}, began="copy", weights_sha256="weights of b"
    )
    assert [(row.stage, row.tensors, row.held_by, row.data) for row in found.stages] == [
        ("b", "trained", "key of b", {"b_text": "b" * 64}),
        ("c", "trained", "key of c", {"c_text": "c" * 64}),  # only this one of the three
        ("a.dropped", "moved", "key of a.dropped", {}),
    ]
    assert [row.tensors for row in trace_expert(chain[:3], named, "b/L1/E4").stages] == ["trained", "borrowed"]
    (born, grown) = trace_expert(chain[:2], named, "a/L0/E1").stages
    assert (born.tensors, grown.tensors, grown.held_by) == ("trained", "borrowed", "key of a")
    assert trace_expert(chain[:1], named, "a/L0/E1").born.began == "random"


def test_a_student_s_layers_are_numbered_anew(chain: list[CommittedStage]) -> None:
    """Its only layer is layer 1 of its parent, in which alone the generation grew; then it was derived from."""
    spec = replace(chain[1].spec, distill=DistillConfig(student=[1]))
    architecture = chain[1].architecture.shallow([1])
    student = replace(chain[1], name="student", key="key of student", architecture=architecture, spec=spec, borrowed={})
    derived = replace(student, name="derived", key="key of derived", derived={"derived": "merge"})
    found = trace_expert([*chain[:3], student, derived], named, "b/L0/E3").stages
    assert [(row.stage, row.tensors, row.held_by) for row in found] == [
        ("b", "trained", "key of b"),
        ("c", "trained", "key of c"),  # E3 of layer 1
        ("student", "trained", "key of student"),
        ("derived", "moved", "key of derived"),
    ]


@pytest.mark.parametrize("name", ["b/L0/E2", "a/L0/E2", "b/L1/E1", "a/L1/E2", "a/L2/E0", "b/L1/E5", "c/L0/E0"])
def test_what_the_model_has_not_cannot_be_traced(chain: list[CommittedStage], name: str) -> None:
    with pytest.raises(ConfigError, match=r"no such expert; it has a/L0\.\.1/E0\.\.1, b/L1/E2\.\.4\."):
        trace_expert(chain[:2], named, name)
    with pytest.raises(ConfigError, match="an expert's name is STAGE/L<layer>/E<index>"):
        trace_expert(chain, named, name.replace("E", "X"))


def test_a_stage_trained_the_experts_that_it_does_not_borrow(chain: list[CommittedStage]) -> None:
    found = [trained_experts(stage, stage.borrowed) for stage in chain]
    assert found == ["a/L0..1/E0..1", "b/L1/E2..4", "b/L1/E3", "none"]


def read(stage: CommittedStage, **spec: Any) -> CommittedStage:
    """The same stage, which read text of two kinds."""
    texts = {"own": "1", "old": "2"}
    return replace(stage, data=texts, split=texts, spec=replace(stage.spec, data="own", **spec))


def test_a_set_s_readers_learned_replayed_or_measured_it(chain: list[CommittedStage]) -> None:
    def roles(stage: CommittedStage, *splits: str) -> list[tuple[str, str]]:
        return [(row.distribution, row.role) for row in readers([stage], named, splits)]

    first, later = chain[0], chain[1]
    assert roles(read(first, replayed=("old",)), "1", "2") == [("own", "learned"), ("old", "learned")]  # joint training
    assert roles(read(later, replayed=("old",)), "1", "2") == [("own", "learned"), ("old", "replayed")]
    generated = ReplayConfig(source=ReplaySource.generated)
    assert roles(read(later, replayed=("old",), replay=generated), "2") == [("old", "measured")]
    assert roles(read(later), "2", "3") == [("old", "measured")] and roles(read(first), "2") == [("old", "measured")]
    assert roles(read(later), "3") == roles(read(chain[3]), "1") == []
    (row,) = readers([read(later)], named, ["1"])
    assert (row.stage, row.key, row.epochs, row.experts) == ("b", "key of b", 0.5, "b/L1/E2..4")


def test_near_copies_alone_are_asked_of_stages_that_read_them(chain: list[CommittedStage]) -> None:
    """Earlier versions left no near copies out, so that their sets are asked about by another hash."""
    now = read(chain[1])
    earlier = replace(now, read_near_copies=True)
    for stage, number in ((earlier, 1), (now, 0)):
        assert len(readers([stage], named, [], left_out=["1"])) == number
        assert len(readers([stage], named, ["1"], ["1"])) == 1
    assert len(readers([replace(now, data={})], named, ["1", "2"])) == 2  # what was split counts
