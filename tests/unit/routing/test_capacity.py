"""Next choices against an independent re-implementation of their authors' code, one token at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lifelong_moe.config.routing.base import Score
from lifelong_moe.config.routing.capacity import CapacityConfig, Counts, Overflow, Priority
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.routing.base import Router, Routing, RoutingContext

Make = Callable[..., Router]
SEQUENCES, LENGTH, WIDTH, EXPERTS = 3, 20, 8, 6
TOKENS = SEQUENCES * LENGTH


def routed(
    make_router: Make, seed: int, padded: int = 0, room: dict[str, Any] | None = None, **config: Any
) -> tuple[Router, Tensor, Routing]:
    """A router in evaluation, the logits that it saw, and its answer."""
    generator = torch.Generator().manual_seed(seed)
    capacity = CapacityConfig(overflow=Overflow.next_choice, **(room or {}))
    router = make_router(EXPERTS, width=WIDTH, capacity=capacity, allow_noncausal=True, **config).eval()
    router.set_rows(torch.randn(EXPERTS, WIDTH, generator=generator))
    x = torch.randn(TOKENS, WIDTH, generator=generator) + 0.8  # some experts are wanted by many
    ids = torch.arange(TOKENS)
    context = RoutingContext(ids, ids < TOKENS - padded, torch.zeros_like(ids), num_sequences=SEQUENCES)
    return router, x @ router.row_generations()[0].detach().t(), router(x, context)


def no_token_left_behind(gates_SE: np.ndarray, real_S: np.ndarray, capacity: int) -> np.ndarray:
    """``_ntlb_gating`` of tensorflow/mesh for one group: what each token gets from each expert, ``(S, E)``."""
    combine_SE, taken_E = np.zeros_like(gates_SE), np.zeros(gates_SE.shape[1], dtype=int)
    order_SE, waiting_S = np.argsort(-gates_SE, axis=1, kind="stable"), real_S.copy()
    for attempt in range(gates_SE.shape[1]):
        before_E = taken_E.copy()
        asked_E = np.zeros_like(taken_E)
        for token in np.flatnonzero(waiting_S):
            expert = order_SE[token, attempt]
            asked_E[expert] += 1
            if before_E[expert] + asked_E[expert] <= capacity:
                combine_SE[token, expert] = gates_SE[token, expert]
                taken_E[expert] += 1
                waiting_S[token] = False
    return combine_SE


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
@pytest.mark.parametrize("priority", [Priority.token, Priority.choice])
@pytest.mark.parametrize("seed", range(3))
def test_no_token_is_left_behind_and_each_weighs_by_who_serves_it(
    make_router: Make, priority: Priority, factor: float, seed: int
) -> None:
    room = {"eval_factor": factor, "least": 2, "priority": priority}
    _, logits, routing = routed(make_router, seed, 7, room, mode="switch", top_k=1, renormalize=False)
    gates = logits.softmax(dim=1).double().numpy().reshape(SEQUENCES, LENGTH, EXPERTS)
    real = (np.arange(TOKENS) < TOKENS - 7).reshape(SEQUENCES, LENGTH)
    capacity = max(2, int(LENGTH * factor / EXPERTS))
    expected = np.concatenate([no_token_left_behind(gates[i], real[i], capacity) for i in range(SEQUENCES)])
    kept = routing.expert_ids_TK >= 0
    found = torch.zeros(TOKENS, EXPERTS + 1).scatter(
        1, routing.expert_ids_TK.where(kept, torch.tensor(EXPERTS)), routing.weights_TK.detach()
    )[:, :EXPERTS]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    rerouted = kept[:, 0] & (routing.expert_ids_TK[:, 0] != logits.argmax(dim=1))
    assert int(rerouted.sum()) >= 5


@pytest.mark.parametrize("priority", list(Priority))
@pytest.mark.parametrize("score", list(Score))
@pytest.mark.parametrize("renormalize", [True, False])
def test_two_that_serve_share_a_token_as_if_they_were_its_choices(
    make_router: Make, priority: Priority, score: Score, renormalize: bool
) -> None:
    """Where all choices found room somewhere, weights are those of a router that had chosen just these experts."""
    room = {"eval_factor": 1.0, "counts": Counts.assignments, "priority": priority}
    _, logits, routing = routed(make_router, 0, 0, room, renormalize=renormalize, score=score, gate_scale=2.0)
    scores = logits.softmax(dim=1) if score == Score.softmax else logits.sigmoid()
    best = logits.topk(2).indices
    for ids, weights, row, first in zip(routing.expert_ids_TK, routing.weights_TK, scores, best, strict=True):
        serving = torch.where(ids >= 0, ids, first)  # a dropped choice keeps its part in the sum
        expected = row[serving] / row[serving].sum() if renormalize else row[serving]
        torch.testing.assert_close(weights.detach(), 2 * expected)
    assert int((routing.expert_ids_TK.sort(dim=1).values != best.sort(dim=1).values).any(dim=1).sum()) >= 5


def test_the_serving_experts_row_learns(make_router: Make) -> None:
    """The gradient of a token's gate is largest in the row of the expert that serves it, and not of the full one."""
    room = {"eval_factor": 0.5, "priority": Priority.token}
    router, logits, routing = routed(make_router, 0, 0, room, mode="switch", top_k=1, renormalize=False)
    first_T, serving_T = logits.argmax(dim=1), routing.expert_ids_TK[:, 0]
    token = int(((serving_T >= 0) & (serving_T != first_T)).nonzero()[0])
    routing.weights_TK[token, 0].backward()
    assert int(router.row_generations()[0].grad.norm(dim=1).argmax()) == int(serving_T[token])  # type: ignore[union-attr]


def test_a_next_choice_lies_in_the_tokens_own_groups(make_router: Make) -> None:
    room = {"eval_factor": 0.5, "priority": Priority.choice}
    router, logits, routing = routed(make_router, 1, 0, room, expert_groups=3, top_groups=2, top_k=2)
    pairs = logits.softmax(dim=1).unflatten(1, (3, 2))
    open_TG = torch.zeros(TOKENS, 3, dtype=torch.bool).scatter(1, pairs.sum(dim=2).topk(2).indices, True)
    kept = routing.expert_ids_TK >= 0
    assert bool(open_TG.gather(1, routing.expert_ids_TK.clamp_min(0) // 2)[kept].all())
    assert bool((~kept).any()) and router.config.top_groups == 2


@pytest.mark.parametrize("training", [True, False])
def test_experts_that_do_nothing_give_back_a_token_times_its_gates(
    any_router_kind: str, training: bool, make_model: Callable[..., LanguageModel]
) -> None:
    """Of the experts that serve it alone: what is dropped, or not chosen, adds nothing."""
    model = make_model(any_router_kind, (4, 4)).train(training)
    ids_T = torch.arange(16)
    features = None if model.token_features is None else model.token_features[ids_T]
    context = RoutingContext(ids_T, ids_T < 14, ids_T % 2, features_TF=features, num_sequences=2)
    x_TD = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    routing = next(iter(model.moe_layers())).router(x_TD, context)
    pairs = [
        zip(*row, strict=True) for row in zip(routing.expert_ids_TK.tolist(), routing.weights_TK.tolist(), strict=True)
    ]
    gates = torch.tensor([sum(weight for expert, weight in row if expert >= 0) for row in pairs])
    torch.testing.assert_close(routing.combine(routing.dispatch(x_TD)), x_TD * gates.unsqueeze(1), atol=1e-5, rtol=1e-5)
    used = routing.expert_ids_TK[routing.expert_ids_TK >= 0]
    assert torch.equal(routing.counts_E, used.bincount(minlength=8))


@pytest.mark.parametrize("wanted", range(EXPERTS))
def test_whoever_is_wanted_by_all_others_serve(make_router: Make, wanted: int) -> None:
    """Twelve tokens that all want one expert fill two places of each of six."""
    capacity = CapacityConfig(eval_factor=1.0, overflow=Overflow.next_choice)
    router = make_router(EXPERTS, capacity=capacity, allow_noncausal=True, top_k=1, renormalize=False).eval()
    rows = torch.zeros(EXPERTS, 3)
    rows[wanted] = 5.0
    router.set_rows(rows)
    ids = torch.arange(12)
    routing = router(torch.ones(12, 3), RoutingContext(ids, ids >= 0, ids * 0))
    assert routing.expert_ids_TK.flatten().bincount(minlength=EXPERTS).tolist() == [2] * EXPERTS
    assert routing.dropped is not None and routing.dropped.tolist() == [0, 12]


@pytest.mark.parametrize(("tokens", "sequences"), [(6, 6), (6, 3), (6, 1), (0, 1), (0, 3)])
def test_each_tokens_sequence(tokens: int, sequences: int) -> None:
    ids = torch.arange(tokens)
    context = RoutingContext(ids, ids >= 0, ids, num_sequences=sequences)
    assert context.sequence_T.tolist() == [i * sequences // tokens for i in range(tokens)]
