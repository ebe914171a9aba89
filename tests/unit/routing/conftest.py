"""A router of one layer, and the context that it looks at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lifelong_moe.routing.base import Router, RoutingContext
from lifelong_moe.routing.registry import build_router
from tests.conftest import routing_of


@pytest.fixture
def make_router() -> Callable[..., Router]:
    """A router of width 3 with these generations."""

    def make(*generations: int, layer: int = 0, width: int = 3, **config: Any) -> Router:
        router = build_router(routing_of(**config), width=width, layer=layer)
        for experts in generations:
            router.add_experts(experts)
        return router

    return make


@pytest.fixture
def make_context() -> Callable[..., RoutingContext]:
    """A context of tokens 0, 1, 2, …; nothing padded, all in group 0."""

    def make(
        tokens: int, *, groups: list[int] | None = None, features: Tensor | None = None, mask: Tensor | None = None
    ) -> RoutingContext:
        return RoutingContext(
            token_ids_T=torch.arange(tokens),
            mask_T=torch.ones(tokens, dtype=torch.bool) if mask is None else mask,
            domain_ids_T=torch.zeros(tokens, dtype=torch.int64) if groups is None else torch.tensor(groups),
            features_TF=features,
        )

    return make
