"""V-MoE against an independent re-implementation of its authors' formulas: google-research/vmoe, vmoe/nn/routing.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from lifelong_moe.config.load import read_config
from lifelong_moe.config.routing.capacity import CapacityConfig, Counts, Priority, Rounding
from lifelong_moe.errors import ConfigError
from lifelong_moe.ops.noisy import prob_above_threshold, sequence_cv_squared
from lifelong_moe.routing.base import Router, RoutingContext

ROOT = Path(__file__).resolve().parents[3]
Make = Callable[..., Router]
Array = np.ndarray
SEQUENCES, LENGTH, WIDTH = 3, 18, 8
TOKENS = SEQUENCES * LENGTH
AUTHORS = CapacityConfig(
    factor=1.05, eval_factor=1.05, counts=Counts.assignments, rounding=Rounding.up, multiple=4, priority=Priority.batch
)


def context(padded: int = 0) -> RoutingContext:
    ids = torch.arange(TOKENS)
    return RoutingContext(ids, ids < TOKENS - padded, torch.zeros_like(ids), num_sequences=SEQUENCES)


def inputs() -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)) + 0.3


def router_of(make_router: Make, experts: int, **config: Any) -> tuple[Router, Array]:
    """A router with random rows, and the logits that it computes of :func:`inputs`."""
    settings = {"importance_loss": 0.005, "load_loss": 0.005, "balance_loss": 0.0, "z_loss": 0.0} | config
    router = make_router(experts, width=WIDTH, mode="vmoe", allow_noncausal=True, **settings)
    router.set_rows(torch.randn(experts, WIDTH, generator=torch.Generator().manual_seed(1)))
    return router, (inputs() @ router.row_generations()[0].detach().t()).double().numpy()


def softmax(logits: Array) -> Array:
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def importance_loss(clean_SE: Array) -> float:
    sums_E = softmax(clean_SE).sum(axis=0)
    return float((sums_E.std() / sums_E.mean()) ** 2)


def load_loss(clean_SE: Array, noisy_SE: Array, top_k: int) -> float:
    threshold_S1 = -np.sort(-noisy_SE, axis=1)[:, top_k - 1 : top_k]
    mean_E = (1 - norm.cdf((threshold_S1 - clean_SE) * clean_SE.shape[1])).mean(axis=0)
    return float((mean_E.std() / mean_E.mean()) ** 2)


def dispatched(gates_SE: Array, real_S: Array, top_k: int, capacity: int, *, by_batch: bool) -> Array:
    """What each token gets from each expert, ``(S, E)``: first choices of all tokens, then second ones, …"""
    ranked_SE, combine_SE = np.argsort(-gates_SE, axis=1), np.zeros_like(gates_SE)
    taken_E = np.zeros(gates_SE.shape[1], dtype=int)
    order = sorted(np.flatnonzero(real_S), key=lambda t: -gates_SE[t].max() if by_batch else t)
    for choice in range(top_k):
        for token in order:
            expert = ranked_SE[token, choice]
            if taken_E[expert] < capacity:
                taken_E[expert] += 1
                combine_SE[token, expert] = gates_SE[token, expert]
    return combine_SE


@pytest.mark.parametrize("priority", [Priority.batch, Priority.choice])
@pytest.mark.parametrize(("experts", "top_k", "factor"), [(6, 2, 1.05), (8, 1, 1.05), (2, 1, 0.5), (3, 3, 0.7)])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_authors_router(
    make_router: Make, priority: Priority, experts: int, top_k: int, factor: float, training: bool
) -> None:
    room = CapacityConfig(
        factor=factor,
        eval_factor=factor,
        counts=Counts.assignments,
        rounding=Rounding.up,
        multiple=4,
        priority=priority,
    )
    router, clean = router_of(make_router, experts, top_k=top_k, capacity=room)
    torch.manual_seed(7)
    routing = router.train(training)(inputs(), context(padded=5))
    torch.manual_seed(7)
    noise = torch.randn(TOKENS, experts).double().numpy() / experts if training else 0.0
    real, noisy = np.arange(TOKENS) < TOKENS - 5, clean + noise
    target = math.ceil(LENGTH * top_k * factor / experts)
    capacity = target + -target % 4
    parts = [slice(i * LENGTH, (i + 1) * LENGTH) for i in range(SEQUENCES)]
    by_batch = priority == Priority.batch
    expected = [dispatched(softmax(noisy[p]), real[p], top_k, capacity, by_batch=by_batch) for p in parts]
    kept = torch.where(routing.expert_ids_TK < 0, experts, routing.expert_ids_TK)
    found = torch.zeros(TOKENS, experts + 1).scatter(1, kept, routing.weights_TK.detach())[:, :experts]
    np.testing.assert_allclose(found.numpy(), np.concatenate(expected), atol=1e-6)
    if not training:
        assert routing.losses == {}
        return
    assert set(routing.losses) == {"importance", "load"}
    pairs = [(clean[p][real[p]], noisy[p][real[p]]) for p in parts]
    importance = np.mean([importance_loss(one) for one, _ in pairs])
    load = np.mean([load_loss(one, two, top_k) for one, two in pairs])
    assert routing.losses["importance"].value.item() == pytest.approx(importance, rel=1e-4)
    assert routing.losses["load"].value.item() == pytest.approx(load, rel=1e-4)
    assert {loss.coefficient for loss in routing.losses.values()} == {0.005}


def test_noise_has_the_deviation_of_an_even_share(make_router: Make) -> None:
    """Told from the gates: a logarithm of two gates' ratio is the logits' difference and that of two noises."""
    router, clean = router_of(make_router, 4, top_k=4)
    torch.manual_seed(0)
    drawn = []
    for _ in range(100):
        routing = router(inputs(), context())
        gates = torch.zeros(TOKENS, 4).scatter(1, routing.expert_ids_TK, routing.weights_TK.detach()).double().log()
        drawn.append((gates[:, 0] - gates[:, 1]).numpy() - (clean[:, 0] - clean[:, 1]))
    assert np.std(drawn) == pytest.approx(math.sqrt(2) / 4, rel=0.03)


def test_the_loads_gradient_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(12, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    noise, mask = torch.randn(12, 5, generator=generator, dtype=torch.float64) / 5, torch.ones(12, dtype=torch.bool)

    def value(logits: Tensor) -> Tensor:  # in float64, unlike cv_squared
        sums = prob_above_threshold(logits, logits + noise, 0.2, 2).sum(dim=0)
        return sums.var(unbiased=False) / sums.mean().square()

    assert torch.autograd.gradcheck(value, (clean,))
    ours = sequence_cv_squared(prob_above_threshold(clean, clean + noise, 0.2, 2), mask, 1)
    assert ours.item() == pytest.approx(value(clean).item(), rel=1e-5)


def test_one_expert_a_token_learns_from_its_gate_alone(make_router: Make) -> None:
    router, _ = router_of(make_router, 4, top_k=1, importance_loss=0.0, load_loss=0.0)
    routing = router(inputs(), context())
    assert routing.losses == {} and not routing.ragged
    routing.weights_TK.sum().backward()
    assert bool(router.row_generations()[0].grad.abs().sum(dim=1).gt(0).all())  # type: ignore[union-attr]


def test_a_mode_brings_its_authors_values() -> None:
    config = read_config(ROOT / "configs/presets/vmoe.yaml", ["routing.top_k=1"]).config
    routing = config.routing
    assert (routing.importance_loss, routing.load_loss, routing.balance_loss, routing.z_loss) == (0.005, 0.005, 0, 0)
    assert routing.capacity == AUTHORS


def test_a_decoder_must_allow_it(make_router: Make) -> None:
    with pytest.raises(ConfigError, match=r"class C.*allow_noncausal=true"):
        make_router(4, mode="vmoe", capacity=AUTHORS)
    assert make_router(4, mode="vmoe").causality.value == "A"  # without capacity nothing leaks
