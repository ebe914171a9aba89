"""Capacity: the fast way against the readable one, formulas against published ones by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lifelong_moe.ops.capacity import (
    batch_priority_order,
    choice_order,
    expert_capacity,
    token_order,
    within_capacity,
    within_capacity_readable,
)


@pytest.mark.parametrize(
    ("tokens", "experts", "per_token", "factor", "round_up", "multiple", "least", "expected"),
    [
        (100, 8, 1, 1.25, False, 1, 4, 15),  # Mesh: truncates 15.6
        (100, 8, 2, 1.0, True, 1, 4, 25),  # DeepSpeed: top-2
        (101, 8, 2, 1.0, True, 1, 4, 26),  # DeepSpeed rounds up 25.25
        (100, 8, 1, 1.0, False, 4, 1, 12),  # Lingvo: 12.5 to 12, a multiple of 4
        (100, 8, 1, 1.1, False, 4, 1, 16),  # 13.75 to 13, up to 16
        (16, 32, 1, 1.0, False, 1, 4, 4),  # the least
        (3, 8, 2, 4.0, True, 4, 4, 3),  # never more than there are tokens
        (64, 8, 1, 0.7, True, 1, 0, 6),  # 5.6
        (80, 8, 1, 0.7, False, 1, 0, 7),  # 7.0, although 80 * 0.7 / 8 is a little less in binary
    ],
)
def test_capacity_by_hand(
    tokens: int, experts: int, per_token: int, factor: float, round_up: bool, multiple: int, least: int, expected: int
) -> None:
    found = expert_capacity(
        tokens, experts, per_token, factor=factor, round_up=round_up, multiple=multiple, least=least
    )
    assert found == expected


@given(
    tokens=st.integers(0, 24),
    top_k=st.integers(1, 3),
    groups=st.integers(1, 3),
    capacity=st.integers(0, 6),
    seed=st.integers(0, 9999),
)
def test_fast_equals_readable(tokens: int, top_k: int, groups: int, capacity: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(tokens, 5, generator=generator).argsort(dim=1)[:, :top_k]
    ids_TK = ids_TK.masked_fill(torch.rand(ids_TK.shape, generator=generator) < 0.2, -1)
    order_N = torch.randperm(tokens * top_k, generator=generator)
    group_T = torch.randint(groups, (tokens,), generator=generator)
    taken_GE = torch.randint(3, (groups, 5), generator=generator)
    fast = within_capacity(ids_TK, order_N, group_T, capacity, taken_GE)
    slow = within_capacity_readable(ids_TK, order_N, group_T, capacity, taken_GE)
    assert torch.equal(fast[0], slow[0]) and torch.equal(fast[1], slow[1])
    used = fast[1] - taken_GE
    assert bool((used <= (capacity - taken_GE).clamp(min=0)).all()) and int(used.sum()) == int(fast[0].sum())


def test_orders() -> None:
    assert token_order(3, 2).tolist() == [0, 1, 2, 3, 4, 5]
    assert choice_order(torch.tensor([0, 1, 2]), 2).tolist() == [0, 2, 4, 1, 3, 5]
    assert choice_order(torch.tensor([2, 0, 1]), 2).tolist() == [4, 0, 2, 5, 1, 3]
    gates = torch.tensor([[0.6, 0.1], [0.9, 0.1], [0.2, 0.6]])
    assert batch_priority_order(gates.amax(dim=1), 2).tolist() == [2, 0, 4, 3, 1, 5]
