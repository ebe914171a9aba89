from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lifelong_moe.ops.router_losses import load_balancing_loss, old_experts_loss, router_z_loss

ALL = torch.ones(2, dtype=torch.bool)


def test_balance_by_hand() -> None:
    # Three experts, top-1, both tokens choose expert 0: f = (1, 0, 0), p_0 = (0.8 + 0.6) / 2 = 0.7; 3 * 0.7.
    probs = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1]])
    assert float(load_balancing_loss(probs, torch.tensor([[0], [0]]), ALL)) == pytest.approx(2.1)


def test_balance_by_hand_for_two_choices() -> None:
    # f = (1, 1/2, 1/2), p = (0.7, 0.2, 0.1); E / K * sum f p = 3 / 2 * (0.7 + 0.1 + 0.05).
    probs = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1]])
    assert float(load_balancing_loss(probs, torch.tensor([[0, 2], [0, 1]]), ALL)) == pytest.approx(1.275)


@given(st.integers(1, 6), st.integers(1, 6))
def test_balance_is_one_at_perfect_balance(num_experts: int, top_k: int) -> None:
    top_k = min(top_k, num_experts)
    ids = (torch.arange(num_experts).unsqueeze(1) + torch.arange(top_k)) % num_experts  # each expert K times
    probs = torch.full((num_experts, num_experts), 1 / num_experts)
    mask = torch.ones(num_experts, dtype=torch.bool)
    assert float(load_balancing_loss(probs, ids, mask)) == pytest.approx(1.0)


def test_collapse_costs_the_number_of_experts() -> None:
    probs = torch.tensor([[0.0, 1.0, 0.0, 0.0]] * 2)
    assert float(load_balancing_loss(probs, torch.tensor([[1], [1]]), ALL)) == 4.0


def test_only_probabilities_carry_gradient() -> None:
    # d/dp[t, e] = E * f_e / T; f = (1, 0, 0).
    probs = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1]], requires_grad=True)
    load_balancing_loss(probs, torch.tensor([[0], [0]]), ALL).backward()
    torch.testing.assert_close(probs.grad, torch.tensor([[1.5, 0.0, 0.0], [1.5, 0.0, 0.0]]))


def test_first_expert_by_hand() -> None:
    # Of experts 2 and 3: choices 2, 2, 3 → f = (2/3, 1/3); p sums (0.1 + 0.3, 0.1 + 0.1) → (2/3, 1/3).
    probs = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.3, 0.3, 0.3, 0.1]])
    ids = torch.tensor([[0, 2], [2, 3]])
    value = load_balancing_loss(probs, ids, ALL, first_expert=2)
    assert float(value) == pytest.approx(2 * (4 / 9 + 1 / 9))


def test_first_expert_without_assignments_is_zero() -> None:
    probs = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]], requires_grad=True)
    value = load_balancing_loss(probs, torch.tensor([[0, 1], [1, 0]]), ALL, first_expert=2)
    value.backward()
    assert value.item() == 0.0
    assert probs.grad is not None and bool(torch.isfinite(probs.grad).all())


@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 1000))
def test_padding_has_no_effect(real: int, first: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(real + 4, 5, generator=generator, dtype=torch.float64)
    ids = logits.topk(2).indices
    mask = torch.zeros(real + 4, dtype=torch.bool)
    mask[torch.randperm(real + 4, generator=generator)[:real]] = True
    with_padding = load_balancing_loss(logits.softmax(-1), ids, mask, first)
    kept = torch.ones(real, dtype=torch.bool)
    # Zeros in a sum change nothing but the order of its terms.
    exact = {"atol": 1e-14, "rtol": 1e-14}
    without = load_balancing_loss(logits.softmax(-1)[mask], ids[mask], kept, first)
    torch.testing.assert_close(with_padding, without, **exact)
    torch.testing.assert_close(router_z_loss(logits, mask), router_z_loss(logits[mask], kept), **exact)


def test_z_loss_by_hand() -> None:
    assert float(router_z_loss(torch.zeros(2, 8), ALL)) == pytest.approx(math.log(8) ** 2)
    # logsumexp (ln 1, ln 3) = ln 4; logsumexp (0, 0) = ln 2
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    assert float(router_z_loss(logits, ALL)) == pytest.approx((math.log(4) ** 2 + math.log(2) ** 2) / 2)


def test_nothing_to_average_is_refused() -> None:
    none = torch.zeros(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="at least one unmasked token"):
        load_balancing_loss(torch.full((2, 2), 0.5), torch.tensor([[0], [1]]), none)
    with pytest.raises(ValueError, match="at least one unmasked token"):
        router_z_loss(torch.zeros(2, 2), none)


def test_with_fewer_experts_the_even_share_is_another() -> None:
    # Token 0 may use experts 0 and 1, token 1 all four: even shares q = (3, 3, 1, 1) / 8.
    allowed = torch.tensor([[True, True, False, False], [True] * 4])
    probs = torch.tensor([[0.5, 0.5, 0, 0], [0.25] * 4])
    for chosen in ([[0], [0]], [[1], [3]]):
        assert float(load_balancing_loss(probs, torch.tensor(chosen), ALL, 0, allowed)) == pytest.approx(1.0)
    # p = (1, 0, 1, 0) / 2 and f = (1, 0, 1, 0) / 2: 1/4 / (3/8) + 1/4 / (1/8) = 8 / 3.
    probs = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1.0, 0]])
    assert float(load_balancing_loss(probs, torch.tensor([[0], [2]]), ALL, 0, allowed)) == pytest.approx(8 / 3)
    # Experts 2 and 3 alone: f = p = (1, 0), q = (1, 1) / 2.
    assert float(load_balancing_loss(probs, torch.tensor([[0], [2]]), ALL, 2, allowed)) == pytest.approx(2.0)
    # Nobody may use them: nothing to balance.
    none = allowed[:1].expand(2, 4)
    assert float(load_balancing_loss(probs, torch.tensor([[0], [0]]), ALL, 2, none)) == 0.0


@given(st.integers(0, 2**31))
def test_all_experts_allowed_is_no_mask(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(12, 5, generator=generator).softmax(dim=-1)
    ids = probs.topk(2).indices
    mask = torch.rand(12, generator=generator) < 0.7
    mask[0] = True
    for first in (0, 3):
        plain = load_balancing_loss(probs, ids, mask, first)
        masked = load_balancing_loss(probs, ids, mask, first, torch.ones(12, 5, dtype=torch.bool))
        torch.testing.assert_close(masked, plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_old", [1, 3, 4])
def test_old_experts_by_hand(num_old: int) -> None:
    # Equal logits of four experts: the old ones hold num_old / 4 of the probability.
    assert float(old_experts_loss(torch.zeros(2, 4), num_old, ALL)) == pytest.approx(math.log(4 / num_old), abs=1e-6)


def test_old_experts_average_over_old_tokens() -> None:
    # Probabilities (1, 3, 4) / 8 and (1, 1, 2) / 4, two old experts: ln(8 / 4) and ln(4 / 2); the third is new text.
    logits = torch.tensor([[1.0, 3.0, 4.0], [1.0, 1.0, 2.0], [1.0, 1.0, 98.0]]).log()
    mask = torch.tensor([True, True, False])
    assert float(old_experts_loss(logits, 2, mask)) == pytest.approx(math.log(2))
    assert float(old_experts_loss(logits, 2, ~mask)) == pytest.approx(math.log(50))
    assert float(old_experts_loss(logits, 1, mask)) == pytest.approx((math.log(8) + math.log(4)) / 2)


def test_old_experts_of_one_is_cross_entropy_with_expert_zero() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(5, dtype=torch.bool)
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(old_experts_loss(logits, 1, mask), expected)


def test_old_experts_gradient_by_hand() -> None:
    # d/dlogit = p - p_within_old, halved over two tokens: old logits rise and new ones fall in a descent.
    logits = torch.zeros(2, 4, requires_grad=True)
    old_experts_loss(logits, 2, ALL).backward()
    expected = torch.tensor([[-0.125, -0.125, 0.125, 0.125]] * 2)
    torch.testing.assert_close(logits.grad, expected)


def test_old_experts_without_old_text_is_zero() -> None:
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = old_experts_loss(logits, 2, ~ALL)
    value.backward()
    assert value.item() == 0.0
    assert logits.grad is not None and not bool(logits.grad.any())


def test_old_experts_stay_finite_far_from_home() -> None:
    # A probability of e^-200 is zero in float32; its logarithm is not.
    logits = torch.tensor([[-200.0, 0.0]], requires_grad=True)
    value = old_experts_loss(logits, 1, ALL[:1])
    value.backward()
    assert value.item() == pytest.approx(200.0)
    torch.testing.assert_close(logits.grad, torch.tensor([[-1.0, 1.0]]))


@pytest.mark.parametrize("num_old", [0, 5])
def test_old_experts_must_be_some_of_all(num_old: int) -> None:
    with pytest.raises(ValueError, match=rf"num_old={num_old} must lie in \[1, 4\]"):
        old_experts_loss(torch.zeros(2, 4), num_old, ALL)
