from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lifelong_moe.config.routing.base import BalanceOver, Bundles, Score
from lifelong_moe.routing.base import Router, RoutingContext

Make = Callable[..., Router]
Context = Callable[..., RoutingContext]

ROWS = torch.tensor([[math.log(2), 0, 0], [math.log(3), 0, 0], [0, math.log(5), 0]])


def test_weights_by_hand(make_router: Make, make_context: Context) -> None:
    router = make_router(3).eval()
    router.set_rows(ROWS)
    # x = e1: probabilities (2, 3, 1) / 6; x = e2: (1, 1, 5) / 7, of the tie the lower index.
    routing = router(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]), make_context(2))
    assert routing.expert_ids_TK[0].tolist() == [1, 0] and routing.expert_ids_TK[1, 0] == 2
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[3 / 5, 2 / 5], [5 / 6, 1 / 6]]))
    assert routing.weights_TK.dtype == torch.float32


def test_without_renormalizing_the_weights_are_the_probabilities(make_router: Make, make_context: Context) -> None:
    for top_k, expected in ((2, [3 / 6, 2 / 6]), (1, [3 / 6])):
        router = make_router(3, renormalize=False, top_k=top_k).eval()
        router.set_rows(ROWS)
        weights = router(torch.tensor([[1.0, 0, 0]]), make_context(1)).weights_TK
        torch.testing.assert_close(weights, torch.tensor([expected]))


def test_old_rows_have_no_gradient_once_frozen(make_router: Make, make_context: Context) -> None:
    router = make_router(3)
    router.set_rows(ROWS)
    router.freeze()
    router.add_experts(2)
    router.set_rows(torch.tensor([[3.0, 0, 1], [2.0, 1, 0]]))
    old, new = router.parameters()
    assert torch.equal(old, ROWS)
    assert not old.requires_grad and new.requires_grad
    routing = router(torch.tensor([[1.0, 2, 3]]), make_context(1))
    loss = routing.weights_TK[0, 0] + sum(part.value for part in routing.losses.values())
    loss.backward()
    assert old.grad is None
    assert new.grad is not None and bool(new.grad.abs().sum() > 0)


def test_the_task_loss_alone_reaches_the_router(make_router: Make, make_context: Context) -> None:
    router = make_router(3).eval()
    router.set_rows(ROWS)
    router(torch.tensor([[1.0, 2, 3]]), make_context(1)).weights_TK[0, 0].backward()
    (rows,) = router.parameters()
    assert rows.grad is not None and bool(rows.grad.abs().sum() > 1e-3)


def test_losses_come_in_training_only_and_only_if_asked_for(make_router: Make, make_context: Context) -> None:
    x, context = torch.ones(4, 3), make_context(4)
    router = make_router(3)
    losses = router(x, context).losses
    assert {name: loss.coefficient for name, loss in losses.items()} == {"balance": 0.0025, "z": 0.00025}
    assert losses["z"].value.item() == pytest.approx(math.log(3) ** 2)  # rows begin at zero
    assert router.eval()(x, context).losses == {}
    assert set(make_router(3, z_loss=0.0)(x, context).losses) == {"balance"}
    assert set(make_router(3, balance_loss=0.0)(x, context).losses) == {"z"}
    assert set(make_router(3, balance_loss=0.0, z_loss=0.0)(x, context).losses) == set()


def test_padding_is_in_no_loss(make_router: Make, make_context: Context) -> None:
    router = make_router(3)
    router.set_rows(ROWS)
    x = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [9.0, 9, 9]])
    padded = router(x, make_context(3, mask=torch.tensor([True, True, False]))).losses
    plain = router(x[:2], make_context(2)).losses
    assert all(torch.equal(padded[name].value, plain[name].value) for name in plain)


def test_balance_over_the_active_experts(make_router: Make, make_context: Context) -> None:
    # Every token goes to frozen experts 0 and 1: nothing to balance among the active ones, all to balance over all.
    x, context = torch.tensor([[1.0, 0, 0]] * 4), make_context(4)
    values = {}
    for over in BalanceOver:
        router = make_router(2, 2, balance_over=over)
        with torch.no_grad():
            next(router.parameters()).copy_(torch.tensor([[9.0, 0, 0], [8.0, 0, 0]]))
        values[str(over)] = router(x, context).losses["balance"].value.item()
    assert values["active"] == 0.0
    assert values["all"] == pytest.approx(2.0, abs=1e-3)


def test_float32_under_autocast(make_router: Make, make_context: Context) -> None:
    router = make_router(3)
    # 1 and 1 + 2^-10 are the same number in bfloat16, so only float32 sees which expert is the better one.
    router.set_rows(torch.tensor([[1.0, 0, 0], [1.0 + 2**-10, 0, 0], [0.0, 0, 0]]))
    x, context = torch.tensor([[1.0, 0, 0]]), make_context(1)
    expected = router(x, context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x, context)
    assert routing.expert_ids_TK.tolist() == [[1, 0]]
    assert routing.weights_TK.dtype == torch.float32 and torch.equal(routing.weights_TK, expected.weights_TK)
    assert all(torch.equal(routing.losses[name].value, expected.losses[name].value) for name in expected.losses)


def test_held_down_rows_change_nothing(make_router: Make, make_context: Context) -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    router = make_router(3, renormalize=False).eval()
    router.set_rows(ROWS)
    before = router(x, make_context(20))
    router.add_experts(2)
    router.set_rows(10 * torch.ones(2, 3))
    with router.masking_newest():
        held = router(x, make_context(20))
    assert torch.equal(held.expert_ids_TK, before.expert_ids_TK)
    torch.testing.assert_close(held.weights_TK, before.weights_TK, atol=1e-7, rtol=0)
    assert router(x, make_context(20)).expert_ids_TK.max() >= 3  # the bias is gone


def test_holding_down_ends_with_an_error_too(make_router: Make) -> None:
    router = make_router(3)
    with pytest.raises(KeyError), router.masking_newest():
        raise KeyError
    assert not router.masks_newest


def grown(make_router: Make, **config: object) -> Router:
    """Three experts of generation 0, two of generation 1 and one of generation 2."""
    router = make_router(3, 2, 1, bundles=Bundles.label, **config)
    with torch.no_grad():
        for rows, filled in zip(router.parameters(), (ROWS, 9 * torch.ones(2, 3), 10 * torch.ones(1, 3)), strict=True):
            rows.copy_(filled)
    return router


@pytest.mark.parametrize("groups", [[0] * 4, [1] * 4, [2, 2, 0, 2]], ids=["first", "second", "two"])
@pytest.mark.parametrize("masks_newest", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_generations_without_tokens_need_no_logits(
    make_router: Make, make_context: Context, groups: list[int], masks_newest: bool, training: bool
) -> None:
    router = grown(make_router, z_loss=0.1).train(training)
    router.rows[0].requires_grad_(False)
    router.masks_newest = masks_newest
    context, x_TD = make_context(4, groups=groups), torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    found = []
    for present in (None, frozenset(groups)):
        routing = router(x_TD.requires_grad_(), replace(context, present=present))
        loss = routing.weights_TK[:, 0].sum() + sum(one.value for one in routing.losses.values())
        gradients = torch.autograd.grad(loss, [x_TD, router.rows[1]], allow_unused=True, materialize_grads=True)
        found.append((routing.expert_ids_TK, routing.weights_TK, loss, *gradients))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    logits_TE = router.eval().logits(x_TD, frozenset([1]))
    assert logits_TE[:, :3].isinf().all() and logits_TE[:, 3:5].isfinite().all()


def test_a_bundle_has_its_own_experts_alone(make_router: Make, make_context: Context) -> None:
    router = grown(make_router).eval()
    routing = router(torch.tensor([[1.0, 0, 0]] * 3), make_context(3, groups=[0, 1, 2]))
    # Bundle 0 sees logits ln 2, ln 3 and 0; bundle 1 sees 9 and 9; bundle 2 has one expert, so its second weight is 0.
    assert routing.expert_ids_TK[0].tolist() == [1, 0]
    assert sorted(routing.expert_ids_TK[1].tolist()) == [3, 4]
    assert routing.expert_ids_TK[2, 0] == 5
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[3 / 5, 2 / 5], [0.5, 0.5], [1.0, 0.0]]))


@pytest.mark.parametrize("num", [1, 5, 13, 20])
@pytest.mark.parametrize("config", [{}, {"renormalize": False}, {"score": Score.sigmoid}], ids=str)
def test_later_generations_change_nothing_for_bundle_0(
    make_router: Make, make_context: Context, config: dict[str, Any], num: int
) -> None:
    """Not the last bit, however many numbers at once the processor adds up."""
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(200, 3, generator=generator), make_context(200)
    router = make_router(num, bundles=Bundles.cluster, **config).eval()
    router.set_rows(torch.randn(num, 3, generator=generator))
    before = router(x, context)
    for more in (2, 5, 9):
        router.add_experts(more)
        router.set_rows(20 * torch.randn(more, 3, generator=torch.Generator().manual_seed(more)))
        after = router(x, context)
        chosen = before.expert_ids_TK.shape[1]  # A dense layer has fewer experts than top_k.
        assert torch.equal(after.expert_ids_TK[:, :chosen], before.expert_ids_TK)
        assert torch.equal(after.weights_TK[:, :chosen], before.weights_TK)
    newest = make_context(200, groups=[3] * 200)
    assert int(router(x, newest).expert_ids_TK.min()) >= num + 7


def test_whose_experts_are_whose_is_made_once_until_that_changes(make_router: Make, make_context: Context) -> None:
    router = grown(make_router).eval()
    x, context = torch.ones(2, 3), make_context(2, groups=[1, 3])
    router(x, context)
    owners_E = router.owners([3, 2, 1], x.device)
    assert owners_E.tolist() == [0, 0, 0, 1, 1, 2]
    router(x, context)
    assert router.owners([3, 2, 1], x.device) is owners_E
    router.add_experts(2)
    ids_TK = router(x, context).expert_ids_TK
    assert ids_TK.sort(dim=1).values.tolist() == [[3, 4], [6, 7]]
    assert router.owners(router.generations, torch.device("meta")).device.type == "meta"


def test_no_underflow_opens_another_bundle(make_router: Make, make_context: Context) -> None:
    # The second and third probabilities are 0 in float32, as are those of the experts that are not allowed.
    router = grown(make_router).eval()
    routing = router(torch.tensor([[0.0, 1000.0, 0]]), make_context(1))
    assert routing.expert_ids_TK[0, 0] == 2 and routing.expert_ids_TK.max() < 3
    assert routing.weights_TK.tolist() == [[1.0, 0.0]]


def test_losses_of_bundles_by_hand(make_router: Make, make_context: Context) -> None:
    router = make_router(2, 2, bundles=Bundles.label, top_k=1, renormalize=False)  # all rows zero
    losses = router(torch.ones(2, 3), make_context(2, groups=[0, 1])).losses
    # logsumexp: ln 2 over the two that each token's bundle has.
    assert losses["z"].value.item() == pytest.approx(math.log(2) ** 2)
    # Even shares q = p = 1 / 4, so that f * p / q sums to 1 whatever is chosen.
    assert losses["balance"].value.item() == pytest.approx(1.0)


@pytest.mark.parametrize("over", list(BalanceOver))
@pytest.mark.parametrize("groups", [[0, 0], [0, 2], [2, 2]])
def test_masked_experts_bring_no_nan(
    make_router: Make, make_context: Context, over: BalanceOver, groups: list[int]
) -> None:
    router = grown(make_router, balance_over=over)
    routing = router(torch.tensor([[1.0, 2, 3], [3.0, 1, 2]]), make_context(2, groups=groups))
    total = routing.weights_TK[0, 0] + sum(part.value for part in routing.losses.values())
    total.backward()
    gradients = [rows.grad for rows in router.parameters()]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients) and bool(torch.isfinite(total))
    if groups == [0, 0]:
        assert not any(bool(g.any()) for g in gradients[1:] if g is not None)


def test_without_bundles_groups_do_not_matter(make_router: Make, make_context: Context) -> None:
    router = make_router(3, 2).eval()
    router.set_rows(torch.ones(2, 3))
    x = torch.ones(2, 3)
    ids = [router(x, make_context(2, groups=groups)).expert_ids_TK for groups in ([0, 0], [0, 1])]
    assert torch.equal(*ids)
