"""How many looks a stage affords, by hand, and that they cost no more than they may."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from lifelong_moe.config.run import RunConfig
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.cost import forward_flops_per_token
from lifelong_moe.plan.flops import loop_flops
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.training.callbacks.looks import Looks, affordable_looks, stage_looks


@pytest.mark.parametrize(
    ("budget", "looks"),
    [
        # 256 tokens of 10 FLOPs and 40 for a pass are 2,600; a look has three passes, and there is one at the start.
        (2600 * 3 * 2 - 1, None),
        (2600 * 3 * 2, Looks(1, 256)),
        (2600 * 3 * 10, Looks(9, 256)),
        (2600 * 3 * 10 + 3 * 10 * 100, Looks(9, 266)),
        (1e9, Looks(9, 4096)),
        (0.0, None),
    ],
)
def test_a_budget_pays_for_looks_first_and_then_for_tokens(budget: float, looks: Looks | None) -> None:
    assert affordable_looks(budget, 10.0, 40.0, 3) == looks


def test_looks_are_evenly_spaced_between_the_ends() -> None:
    assert sorted(Looks(9, 256).steps(100)) == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert sorted(Looks(1, 256).steps(7)) == [4]
    # Fewer steps than looks: each step is looked at once, and neither end is.
    assert sorted(Looks(9, 256).steps(3)) == [1, 2]
    assert Looks(9, 256).steps(1) == frozenset()


@pytest.mark.parametrize("tokens", [40_000, 400_000, 40_000_000])
@pytest.mark.parametrize("distributions", [2, 6])
def test_all_looks_cost_no_more_than_their_share(
    make_run: Callable[..., RunConfig], tokens: int, distributions: int
) -> None:
    one, two = stage_specs(make_run())
    parent = one.architecture(None, 300, 0)
    spec = replace(two, tokens=tokens)
    architecture: Architecture = spec.architecture(parent, 300, 0)
    found = stage_looks(0.02, spec, architecture, parent, distributions)
    assert (found is None) == (tokens == 40_000 and distributions == 6)
    if found is not None:
        read = (found.number + 1) * (distributions + 1) * found.tokens
        assert read * forward_flops_per_token(architecture) <= 0.02 * loop_flops(spec, architecture, parent)
    assert stage_looks(0.0, spec, architecture, parent, distributions) is None
