"""Routing is decided in float32 whatever the precision around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.routing.base import RoutingContext
from lifelong_moe.routing.registry import build_router
from tests.conftest import routing_of

Make = Callable[..., LanguageModel]


def answered(router: Any, context: RoutingContext, autocast: bool) -> list[torch.Tensor]:
    x_TD = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        routing = router(x_TD, context)
    return [routing.expert_ids_TK, routing.weights_TK, *(loss.value for _, loss in sorted(routing.losses.items()))]


@pytest.mark.parametrize("training", [True, False])
def test_no_bit_depends_on_autocast(any_router_kind: str, training: bool, make_model: Make) -> None:
    model = make_model(any_router_kind, (4, 4)).train(training)
    ids_T = torch.arange(16)
    features = None if model.token_features is None else model.token_features[ids_T]
    context = RoutingContext(ids_T, ids_T < 14, ids_T % 2, features_TF=features, num_sequences=2)
    for layer in model.moe_layers():
        plain, cast = (answered(layer.router, context, autocast) for autocast in (False, True))
        assert len(plain) == len(cast) and plain[1].dtype == torch.float32
        for one, other in zip(plain, cast, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


def test_neither_does_a_mixture_of_slots() -> None:
    router = build_router(routing_of(mode="soft", slots=2), width=16, layer=0, causal=False)
    torch.manual_seed(0)
    router.add_experts(4)
    ids_T = torch.arange(16)
    context = RoutingContext(ids_T, ids_T >= 0, torch.zeros_like(ids_T), num_sequences=2)
    x_TD = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    plain = router(x_TD, context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = router(x_TD, context)
    assert torch.equal(plain.logits_BSEP, cast.logits_BSEP)  # type: ignore[attr-defined]
