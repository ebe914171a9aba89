"""A step has one objective, however it is divided among processes: weights and curves of a few steps, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.divided import CASES, MakeModel, MakeRun, second_stage, take_steps, take_steps_in_ranks

pytestmark = pytest.mark.usefixtures("forked")

ROUTERS = {
    "learned": {},
    "learned, active experts": {"balance_over": "active"},
    "learned, global batch": {"balance_scope": "global_batch"},
    "sigmoid": {},
    "labelled_bundles": {},
    "gshard": {"second": "threshold", "balance_counts": "first"},
    "hierarchical": {"balance_loss": 0.1},
    "relu": {"balance_loss": 0.1},
}
"""Routers without random numbers, of which each has losses that are not means over tokens."""


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in float32 by contract is so here, too, or rounding would hide what is compared."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def compare(make_run: MakeRun, make_model: MakeModel, folder: Path, case: str, router: str, parts: int = 1) -> None:
    kind, routing = router.partition(",")[0], {"balance_loss": 0.5, **ROUTERS[router]}
    begin = second_stage(make_run, make_model, case, kind, **routing)
    two, curves = take_steps_in_ranks(begin, 2, 2, folder, expert_parallel=parts)
    one, watch = take_steps(begin, 2)
    assert two.keys() == one.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-8, atol=1e-10)
    assert curves == [pytest.approx(curve, rel=1e-8) for curve in watch.curves]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(
    make_run: MakeRun, make_model: MakeModel, tmp_path: Path, case: str
) -> None:
    compare(make_run, make_model, tmp_path, case, "learned")


@pytest.mark.parametrize(("case", "parts"), [("penalty", 1), ("replay, distilled", 2)], ids=["whole", "experts apart"])
@pytest.mark.parametrize("router", ROUTERS)
def test_router_losses_are_those_of_all_processes(
    make_run: MakeRun, make_model: MakeModel, tmp_path: Path, router: str, case: str, parts: int
) -> None:
    compare(make_run, make_model, tmp_path, case, router, parts)
