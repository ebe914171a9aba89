"""Logits so far apart that an exponential of float32 underflows (87) or overflows: all that is shifted, summed or
divided by hand against the formula as it stands in the source, in float64, where nothing underflows before 745."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong_moe.config.routing.base import Score
from lifelong_moe.model.attention import softcapped_attention
from lifelong_moe.model.mixture import MixtureHead, pack
from lifelong_moe.ops.document_attention import Documents, Kernel, document_attention
from lifelong_moe.ops.jacobs import competitive_loss
from lifelong_moe.ops.losses import TeacherTargets, distillation_loss, linear_losses
from lifelong_moe.ops.router_losses import old_experts_loss, router_z_loss
from lifelong_moe.retention.generated import sample_tokens
from lifelong_moe.routing.base import Router, RoutingContext
from lifelong_moe.routing.registry import build_router
from tests.conftest import routing_of

FAR = (90.0, 150.0, 300.0)
"""What logits lie apart."""
TOKENS = 24


def drawn(*shape: int, scale: float, seed: int = 0) -> Tensor:
    """Even numbers from -scale to scale, so that many differ by more than float32 has exponents for."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * scale


def context() -> RoutingContext:
    ids_T = torch.arange(TOKENS)
    return RoutingContext(ids_T, torch.ones_like(ids_T, dtype=torch.bool), torch.zeros_like(ids_T))


def router_of(logits_TE: Tensor, **routing: Any) -> Router:
    """A router that makes these logits of the rows of an identity matrix, and of which nothing is random."""
    router = build_router(routing_of(**routing), width=TOKENS, layer=0)
    router.add_experts(logits_TE.shape[1])
    router.row_generations()[0].data.copy_(logits_TE.t())
    return router


@pytest.mark.parametrize("far", FAR)
def test_a_hierarchys_probabilities_sum_to_1(far: float) -> None:
    inner, outer = drawn(TOKENS, 6, scale=far), drawn(TOKENS, 3, scale=far, seed=1)
    router = router_of(inner, mode="hierarchical", expert_groups=3, top_groups=2, top_k=4, z_loss=0.0)
    dict(router.named_parameters())["group_rows.0"].data.copy_(outer.t())
    routing = router(torch.eye(TOKENS), context())
    within = inner.double().unflatten(1, (3, 2)).softmax(dim=2)
    probs = (outer.double().softmax(dim=1).unsqueeze(2) * within).flatten(1)
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(TOKENS, dtype=torch.float64))
    shares = torch.bincount(routing.expert_ids_TK.flatten(), minlength=6) / routing.expert_ids_TK.numel()
    expected = 6 * (shares * probs.mean(dim=0)).sum()
    assert float(routing.losses["balance"].value.detach()) == pytest.approx(float(expected), rel=1e-5)
    chosen = outer.topk(2).indices
    kept = torch.zeros(TOKENS, 3).scatter(1, chosen, 1.0).bool()
    weights = (outer.double().masked_fill(~kept, -torch.inf).softmax(dim=1).unsqueeze(2) * within).flatten(1)
    found = torch.zeros(TOKENS, 6).scatter(1, routing.expert_ids_TK, routing.weights_TK.detach())
    torch.testing.assert_close(found.double(), weights, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("how", ["softmax", "sigmoid", "biased", "biased sigmoid", "groups"])
def test_gates_are_divided_by_their_sum(far: float, how: str) -> None:
    score = Score.sigmoid if "sigmoid" in how else Score.softmax
    more = {"expert_groups": 3, "top_groups": 1} if how == "groups" else {}
    logits = drawn(TOKENS, 6, scale=far)
    logits[0] = -far + torch.arange(6.0)  # no score of this token is a number of float32, but for a softmax
    router = router_of(logits, score=score, bias_rate=0.01 if "biased" in how else 0.0, **more)
    if "biased" in how:
        router.bias_0.copy_(torch.tensor([0.0, 0, 9, 0, 9, 0]))  # type: ignore[operator]
    routing = router(torch.eye(TOKENS), context())
    wide = logits.double()
    scores = wide.sigmoid() if score == Score.sigmoid else wide.softmax(dim=1)
    gates, tiny = scores.gather(1, routing.expert_ids_TK), 1e-20 if score == Score.sigmoid else 0.0
    torch.testing.assert_close(
        routing.weights_TK.double(), gates / (gates.sum(dim=1, keepdim=True) + tiny), atol=1e-6, rtol=1e-5
    )
    shares = torch.bincount(routing.expert_ids_TK.flatten(), minlength=6) / routing.expert_ids_TK.numel()
    expected = 6 * (shares * (scores / (scores.sum(dim=1, keepdim=True) + tiny)).mean(dim=0)).sum()
    if how in ("softmax", "sigmoid"):  # which choices are counted where others are taken is another test's matter
        assert float(routing.losses["balance"].value.detach()) == pytest.approx(float(expected), rel=1e-5)
    (routing.weights_TK.sum() + routing.losses["balance"].value).backward()
    assert bool(router.row_generations()[0].grad.isfinite().all())  # type: ignore[union-attr]


def compared(function: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Values and gradients of a function of float32 and of its definition in float64."""
    narrow, wide = ([x.detach().to(dtype).requires_grad_() for x in inputs] for dtype in (torch.float32, torch.float64))
    found, expected = function(*narrow), reference(*wide)
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found.double(), expected, atol=3e-6 * scale, rtol=1e-5)
    found.sum().backward()
    expected.sum().backward()
    for one, other in zip(narrow, wide, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, atol=2e-4 * float(other.grad.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("far", FAR)
def test_losses_over_the_vocabulary(far: float) -> None:
    head, target = drawn(9, 8, scale=far / 8), torch.arange(TOKENS) % 9
    teacher, taught = drawn(TOKENS, 8, scale=1.0, seed=2), torch.arange(TOKENS)
    for temperature in (1.0, 2.0):

        def both(hidden: Tensor, temperature: float = temperature) -> Tensor:
            return linear_losses(hidden, head, target, TeacherTargets(taught, teacher, head, temperature, 0.7))[0]

        def apart(hidden: Tensor, temperature: float = temperature) -> Tensor:
            own, theirs = hidden @ head.double().t(), teacher.double() @ head.double().t()
            log_q, log_p = ((x / temperature).log_softmax(dim=1) for x in (own, theirs))
            kl = (log_p.exp() * (log_p - log_q)).sum(dim=1).mean() * temperature**2
            return F.cross_entropy(own, target) + 0.7 * kl

        compared(both, apart, drawn(TOKENS, 8, scale=1.0, seed=3))

    def divergence(student: Tensor) -> Tensor:
        log_p = drawn(TOKENS, 9, scale=far, seed=5).double().log_softmax(dim=1)
        return (log_p.exp() * (log_p - student.log_softmax(dim=1))).sum(dim=1).mean()

    compared(
        lambda student: distillation_loss(student, drawn(TOKENS, 9, scale=far, seed=5), 1.0),
        divergence,
        drawn(TOKENS, 9, scale=far),
    )


@pytest.mark.parametrize("far", FAR)
def test_experts_that_compete(far: float) -> None:
    """One expert that the gate all but rules out, and that alone knows the answer, still gets its posterior."""
    target, head = torch.arange(TOKENS) % 7, MixtureHead(7, 7)
    head.weight.data.copy_(torch.eye(7))  # hidden states are the experts' logits
    target_TD = drawn(TOKENS, 2, scale=1.0)

    def log_mixture(gates: Tensor, hidden: Tensor) -> Tensor:
        return torch.logsumexp(gates.log_softmax(dim=1).unsqueeze(2) + hidden.log_softmax(dim=2), dim=1)

    def packed(gates: Tensor, hidden: Tensor) -> Tensor:
        return pack(hidden, gates.log_softmax(dim=1))

    def mean_nats(gates: Tensor, hidden: Tensor) -> Tensor:
        return -log_mixture(gates, hidden).gather(1, target.unsqueeze(1)).mean()

    gates, hidden = drawn(TOKENS, 3, scale=far), drawn(TOKENS, 3, 7, scale=far, seed=1)
    compared(lambda gates, hidden: head.logits(packed(gates, hidden)), log_mixture, gates, hidden)
    compared(lambda gates, hidden: head.cross_entropy(packed(gates, hidden), target), mean_nats, gates, hidden)

    def likelihood(gates: Tensor, outputs: Tensor) -> Tensor:
        errors = (target_TD.double().unsqueeze(1) - outputs).square().sum(dim=2)
        return -(gates.softmax(dim=1) * (-errors / 2).exp()).sum(dim=1).log().mean()

    near = drawn(TOKENS, 3, 2, scale=3.0, seed=2)
    compared(lambda gates, outputs: competitive_loss(gates, outputs, target_TD), likelihood, gates / 2, near)


def test_a_router_hands_competing_experts_their_gates_logarithms() -> None:
    logits = drawn(TOKENS, 4, scale=200.0)
    router = router_of(logits, mode="dense", competitive=True, balance_loss=0.0, z_loss=0.0)
    found = router(torch.eye(TOKENS), context()).log_weights_TK
    assert found is not None
    torch.testing.assert_close(found.double(), logits.double().log_softmax(dim=1), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("far", FAR)
def test_losses_on_routers(far: float) -> None:
    mask = torch.ones(TOKENS, dtype=torch.bool)
    compared(
        lambda logits: router_z_loss(logits, mask),
        lambda logits: logits.exp().sum(dim=1).log().square().mean(),
        drawn(TOKENS, 5, scale=far),
    )
    compared(
        lambda logits: old_experts_loss(logits, 2, mask),
        lambda logits: -logits.softmax(dim=1)[:, :2].sum(dim=1).log().mean(),
        drawn(TOKENS, 5, scale=far),
    )


@pytest.mark.parametrize("far", FAR)
def test_attention(far: float) -> None:
    """Queries as large as makes logits lie so far apart."""
    query, key, value = (drawn(2, 2, TOKENS, 4, scale=1.0, seed=seed) for seed in range(3))
    query = query * far
    documents = Documents.of((torch.arange(TOKENS) >= TOKENS // 3).long().expand(2, TOKENS))
    later = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)

    def defined(hidden: Tensor, cap: float | None = None) -> Callable[..., Tensor]:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            logits = query @ key.transpose(2, 3) / 2
            logits = logits if cap is None else cap * (logits / cap).tanh()
            return logits.masked_fill(hidden, -torch.inf).softmax(dim=3) @ value

        return attend

    apart = later | ~documents.mask
    for kernel in (Kernel.by_length, Kernel.mask):
        compared(
            lambda query, key, value, kernel=kernel: document_attention(query, key, value, documents, kernel),
            defined(apart),
            query,
            key,
            value,
        )
    compared(
        lambda query, key, value: softcapped_attention(query, key, value, None, far, is_causal=True),
        defined(later, far),
        query,
        key,
        value,
    )


def test_the_likeliest_token_is_drawn() -> None:
    logits = torch.tensor([[-200.0, 0.0, -200.0], [150.0, 0.0, 150.0]])
    assert sample_tokens(logits, torch.tensor([0.0, 0.9999])).tolist() == [1, 2]
