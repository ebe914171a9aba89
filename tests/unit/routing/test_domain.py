from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lifelong_moe.config.routing.base import Level
from lifelong_moe.routing.base import Router, RoutingContext, token_hash
from lifelong_moe.routing.routers.domain import DomainRouter

Make = Callable[..., Router]
Context = Callable[..., RoutingContext]
DOCUMENT: dict[str, Any] = {"mode": "cluster", "level": Level.document}


def experts_of(router: Router, context: RoutingContext) -> list[set[int]]:
    """Experts that each group's tokens use."""
    ids_TK = router(torch.zeros(len(context.token_ids_T), 3), context).expert_ids_TK
    groups = context.domain_ids_T.tolist()
    found: dict[int, set[int]] = {}
    for group, ids in zip(groups, ids_TK.tolist(), strict=True):
        assert len(set(ids)) == len(ids)
        found.setdefault(group, set()).update(ids)
    return [found[group] for group in sorted(found)]


def sizes(router: Router) -> list[int]:
    assert isinstance(router, DomainRouter)
    return router.sizes_G.tolist()


def test_a_label_owns_its_generation(make_router: Make, make_context: Context) -> None:
    router = make_router(2, 3, 4, mode="label")
    assert sizes(router) == [2, 3, 4]
    context = make_context(300, groups=[t % 3 for t in range(300)])
    assert experts_of(router, context) == [{0, 1}, {2, 3, 4}, {5, 6, 7, 8}]


def test_a_document_cluster_owns_top_k_experts_by_default(make_router: Make, make_context: Context) -> None:
    router = make_router(6, 4, **DOCUMENT)
    assert sizes(router) == [2, 2, 2, 2, 2]
    context = make_context(50, groups=[t % 5 for t in range(50)])
    assert experts_of(router, context) == [{0, 1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}]


def test_the_last_group_takes_the_rest(make_router: Make) -> None:
    assert sizes(make_router(7, **DOCUMENT)) == [2, 2, 3]
    assert sizes(make_router(7, 5, clusters=2, **DOCUMENT)) == [3, 4, 2, 3]


def test_weights_are_even_and_nothing_trains(make_router: Make, make_context: Context) -> None:
    router = make_router(6, top_k=3, **DOCUMENT)
    routing = router(torch.zeros(4, 3), make_context(4))
    assert torch.equal(routing.weights_TK, torch.full((4, 3), 1 / 3))
    assert list(router.parameters()) == [] and router.state_dict() == {} and routing.losses == {}


def test_an_unknown_group_goes_to_group_0(make_router: Make, make_context: Context) -> None:
    router = make_router(2, 2, mode="label")
    known, unknown = make_context(20), make_context(20, groups=[2] * 20)
    x = torch.zeros(20, 3)
    assert torch.equal(router(x, unknown).expert_ids_TK, router(x, known).expert_ids_TK)
    assert experts_of(router, unknown) == [{0, 1}]


def test_growth_moves_nobody(make_router: Make, make_context: Context) -> None:
    router, context = make_router(6, **DOCUMENT), make_context(60, groups=[t % 3 for t in range(60)])
    before = router(torch.zeros(60, 3), context).expert_ids_TK
    router.add_experts(4)
    assert torch.equal(router(torch.zeros(60, 3), context).expert_ids_TK, before)


def test_the_hidden_state_is_not_looked_at(make_router: Make, make_context: Context) -> None:
    router, context = make_router(6, mode="label"), make_context(20)
    first, second = (router(torch.randn(20, 3), context).expert_ids_TK for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("salt", [0, 1, 11])
def test_the_hash_spreads_evenly(salt: int) -> None:
    hashes = token_hash(torch.arange(50_000), salt)
    assert int(hashes.min()) >= 0 and int(hashes.max()) < 2**31
    for size in (2, 3, 8):
        share = (hashes % size).bincount(minlength=size) / 50_000
        assert float((share - 1 / size).abs().max()) < 0.01


def multiplicative(token: int, salt: int) -> int:
    """The same in Python's own integers, which do not overflow."""
    mixed = (token + 0x9E37 * (salt + 1)) * 2654435761 % 2**32
    return ((mixed >> 15) ^ mixed) * 2246822519 % 2**32 >> 1


def test_the_hash_is_fixed_for_good() -> None:
    # Old stages were trained with these numbers: a change would move their tokens to other experts.
    assert token_hash(torch.tensor([0, 1, 4095]), 0).tolist() == [574864142, 1396649298, 894249833]
    assert token_hash(torch.arange(70_000), 5).tolist() == [multiplicative(token, 5) for token in range(70_000)]
