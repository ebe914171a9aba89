"""What the load-balancing loss counts, and over which tokens, against its authors' formulas written anew in NumPy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lifelong_moe.config.routing.base import BalanceCounts, BalanceOver, BalanceScope, Bundles, Score, SecondExpert
from lifelong_moe.config.routing.capacity import CapacityConfig
from lifelong_moe.config.routing.modes import settings_of, stored_routing
from lifelong_moe.errors import ConfigError
from lifelong_moe.routing.base import Router, RoutingContext
from tests.conftest import routing_of

Make = Callable[..., Router]
ROOM = CapacityConfig(factor=1.0)
SWITCH: dict[str, Any] = {"mode": "switch", "top_k": 1, "renormalize": False, "capacity": ROOM, "z_loss": 0.0}


def context(sequences: int, length: int, mask: Tensor | None = None, groups: Tensor | None = None) -> RoutingContext:
    ids_T = torch.arange(sequences * length)
    everything = torch.ones_like(ids_T, dtype=torch.bool)
    return RoutingContext(
        ids_T,
        everything if mask is None else mask,
        torch.zeros_like(ids_T) if groups is None else groups,
        num_sequences=sequences,
    )


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def in_groups(logits_GSE: NDArray[np.float64], real_GS: NDArray[np.bool_] | None = None) -> float:
    """Balance of first choices as Mesh TensorFlow's ``_switch_gating`` and Lingvo's ``Top2GatingOnLogits`` have it.

    Means over a group of indicators and of probabilities, their product's mean over groups and experts, times E². With
    padding as in Lingvo without ``legacy_mtf_behavior``: both are divided by the group's share of real tokens.
    """
    groups, size, experts = logits_GSE.shape
    gates_GSE = softmax(logits_GSE)
    density, proxy = np.zeros((groups, experts)), np.zeros((groups, experts))
    for g in range(groups):
        rows = [s for s in range(size) if real_GS is None or real_GS[g, s]]
        for s in rows:
            density[g, gates_GSE[g, s].argmax()] += 1 / len(rows)
            proxy[g] += gates_GSE[g, s] / len(rows)
    return float((density * proxy).mean() * experts**2)


def of_the_newest(probs_TE: NDArray[np.float64], chosen_TK: NDArray[np.int64], first: int) -> float:
    """``n sum_e f_e p_e`` over the n experts from ``first`` on: shares of what they have of choices and probability."""
    counts = [float((chosen_TK == e).sum()) for e in range(first, probs_TE.shape[1])]
    masses = [float(probs_TE[:, e].sum()) for e in range(first, probs_TE.shape[1])]
    return len(counts) * sum(f / sum(counts) * p / sum(masses) for f, p in zip(counts, masses, strict=True))


@pytest.mark.parametrize("scope", list(BalanceScope))
def test_balance_over_this_stages_experts_alone(make_router: Make, scope: BalanceScope) -> None:
    sequences, length, values = 3, 20, {"balance_over": BalanceOver.active, "balance_scope": scope, "z_loss": 0.0}
    router, generator = make_router(4, 3, width=8, **values), torch.Generator().manual_seed(0)
    for rows_ED in router.row_generations():
        rows_ED.data.copy_(torch.randn(rows_ED.shape, generator=generator))
    x_TD = torch.randn(sequences * length, 8, generator=generator)
    rows_ED = torch.cat(router.row_generations()).detach().double()
    probs_TE = softmax((x_TD.double() @ rows_ED.t()).numpy())
    chosen_TK = np.argsort(-probs_TE, axis=1)[:, :2]
    parts = np.split(np.arange(len(x_TD)), sequences if scope == BalanceScope.sequence else 1)
    expected = np.mean([of_the_newest(probs_TE[part], chosen_TK[part], 4) for part in parts])
    assert router(x_TD, context(sequences, length)).losses["balance"].value.item() == pytest.approx(expected, rel=1e-5)


def set_rows(router: Router, rows_ED: Tensor) -> Router:
    router.set_rows(rows_ED)
    return router


def gradient(router: Router, loss: Tensor) -> Tensor:
    (rows,) = router.row_generations()
    return torch.autograd.grad(loss, rows)[0]


def test_two_sequences_that_each_collapse_are_not_balanced(make_router: Make) -> None:
    """Half of the tokens are dropped; over both sequences nothing would be seen of it."""
    x_TD = torch.tensor([[1.0, 0, 0]] * 8 + [[0, 1.0, 0]] * 8)
    router = set_rows(make_router(2, **SWITCH), torch.tensor([[2.5, -2.5, 0], [-2.5, 2.5, 0]]))
    routing = router(x_TD, context(2, 8))
    assert routing.dropped is not None and routing.dropped.tolist() == [8, 16]
    loss = routing.losses["balance"].value
    logits_TE = (x_TD @ router.row_generations()[0].detach().t()).double().numpy()
    assert loss.item() == pytest.approx(in_groups(logits_TE.reshape(2, 8, 2)), rel=1e-6)
    assert loss.item() == pytest.approx(1.987, abs=5e-4)
    assert in_groups(logits_TE.reshape(1, 16, 2)) == pytest.approx(1.0)
    slope_ED = gradient(router, loss)  # against each sequence's own expert
    assert slope_ED[0, 0] > 1e-3 and slope_ED[1, 1] > 1e-3 and slope_ED[1, 0] < -1e-3 and slope_ED[0, 1] < -1e-3


@pytest.mark.parametrize("mode", ["switch", "gshard", "learned"])
@pytest.mark.parametrize("padded", [False, True])
def test_balance_where_room_is_counted(make_router: Make, mode: str, padded: bool) -> None:
    """First choices, before any is left out or dropped; a padded sequence by its real tokens."""
    kinds: dict[str, dict[str, Any]] = {
        "switch": SWITCH,
        "gshard": {"mode": "gshard", "balance_counts": "first", "second": SecondExpert.random, "capacity": ROOM},
        "learned": {"balance_counts": "first", "capacity": ROOM},
    }
    sequences, length, experts = 3, 20, 5
    generator = torch.Generator().manual_seed(0)
    router = set_rows(make_router(experts, width=8, **kinds[mode]), torch.randn(experts, 8, generator=generator))
    x_TD = torch.randn(sequences * length, 8, generator=generator)
    real_GS = np.arange(length) < np.array([[20], [7], [1]]) if padded else np.ones((sequences, length), dtype=bool)
    torch.manual_seed(0)
    losses = router(x_TD, context(sequences, length, torch.from_numpy(real_GS).flatten())).losses
    logits = (x_TD.double() @ router.row_generations()[0].detach().double().t()).numpy()
    expected = in_groups(logits.reshape(sequences, length, experts), real_GS)
    assert losses["balance"].value.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scope", [BalanceScope.microbatch, BalanceScope.global_batch])
@pytest.mark.parametrize("mode", ["switch", "gshard", "learned"])
def test_balance_elsewhere_than_room_is_refused(mode: str, scope: BalanceScope) -> None:
    values = {**settings_of(mode)().settings(), "capacity": ROOM, "balance_scope": None}
    with pytest.raises(ConfigError, match=rf"^routing\.balance_scope={scope} cannot be .*capacity=null\.$") as caught:
        routing_of(**values | {"balance_scope": scope})
    assert "\n" not in str(caught.value)
    assert routing_of(**values).effective_balance_scope == BalanceScope.sequence
    assert routing_of(**values | {"capacity": None}).effective_balance_scope == BalanceScope.microbatch
    assert routing_of(**values | {"capacity": None, "balance_scope": scope}).effective_balance_scope == scope


def test_what_an_earlier_version_wrote_is_read() -> None:
    """Capacity with balance over the micro-batch, which had no gradient against what was dropped."""
    written = routing_of(**SWITCH).to_json() | {"balance_scope": "microbatch", "balance_loss": 0.01}
    read = stored_routing(written)
    assert read.capacity == ROOM and read.balance_scope is None and read.balance_loss == 0.01
    again = stored_routing(routing_of(balance_scope=BalanceScope.global_batch).to_json())
    assert again.balance_scope is BalanceScope.global_batch
    assert stored_routing(routing_of().to_json()) == routing_of()
    assert stored_routing({}) == dataclasses.replace(routing_of(), mixture=None)  # which they did not have


def test_a_scope_that_is_meant_anyway_changes_nothing() -> None:
    for config, said in ((routing_of(), BalanceScope.microbatch), (routing_of(**SWITCH), BalanceScope.sequence)):
        spelled_out = dataclasses.replace(config, balance_scope=said)
        assert spelled_out != config and spelled_out.effective(grown=True) == config.effective(grown=True)


def test_sequences_are_balanced_over_the_experts_that_tokens_have(make_router: Make) -> None:
    """Two bundles of two and three experts: 1 where each token's experts are used evenly, as over a micro-batch."""
    generator = torch.Generator().manual_seed(0)
    values: dict[str, Any] = {"bundles": Bundles.label, "top_k": 1, "renormalize": False, "z_loss": 0.0}
    domains_T = torch.tensor([0] * 6 + [1] * 6 + [0, 1] * 6)
    x_TD = torch.randn(24, 3, generator=generator)
    router = make_router(2, 3, balance_scope=BalanceScope.sequence, **values)  # rows are zero: all is even
    assert router(x_TD, context(2, 12, groups=domains_T)).losses["balance"].value.item() == pytest.approx(1.0)
    parts, rows = [], [torch.randn(n, 3, generator=generator) for n in (2, 3)]
    for scope in (BalanceScope.sequence, BalanceScope.microbatch):
        router = make_router(2, 3, balance_scope=scope, **values)
        for mine, given in zip(router.row_generations(), rows, strict=True):
            mine.data.copy_(given)
        parts.append(
            [
                router(x_TD[i : i + 12], context(1, 12, groups=domains_T[i : i + 12])).losses["balance"].value
                for i in (0, 12)
            ]
        )
        if scope == BalanceScope.sequence:
            whole = router(x_TD, context(2, 12, groups=domains_T)).losses["balance"].value
    torch.testing.assert_close(torch.stack(parts[0]), torch.stack(parts[1]))
    torch.testing.assert_close(whole, torch.stack(parts[0]).mean())


V3: dict[str, Any] = {"score": Score.sigmoid, "bias_rate": 0.01, "top_k": 4, "expert_groups": 4, "top_groups": 2}
SEQUENCES, LENGTH, EXPERTS, WIDTH = 4, 32, 16, 8


def skewed(make_router: Make, **more: Any) -> Router:
    """After 200 steps in which biases evened out a skewed router's loads."""
    router = make_router(EXPERTS, width=WIDTH, z_loss=0.0, **V3, **more)
    rows_ED = 0.3 * torch.randn(EXPERTS, WIDTH, generator=torch.Generator().manual_seed(0))
    rows_ED[:, 0] = torch.linspace(1.0, -1.0, EXPERTS)[
        torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(1))
    ]
    router.set_rows(rows_ED)
    for step in range(200):
        router(hidden(step), context(SEQUENCES, LENGTH))
        router.end_step(True)
    assert float(router.state_dict()["bias_0"].abs().max()) > 0.2
    return router


def hidden(seed: int) -> Tensor:
    x_TD = torch.randn(SEQUENCES * LENGTH, WIDTH, generator=torch.Generator().manual_seed(100 + seed))
    x_TD[:, 0] = 1.0
    return x_TD


def balance_of_scores(s_TE: Tensor, among_TE: Tensor, top_k: int) -> Tensor:
    """DeepSeek-V3's eqs. 17 to 20 of one sequence, token by token: ``f`` of the k best of ``among``, ``P`` of ``s``."""
    tokens, experts = s_TE.shape
    f, p = torch.zeros(experts, dtype=torch.float64), torch.zeros(experts, dtype=torch.float64)
    for t in range(tokens):
        for i in sorted(range(experts), key=lambda e: -float(among_TE[t, e]))[:top_k]:
            f[i] += experts / (top_k * tokens)
        p = p + s_TE[t] / s_TE[t].sum() / tokens
    return (f * p).sum()


def test_sequences_count_the_best_scores_whatever_biases_chose(make_router: Make) -> None:
    router = skewed(make_router, balance_scope=BalanceScope.sequence)
    x_TD, (rows,) = hidden(999), router.row_generations()
    routing = router(x_TD, context(SEQUENCES, LENGTH))
    loss = routing.losses["balance"].value
    again_ED = rows.detach().double().requires_grad_()
    s_BSE = (x_TD.double() @ again_ED.t()).sigmoid().view(SEQUENCES, LENGTH, EXPERTS)
    expected = torch.stack([balance_of_scores(s, s.detach(), 4) for s in s_BSE]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (slope_ED,) = torch.autograd.grad(expected, again_ED, retain_graph=True)
    torch.testing.assert_close(gradient(router, loss).double(), slope_ED, rtol=1e-4, atol=1e-7)
    # What biases and groups chose is all but even, and presses otherwise.
    chosen_TE = torch.zeros(len(x_TD), EXPERTS).scatter(1, routing.expert_ids_TK, 1.0).view(SEQUENCES, LENGTH, EXPERTS)
    hid = torch.stack([balance_of_scores(s, c, 4) for s, c in zip(s_BSE, chosen_TE, strict=True)]).mean()
    (other_ED,) = torch.autograd.grad(hid, again_ED)
    assert hid.item() < 1.03 < 1.1 < expected.item()
    assert float(slope_ED.norm() / other_ED.norm()) > 2


@pytest.mark.parametrize("scope", [BalanceScope.microbatch, BalanceScope.global_batch])
@pytest.mark.parametrize("counts", list(BalanceCounts))
def test_batches_count_the_best_scores_too(make_router: Make, scope: BalanceScope, counts: BalanceCounts) -> None:
    """Megatron-LM: ``E / (K T) sum_e counts_e * mean score_e``, counts of the k best scores of micro-batches so far."""
    router = skewed(make_router, balance_scope=scope, balance_counts=counts)
    earlier_E: NDArray[np.float64] = np.zeros(EXPERTS)
    k = 4 if counts == BalanceCounts.all else 1
    (rows,) = router.row_generations()
    for seed in (500, 501, 502):
        x_TD = hidden(seed)
        value = router(x_TD, context(SEQUENCES, LENGTH)).losses["balance"].value.item()
        scores = 1 / (1 + np.exp(-(x_TD.double() @ rows.detach().double().t()).numpy()))
        counts_E = np.bincount(np.argsort(-scores, axis=1)[:, :k].ravel(), minlength=EXPERTS).astype(np.float64)
        earlier_E = counts_E if scope == BalanceScope.microbatch else earlier_E + counts_E
        shares_TE = scores / scores.sum(axis=1, keepdims=True)
        expected = EXPERTS * (earlier_E / earlier_E.sum() * shares_TE.mean(axis=0)).sum()
        assert value == pytest.approx(expected, rel=1e-5)
    router.end_step(True)
    assert router(hidden(502), context(SEQUENCES, LENGTH)).losses["balance"].value.item() == pytest.approx(
        EXPERTS * (counts_E / counts_E.sum() * shares_TE.mean(axis=0)).sum(), rel=1e-5
    )


def test_biases_move_by_what_was_chosen(make_router: Make) -> None:
    router = skewed(make_router, balance_scope=BalanceScope.global_batch)
    before = router.state_dict()["bias_0"].clone()
    counts_E = sum(router(hidden(seed), context(SEQUENCES, LENGTH)).counts_E for seed in (500, 501))
    router.end_step(True)
    assert isinstance(counts_E, Tensor)
    expected = before + 0.01 * (counts_E.float().mean() - counts_E).sign()
    torch.testing.assert_close(router.state_dict()["bias_0"], expected)
