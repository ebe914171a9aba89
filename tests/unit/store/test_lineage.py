"""Names of experts, and how far a stage under way has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lifelong_moe.plan.architecture import Architecture, Generation
from lifelong_moe.store.lineage import expert_names, grouped_names, work_under_way


@pytest.mark.parametrize(
    ("steps", "newest"), [([], None), ([4], 4), ([4, 8], 8), ([900, 1000], 1000), ([8, 12, 10], 12)]
)
def test_the_newest_step_is_the_one_that_is_under_way(tmp_path: Path, steps: list[int], newest: int | None) -> None:
    for step in steps:
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / "random-99999999").mkdir()
    assert work_under_way(tmp_path) == newest


def test_ranges_have_two_dots_and_layers_of_equal_experts_stand_together() -> None:
    experts = {"a": {0: [0, 1, 2], 1: [0, 1, 2], 2: [5]}, "b": {0: [], 1: [3]}}
    assert grouped_names(experts) == "a/L0..1/E0..2, a/L2/E5, b/L1/E3"
    assert grouped_names({"b": {0: []}}) == "none"


def test_names_of_the_experts_that_a_stage_bore(make_architecture: Callable[..., Architecture]) -> None:
    architecture = make_architecture("learned")
    first = replace(architecture.generations[0], stage="a", experts=4)
    grown = replace(architecture, generations=(first, Generation("b", 2, layers=(1,))))
    assert expert_names(grown, "a") == f"a/L0..{architecture.model.layers - 1}/E0..3"
    assert expert_names(grown, "b") == "b/L1/E4..5"
