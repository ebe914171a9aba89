from __future__ import annotations

from collections.abc import Callable
from math import comb

import torch

from lifelong_moe.routing.base import Router, RoutingContext

Make = Callable[..., Router]
Context = Callable[..., RoutingContext]
TOKENS = 20_000


def chosen(router: Router, context: RoutingContext) -> torch.Tensor:
    ids_TK = router(torch.zeros(len(context.token_ids_T), 3), context).expert_ids_TK
    return ids_TK.sort(dim=1).values


def test_every_pair_of_experts_is_as_frequent(make_router: Make, make_context: Context) -> None:
    for experts in (3, 6, 8):
        pairs = chosen(make_router(experts, mode="hash"), make_context(TOKENS)) @ torch.tensor([experts, 1])
        shares = torch.bincount(pairs)[torch.bincount(pairs) > 0] / TOKENS
        assert len(shares) == comb(experts, 2)
        assert float((shares * comb(experts, 2) - 1).abs().max()) < 0.15


def test_new_experts_take_their_share_and_move_nothing_else(make_router: Make, make_context: Context) -> None:
    router, context = make_router(6, mode="hash", top_k=1), make_context(TOKENS)
    before = chosen(router, context)
    router.add_experts(2)
    after = chosen(router, context)
    moved = (before != after).flatten()
    assert bool((after[moved] >= 6).all())
    assert abs(float(moved.float().mean()) - 2 / 8) < 0.02


def test_held_down_experts_are_not_there(make_router: Make, make_context: Context) -> None:
    router, context = make_router(4, mode="hash"), make_context(500)
    before = chosen(router, context)
    router.add_experts(3)
    with router.holding_down():
        assert torch.equal(chosen(router, context), before)


def test_weights_are_even_layers_differ_and_nothing_trains(make_router: Make, make_context: Context) -> None:
    context = make_context(500)
    first, second = (make_router(6, mode="hash", layer=layer) for layer in (0, 1))
    routing = first(torch.zeros(500, 3), context)
    assert torch.equal(routing.weights_TK, torch.full((500, 2), 0.5)) and routing.losses == {}
    assert list(first.parameters()) == [] and first.state_dict() == {}
    assert not torch.equal(chosen(first, context), chosen(second, context))


def test_the_order_is_fixed_for_good(make_router: Make, make_context: Context) -> None:
    # Old stages were trained with it: a change would move their tokens to other experts.
    ids = make_router(6, mode="hash")(torch.zeros(4, 3), make_context(4)).expert_ids_TK
    assert ids.tolist() == [[0, 3], [1, 4], [0, 1], [0, 1]]
