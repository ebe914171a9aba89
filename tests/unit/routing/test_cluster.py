from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong_moe.config.routing.base import Features, Level
from lifelong_moe.errors import ConfigError
from lifelong_moe.routing.base import Router, RoutingContext
from lifelong_moe.routing.routers.cluster import TokenClusterRouter

Make = Callable[..., Router]
Context = Callable[..., RoutingContext]
HIDDEN = {"mode": "cluster", "features": Features.hidden}
AXES = torch.eye(3)


def test_weights_by_hand(make_router: Make, make_context: Context) -> None:
    router = make_router(3, scale=5.0, **HIDDEN)
    router.set_rows(AXES)
    routing = router(torch.tensor([[6.0, 0.0, 8.0]]), make_context(1))  # 0.6 and 0.8 at unit length
    assert routing.expert_ids_TK.tolist() == [[2, 0]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[5 * 0.8, 5 * 0.6]]).softmax(-1))
    assert routing.losses == {}


def test_weights_are_those_of_the_definition(make_router: Make, make_context: Context) -> None:
    generator = torch.Generator().manual_seed(0)
    x, c = torch.randn(30, 3, generator=generator), F.normalize(torch.randn(7, 3, generator=generator), dim=-1)
    router = make_router(7, top_k=3, scale=2.5, **HIDDEN)
    router.set_rows(c)
    routing = router(x, make_context(30))
    for t in range(30):
        scores = F.normalize(x[t], dim=0) @ c.t()
        best = scores.argsort(descending=True)[:3]
        assert routing.expert_ids_TK[t].tolist() == best.tolist()
        torch.testing.assert_close(routing.weights_TK[t], (2.5 * scores[best]).softmax(-1))


def test_embedding_features_ignore_the_hidden_state(make_router: Make, make_context: Context) -> None:
    router = make_router(3, mode="cluster", features=Features.embedding, feature_width=3)
    router.set_rows(AXES)
    context = make_context(2, features=torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]]))
    first, second = (router(torch.randn(2, 3), context) for _ in range(2))
    assert first.expert_ids_TK.tolist() == second.expert_ids_TK.tolist() == [[1, 2], [0, 2]]


def test_it_has_nothing_to_train(make_router: Make, make_context: Context) -> None:
    router = make_router(3, **HIDDEN)
    router.set_rows(AXES)
    assert list(router.parameters()) == []
    routing = router(torch.ones(2, 3, requires_grad=True), make_context(2))
    assert not routing.weights_TK.requires_grad


def hashed(router: Router, context: RoutingContext, x: Tensor) -> list[list[int]]:
    routing = router(x, context)
    assert torch.equal(routing.weights_TK, torch.full_like(routing.weights_TK, 1 / routing.weights_TK.shape[1]))
    return routing.expert_ids_TK.tolist()


def test_hashing_until_the_first_fit(make_router: Make, make_context: Context) -> None:
    router, context = make_router(5, **HIDDEN), make_context(200)
    ids = hashed(router, context, torch.randn(200, 3))
    assert ids == hashed(router, context, torch.randn(200, 3))  # by token id, whatever the hidden state
    assert ids != hashed(make_router(5, layer=1, **HIDDEN), context, torch.randn(200, 3))
    counts = torch.tensor(ids).flatten().bincount(minlength=5)
    assert all(first != second for first, second in ids) and int(counts.min()) > 40  # 80 if even
    router.set_rows(torch.randn(5, 3))
    assert router(torch.ones(200, 3), context).expert_ids_TK.unique(dim=0).shape[0] == 1


@pytest.mark.parametrize("fitted", [True, False])
def test_a_loaded_router_knows_whether_it_was_fitted(make_router: Make, make_context: Context, fitted: bool) -> None:
    router = make_router(3, **HIDDEN)
    if fitted:
        router.set_rows(AXES)
    loaded = make_router(3, **HIDDEN)
    if not fitted:
        loaded.set_rows(-AXES)  # what it knew before does not count
    loaded.load_state_dict(router.state_dict())
    x, context = torch.tensor([[0.0, 1.0, 0.5]]), make_context(1)
    assert isinstance(loaded, TokenClusterRouter) and loaded.hashing is not fitted
    assert torch.equal(loaded(x, context).expert_ids_TK, router(x, context).expert_ids_TK)


def test_later_centroids_leave_the_old_ones_alone(make_router: Make, make_context: Context) -> None:
    router = make_router(3, **HIDDEN)
    router.set_rows(AXES)
    x, context = torch.tensor([[-1.0, -0.5, 0.3], [1.0, 0.5, 0.1]]), make_context(2)
    before = router(x, context)
    router.add_experts(2)
    assert isinstance(router, TokenClusterRouter)
    router.set_rows(-AXES[:2])
    old, new = router.centroids()
    assert torch.equal(old, AXES) and torch.equal(new, -AXES[:2])
    after = router(x, context)
    assert after.num_experts == 5
    assert after.expert_ids_TK.tolist() == [[3, 4], [0, 1]]  # the token at the old centroids stays with them
    with router.masking_newest():
        held = router(x, context)
    assert torch.equal(held.expert_ids_TK, before.expert_ids_TK) and torch.equal(held.weights_TK, before.weights_TK)


def test_rows_of_another_shape_are_refused(make_router: Make) -> None:
    with pytest.raises(ConfigError, match=r"layer 0 needs centroids of shape \(3, 3\)"):
        make_router(3, **HIDDEN).set_rows(torch.eye(2))


def test_the_level_chooses_the_router(make_router: Make) -> None:
    assert type(make_router(4, mode="cluster", level=Level.token)).__name__ == "TokenClusterRouter"
    assert type(make_router(4, mode="cluster", level=Level.document)).__name__ == "DocumentRouter"
