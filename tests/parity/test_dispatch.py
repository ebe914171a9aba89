"""Sorting, experts on slices and summing back against one token at a time: outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lifelong_moe.model.experts import ExpertBanks
from lifelong_moe.ops.dispatch import inverse_permutation, mixture_readable, sort_by_expert
from lifelong_moe.routing.base import Routing

D, F = 6, 5


def make_banks(num_experts: int, num_frozen: int, seed: int) -> ExpertBanks:
    banks = ExpertBanks(D, F)
    banks.add(num_frozen)
    banks.freeze()
    banks.add(num_experts - num_frozen)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in banks.parameters():
            parameter.normal_(generator=generator)
    return banks.double()


def gradients(banks: ExpertBanks, x: Tensor, weights: Tensor) -> list[Tensor | None]:
    return [x.grad, weights.grad, *(p.grad for p in banks.parameters())]


def check_parity(ids_TK: Tensor, num_experts: int, num_frozen: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, top_k = ids_TK.shape
    x0 = torch.randn(tokens, D, generator=generator, dtype=torch.float64)
    w0 = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    upstream = torch.randn(tokens, D, generator=generator, dtype=torch.float64)
    found = []
    for fast in (True, False):
        banks = make_banks(num_experts, num_frozen, seed)
        x, w = x0.clone().requires_grad_(), w0.clone().requires_grad_()
        if fast:
            routing = Routing(ids_TK, w, num_experts)
            out = routing.combine(banks(routing.dispatch(x), routing.counts_E))
        else:
            out = mixture_readable(x, ids_TK, w, list(banks.experts))
        (out * upstream).sum().backward()
        found.append((out, gradients(banks, x, w)))
    (fast_out, fast_grads), (slow_out, slow_grads) = found
    torch.testing.assert_close(fast_out, slow_out, atol=1e-12, rtol=1e-12)
    for fast_grad, slow_grad in zip(fast_grads[:2], slow_grads[:2], strict=True):
        torch.testing.assert_close(fast_grad, slow_grad, atol=1e-11, rtol=1e-11)
    for i, (fast_grad, slow_grad) in enumerate(zip(fast_grads[2:], slow_grads[2:], strict=True)):
        if i // 2 < num_frozen:
            assert fast_grad is None and slow_grad is None
        else:  # an active expert without tokens has a zero gradient, not an absent one
            assert fast_grad is not None
            expected = torch.zeros_like(fast_grad) if slow_grad is None else slow_grad
            torch.testing.assert_close(fast_grad, expected, atol=1e-11, rtol=1e-11)


@st.composite
def assignments(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Distinct experts for each token, from a range that may leave most experts empty."""
    num_experts = draw(st.integers(1, 7))
    top_k = draw(st.integers(1, min(3, num_experts)))
    tokens = draw(st.integers(1, 12))
    used = draw(st.integers(top_k, num_experts))
    row = st.permutations(range(used)).map(lambda order: order[:top_k])
    ids = draw(st.lists(row, min_size=tokens, max_size=tokens))
    return torch.tensor(ids), num_experts, draw(st.integers(0, num_experts))


@given(assignments(), st.integers(0, 1000))
def test_fast_equals_readable(case: tuple[Tensor, int, int], seed: int) -> None:
    check_parity(*case, seed)


@pytest.mark.parametrize("expert", [0, 2, 4])
@pytest.mark.parametrize("frozen", [0, 3])
def test_all_tokens_to_one_expert(expert: int, frozen: int) -> None:
    check_parity(torch.full((9, 1), expert), num_experts=5, num_frozen=frozen, seed=0)


def test_gradients_are_those_of_finite_differences() -> None:
    banks = make_banks(4, 0, seed=3)
    ids = torch.tensor([[0, 2], [2, 1], [2, 0], [1, 0], [0, 1]])
    x = torch.randn(5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    w = torch.rand(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def mixture(x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        routing = Routing(ids, weights_TK, 4)
        return routing.combine(banks(routing.dispatch(x_TD), routing.counts_E))

    assert torch.autograd.gradcheck(mixture, (x, w))


def test_sorting_by_hand() -> None:
    order, counts = sort_by_expert(torch.tensor([2, 0, 2, 0, 3]), 5)
    assert order.tolist() == [1, 3, 0, 2, 4]  # by expert, then by position
    assert counts.tolist() == [2, 0, 2, 1, 0]
    assert inverse_permutation(order).tolist() == [2, 0, 3, 1, 4]


def test_weighted_sum_by_hand() -> None:
    routing = Routing(torch.tensor([[1, 0], [0, 1]]), torch.tensor([[0.25, 0.75], [1.0, 0.5]]), 2)
    rows = routing.dispatch(torch.tensor([[1.0], [10.0]]))
    assert rows.flatten().tolist() == [1, 10, 1, 10]  # expert 0: both tokens; expert 1: both tokens
    assert routing.counts_E.tolist() == [2, 2]
    doubled = rows * torch.tensor([[2.0], [2.0], [3.0], [3.0]])
    assert routing.combine(doubled).flatten().tolist() == [0.25 * 3 + 0.75 * 2, 1.0 * 20 + 0.5 * 30]
