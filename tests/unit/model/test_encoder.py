"""Routers that may not stand in a decoder, in an encoder on the digits that scikit-learn ships."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.routing.capacity import CapacityConfig, Counts, Priority
from lifelong_moe.errors import ConfigError
from lifelong_moe.model.encoder import Encoder
from lifelong_moe.plan.architecture import Architecture, Generation
from lifelong_moe.routing.base import Router, RoutingContext
from lifelong_moe.routing.registry import build_router
from tests.conftest import routing_of

BATCH_PRIORITY = CapacityConfig(factor=0.7, eval_factor=1.0, counts=Counts.assignments, priority=Priority.batch)
KINDS: dict[str, dict[str, Any]] = {
    "soft": {"mode": "soft", "slots": 2, "balance_loss": 0.0, "z_loss": 0.0},
    "v_moe": {"mode": "vmoe", "capacity": BATCH_PRIORITY, "importance_loss": 0.005, "load_loss": 0.005},
    "expert_choice": {"mode": "expert_choice", "balance_loss": 0.0, "z_loss": 0.0},
}


def encoder(kind: str) -> Encoder:
    torch.manual_seed(0)
    model = ModelConfig(layers=2, width=32, heads=4, kv_heads=4, expert_width=32, experts=4, context=16, init_std=0.1)
    return Encoder(Architecture(model, routing_of(**KINDS[kind]), 10, 0, (Generation("a", 4),)), 4)


def patches() -> tuple[Tensor, Tensor]:
    """Sixteen patches of 2 x 2 pixels of each image ``(B, 16, 4)``, and its digit."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float() / 16
    cut = images.unflatten(1, (4, 2)).unflatten(3, (4, 2)).transpose(2, 3).reshape(-1, 16, 4)
    order = torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))  # they come writer by writer
    return cut[order], torch.from_numpy(digits.target)[order]


@pytest.mark.parametrize("kind", KINDS)
def test_digits_are_learned(kind: str) -> None:
    model, (x, y) = encoder(kind), patches()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        rows = torch.randint(1400, (64,), generator=generator)
        logits, routings = model(x[rows])
        loss = F.cross_entropy(logits, y[rows])
        for routing in routings:
            for part in routing.losses.values():
                loss = loss + part.coefficient * part.value / len(routings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    model.eval()
    with torch.no_grad():
        right = (model(x[1400:])[0].argmax(1) == y[1400:]).float().mean()
    assert float(right) > 0.85  # a tenth by chance


def soft_router() -> tuple[Router, Tensor, RoutingContext]:
    torch.manual_seed(0)
    router = build_router(routing_of(**KINDS["soft"]), width=8, layer=0, causal=False)
    router.add_experts(3)
    ids = torch.zeros(10, dtype=torch.int64)
    return router, torch.randn(10, 8), RoutingContext(ids, ids == 0, ids, num_sequences=2)


def test_soft_slots_are_mixtures() -> None:
    router, x, context = soft_router()
    routing: Any = router(x, context)
    torch.testing.assert_close(routing.dispatch_BSM.sum(dim=1), torch.ones(2, 6))
    torch.testing.assert_close(routing.combine_BSM.sum(dim=2), torch.ones(2, 5))
    slots = routing.dispatch(x)
    assert slots.shape == (2 * 3 * 2, 8) and routing.counts_E.tolist() == [4, 4, 4]
    by_hand = routing.dispatch_BSM[1, :, 3] @ x[5:]  # second sequence, expert 1, slot 1
    torch.testing.assert_close(slots[1 * 4 + 1 * 2 + 1], by_hand)
    combined = routing.combine(slots)
    expected = routing.combine_BSM[1, 2] @ torch.stack([routing.dispatch_BSM[1, :, m] @ x[5:] for m in range(6)])
    torch.testing.assert_close(combined[7], expected)


def test_soft_routing_does_not_care_for_order() -> None:
    router, x, context = soft_router()
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = torch.cat([x[:5][order], x[5:]])
    answers = []
    for tokens in (x, moved):
        routing = router(tokens, context)
        answers.append(routing.combine(routing.dispatch(tokens)))
    torch.testing.assert_close(answers[1][:5], answers[0][:5][order])
    torch.testing.assert_close(answers[1][5:], answers[0][5:])  # sequences do not mix


def test_soft_routing_is_for_encoders(make_run: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"class D.*a decoder must not"):
        build_router(routing_of(**KINDS["soft"]), width=8, layer=0)
    with pytest.raises(ConfigError, match=r"routing.mode=softmix is unknown; there are (?!.*soft,)"):
        make_run("routing.mode=softmix")
    with pytest.raises(ConfigError, match="it is for encoders"):
        make_run("routing.mode=soft", "routing.allow_noncausal=true")
    router, _, _ = soft_router()
    with pytest.raises(ConfigError, match="cannot grow"):
        router.add_experts(2)
