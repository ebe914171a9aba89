from __future__ import annotations

import dataclasses
from collections.abc import Callable
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lifelong_moe.clustering.tables import balanced_table
from lifelong_moe.config.routing.base import HashTable
from lifelong_moe.errors import ConfigError
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
    with router.masking_newest():
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


def test_each_segment_is_chosen_by_a_hash_of_its_own(make_router: Make, make_context: Context) -> None:
    router = make_router(4, 2, mode="hash", expert_groups=2)
    routing = router(torch.zeros(200, 3), make_context(200))
    first, second = routing.expert_ids_TK.t()
    assert set(first.tolist()) == {0, 1, 4} and set(second.tolist()) == {2, 3, 5}  # half of each generation
    assert bool((routing.weights_TK == 1).all())
    pairs = {tuple(pair) for pair in routing.expert_ids_TK.tolist()}
    assert len(pairs) == 9  # one says nothing of the other


def test_a_table_gives_each_id_its_expert(make_router: Make, make_context: Context) -> None:
    buckets = torch.tensor([2, 0, 1, 2])
    context = dataclasses.replace(make_context(4), buckets_of={3: buckets})
    for layer in (0, 1):
        router = make_router(3, mode="hash", table=HashTable.balanced, top_k=1, layer=layer)
        routing = router(torch.zeros(4, 3), context)
        assert routing.expert_ids_TK.squeeze(1).tolist() == ((buckets + layer) % 3).tolist()
        assert bool((routing.weights_TK == 1).all())


@given(seed=st.integers(0, 999), buckets=st.integers(1, 6))
def test_a_balanced_table_is_balanced(seed: int, buckets: int) -> None:
    counts = (np.random.default_rng(seed).pareto(1.0, 60) * 10).astype(np.int64)
    table = balanced_table(counts, buckets)
    loads = np.bincount(table, weights=counts, minlength=buckets)
    assert loads.max() - loads.min() <= counts.max() + 1
    assert np.bincount(table[counts == 0], minlength=buckets).sum() == (counts == 0).sum()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"table": HashTable.balanced},
            r"routing\.table=balanced gives each token id one expert: set routing\.top_k=1",
        ),
        ({"expert_groups": 4}, r"routing\.top_k=2 must be routing\.expert_groups=4"),
    ],
)
def test_mistakes(make_router: Make, config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_router(4, mode="hash", **config)
