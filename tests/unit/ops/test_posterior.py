from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lifelong_moe.ops.posterior import log_weights, next_log_weights


def one_by_one(score_TG: Tensor, left_G: Tensor, drop: float) -> tuple[Tensor, Tensor]:
    rows = []
    for score_G in score_TG:
        row, left_G = next_log_weights(score_G, left_G, drop)
        rows.append(row)
    return torch.stack(rows), left_G


@given(
    seed=st.integers(0, 10_000),
    steps=st.integers(1, 30),
    members=st.integers(1, 6),
    drop=st.sampled_from([0.0, 0.01, 0.3]),
)
def test_all_steps_at_once_are_the_steps_one_by_one(seed: int, steps: int, members: int, drop: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    score_TG = torch.randn(steps, members, generator=generator, dtype=torch.float64).cumsum(dim=0)
    left_G = torch.rand(members, generator=generator) < 0.7
    left_G[seed % members] = True
    found_TG, found_G = log_weights(score_TG, left_G, drop)
    expected_TG, expected_G = one_by_one(score_TG, left_G, drop)
    torch.testing.assert_close(found_TG, expected_TG, atol=1e-12, rtol=0)
    assert found_G.equal(expected_G) and bool(found_G.any())
    torch.testing.assert_close(found_TG.exp().sum(dim=1), torch.ones(steps, dtype=torch.float64))
    # Nothing that comes later matters, and who is out stays out.
    cut = 1 + seed % steps
    assert log_weights(score_TG[:cut], left_G, drop)[0].equal(found_TG[:cut])
    assert bool((~found_TG.isneginf()).int().diff(dim=0).le(0).all())


def test_by_hand() -> None:
    # The second falls under a tenth of the first, and is out although it would lead again.
    score_TG = torch.tensor([[0.0, 0.0], [0.0, -2.0], [0.0, -3.0], [0.0, 9.0]], dtype=torch.float64)
    found_TG, left_G = log_weights(score_TG, torch.ones(2, dtype=torch.bool), 0.1)
    share = 1 / (1 + math.exp(-2))
    assert found_TG.exp().tolist() == [
        pytest.approx([0.5, 0.5]), pytest.approx([share, 1 - share]), [1.0, 0.0], [1.0, 0.0]
    ]  # fmt: skip
    assert left_G.tolist() == [True, False]
    assert found_TG[2].tolist() == [0.0, -math.inf]  # exactly, so that the last one's own prediction stays as it is
