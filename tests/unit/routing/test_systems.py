"""Each router's own promises, by hand, by redrawing, or against scipy; parity with transformers is in tests/parity."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import kstest, uniform
from torch import Tensor

from lifelong_moe.config.routing.base import BalanceScope, Score, SecondExpert
from lifelong_moe.config.routing.capacity import CapacityConfig, Counts, Overflow, Priority
from lifelong_moe.errors import ConfigError
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.ops.assignment import balanced_assignment
from lifelong_moe.ops.noisy import prob_in_top_k
from lifelong_moe.ops.router_losses import (
    cv_squared,
    load_balancing_loss,
    relu_sparsity_loss,
    sequence_balancing_loss,
)
from lifelong_moe.routing.base import Router, RoutingContext

Make = Callable[..., Router]
TOKENS, WIDTH, EXPERTS = 60, 8, 6


def context(tokens: int = TOKENS, sequences: int = 3, padded: int = 0) -> RoutingContext:
    ids_T = torch.arange(tokens)
    return RoutingContext(ids_T, ids_T < tokens - padded, torch.zeros_like(ids_T), num_sequences=sequences)


def inputs(tokens: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def filled(router: Router, seed: int = 1) -> Router:
    for rows in router.row_generations():
        rows.data.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed)))
    return router


# --- noisy top-k


def test_expected_load_is_what_redrawing_an_experts_noise_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, deviation = torch.randn(4, 5, generator=generator), torch.rand(4, 5, generator=generator) + 0.5
    noisy = clean + torch.randn(4, 5, generator=generator) * deviation
    draws = 20_000
    for expert in range(5):
        again = noisy.repeat(draws, 1, 1)
        again[:, :, expert] = clean[:, expert] + torch.randn(draws, 4, generator=generator) * deviation[:, expert]
        chosen = (again.topk(2, dim=2).indices == expert).any(dim=2).float().mean(dim=0)
        torch.testing.assert_close(prob_in_top_k(clean, noisy, deviation, 2)[:, expert], chosen, atol=0.015, rtol=0)


def test_expected_load_needs_an_expert_that_is_left_out() -> None:
    ones = torch.ones(2, 3)
    with pytest.raises(ValueError, match="top_k=3"):
        prob_in_top_k(ones, ones, ones, 3)


def test_cv_squared_by_hand() -> None:
    assert float(cv_squared(torch.tensor([1.0, 3.0]))) == pytest.approx(0.25)  # variance 1, mean 2
    assert float(cv_squared(torch.full((5,), 7.0))) == 0.0


def test_noise_is_for_training_and_has_gradients(make_router: Make) -> None:
    router = filled(make_router(EXPERTS, width=WIDTH, mode="noisy_topk", importance_loss=0.1, load_loss=0.1))
    torch.manual_seed(0)
    routing = router(inputs(), context())
    assert set(routing.losses) == {"balance", "z", "importance", "load"}
    (routing.losses["load"].value + routing.losses["importance"].value).backward()
    for parameter in router.parameters():  # the noise's rows are zero, and yet they learn
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any())
    router.eval()
    first, second = router(inputs(), context()), router(inputs(), context())
    assert torch.equal(first.expert_ids_TK, second.expert_ids_TK) and first.losses == {}
    torch.testing.assert_close(first.weights_TK.sum(dim=1), torch.ones(TOKENS))


def test_a_later_generation_does_not_change_how_earlier_noise_is_rounded(
    make_router: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    x, found = torch.randn(1024, 96, generator=torch.Generator().manual_seed(0)), []
    for later in (0, 4):
        router = make_router(8, width=96, mode="noisy_topk")
        generator = torch.Generator().manual_seed(1)
        for rows in router.preset_parameters():
            torch.nn.init.normal_(rows, generator=generator)
        if later:
            router.add_experts(later)
            router.set_rows(torch.zeros(later, 96))
        for rows in router.row_generations()[:1]:
            torch.nn.init.zeros_(rows)
        routing = router(x, context(1024, 4))
        is_old_T = (routing.expert_ids_TK < 8).all(dim=1)
        found.append((routing.expert_ids_TK, routing.weights_TK, is_old_T))
    both_T = found[0][2] & found[1][2]
    assert int(both_T.sum()) > 900
    assert torch.equal(found[0][0][both_T], found[1][0][both_T])
    assert torch.equal(found[0][1][both_T], found[1][1][both_T])


# --- hierarchical


def test_a_hierarchy_of_which_all_is_chosen_is_the_product_of_two_softmaxes(make_router: Make) -> None:
    router = make_router(6, width=WIDTH, mode="hierarchical", expert_groups=3, top_groups=3, top_k=6).eval()
    router.set_rows(torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0)))
    inner, outer = router.row_generations()[0].detach(), dict(router.named_parameters())["group_rows.0"].detach()
    routing = router(inputs(), context())
    flat = (inputs() @ outer.t()).softmax(1).repeat_interleave(2, 1) * torch.cat(
        [(inputs() @ inner[i : i + 2].t()).softmax(1) for i in (0, 2, 4)], dim=1
    )
    found = torch.zeros(TOKENS, 6).scatter(1, routing.expert_ids_TK, routing.weights_TK.detach())
    torch.testing.assert_close(found, flat, atol=1e-6, rtol=0)


def test_a_hierarchy_of_one_group_is_flat(make_router: Make) -> None:
    kinds: dict[str, dict[str, object]] = {
        "hierarchical": {"expert_groups": 1, "top_groups": 1},
        "learned": {},
    }
    answers = [
        filled(make_router(6, width=WIDTH, mode=mode, **more)).eval()(inputs(), context())
        for mode, more in kinds.items()
    ]
    assert torch.equal(answers[0].expert_ids_TK, answers[1].expert_ids_TK)
    torch.testing.assert_close(answers[0].weights_TK, answers[1].weights_TK)


def test_what_a_hierarchy_cannot_divide_is_refused(make_router: Make) -> None:
    with pytest.raises(ConfigError, match="expert_groups=2 must divide"):
        make_router(5, mode="hierarchical", expert_groups=2, top_groups=2)
    with pytest.raises(ConfigError, match="top_k=3 must be a multiple"):
        make_router(6, mode="hierarchical", expert_groups=2, top_groups=2, top_k=3)


# --- BASE


@pytest.mark.parametrize(("tokens", "experts"), [(24, 4), (40, 8), (26, 4), (3, 4), (7, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_an_auction_comes_within_its_step_of_the_best_total(tokens: int, experts: int, seed: int) -> None:
    scores = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    places = np.repeat(np.arange(experts), tokens // experts)
    places = np.concatenate([places, np.arange(tokens % experts)])
    matrix = scores.numpy()[:, places]
    rows, columns = linear_sum_assignment(matrix, maximize=True)
    assigned = balanced_assignment(scores, step=1e-3)
    total = float(scores.gather(1, assigned.unsqueeze(1)).sum())
    assert matrix[rows, columns].sum() - tokens * 1e-3 - 1e-5 <= total <= matrix[rows, columns].sum() + 1e-5
    counts = torch.bincount(assigned, minlength=experts)
    assert int(counts.max() - counts.min()) <= 1 and int(counts.sum()) == tokens


@pytest.mark.parametrize("spread", [1.0, 1e-5])
def test_by_default_a_bid_rises_by_a_fiftieth_of_the_range(spread: float) -> None:
    for seed in range(35, 45):  # with a fifty-first the one of seed 40 is another assignment
        scores = spread * torch.rand(64, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        step = max(1e-4, (float(scores.max()) - float(scores.min())) / 50)
        assert torch.equal(balanced_assignment(scores), balanced_assignment(scores, step=step))
    assert balanced_assignment(torch.zeros(0, 3)).tolist() == []


def test_an_auction_that_is_cut_short_is_balanced_nevertheless() -> None:
    scores = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([5.0, 0, 0, 0])
    assert torch.bincount(balanced_assignment(scores, rounds=1)).tolist() == [16, 16, 16, 16]


def test_base_is_balanced_in_training_and_greedy_in_evaluation(make_router: Make) -> None:
    with pytest.raises(ConfigError, match=r"class C.*allow_noncausal=true"):
        make_router(EXPERTS, mode="base", top_k=1)
    router = filled(
        make_router(EXPERTS, width=WIDTH, mode="base", top_k=1, allow_noncausal=True, balance_loss=0, z_loss=0)
    )
    logits = inputs() @ router.row_generations()[0].detach().t()
    routing = router(inputs(), context())
    assert routing.counts_E.tolist() == [TOKENS // EXPERTS] * EXPERTS and routing.losses == {}
    torch.testing.assert_close(routing.weights_TK, logits.gather(1, routing.expert_ids_TK).sigmoid())
    routing.weights_TK.sum().backward()
    assert bool(router.row_generations()[0].grad.any())  # type: ignore[union-attr]
    assert torch.equal(router.eval()(inputs(), context()).expert_ids_TK.squeeze(1), logits.argmax(1))


# --- expert choice, ReLU, dense


def test_experts_choose_as_many_tokens_each(make_router: Make) -> None:
    router = filled(make_router(EXPERTS, width=WIDTH, mode="expert_choice", allow_noncausal=True)).eval()
    routing = router(inputs(), context())
    per_sequence = routing.expert_ids_TK.unflatten(0, (3, -1))
    taken = torch.stack([(per_sequence == e).any(dim=2).sum(dim=1) for e in range(EXPERTS)], dim=1)
    assert bool((taken == round(20 * 2 / EXPERTS)).all())
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    moved = router(inputs()[:20][order], context(20, 1)).expert_ids_TK
    assert torch.equal(moved, router(inputs()[:20], context(20, 1)).expert_ids_TK[order])


def test_experts_that_choose_break_ties_by_position_and_leave_padding(make_router: Make) -> None:
    router = make_router(2, width=WIDTH, mode="expert_choice", top_k=1, allow_noncausal=True).eval()  # rows are zero
    routing = router(inputs(8), context(8, 1, padded=5))
    assert routing.expert_ids_TK.tolist() == [[0, 1]] * 3 + [[-1, -1]] * 5


def test_relu_gates_and_their_sparsity(make_router: Make) -> None:
    router = filled(make_router(EXPERTS, width=WIDTH, mode="relu"))
    x = torch.cat([inputs(TOKENS - 1), torch.zeros(1, WIDTH)])
    routing = router(x, context())
    gates = (x @ router.row_generations()[0].detach().t()).relu()
    torch.testing.assert_close(routing.weights_TK, gates)
    assert torch.equal(routing.expert_ids_TK >= 0, gates > 0)
    assert bool((routing.combine(routing.dispatch(x))[-1] == 0).all())  # a token without experts


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_relus_penalty_by_hand(top_k: int) -> None:
    # Of four tokens expert 0 has all, expert 1 two, expert 2 one; f = 3 / k times that share. Gates sum to 8, 6 and 2.
    gates = torch.tensor([[1.0, 0, 0], [3.0, 2.0, 0], [1.0, 4.0, 2.0], [3.0, 0, 0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([True] * 4 + [False])
    expected = 3 / top_k * (8 / 4 * 1 + 6 / 4 * 1 / 2 + 2 / 4 * 1 / 4)
    assert float(relu_sparsity_loss(gates, mask, top_k)) == pytest.approx(expected)


def test_relu_reaches_its_sparsity(make_model: Callable[..., LanguageModel]) -> None:
    routing = {"mode": "relu", "balance_loss": 0.0, "z_loss": 0.0}
    model = make_model("learned", (8,), model={"init_std": 0.02, "width": 32}, routing=routing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator, used = torch.Generator().manual_seed(0), []
    follows = torch.randint(1, 61, (61, 4), generator=generator)  # text: each token has four that may follow
    for _ in range(250):
        ids = torch.randint(1, 61, (8, 1), generator=generator)
        for _ in range(16):
            ids = torch.cat([ids, follows[ids[:, -1:], torch.randint(4, (8, 1), generator=generator)]], dim=1)
        output = model(TokenBatch(ids[:, :-1]))
        loss = model.head.cross_entropy(output.hidden_BSD.flatten(0, 1), ids[:, 1:].flatten())
        for seen in output.routings:
            loss = loss + seen.losses["sparsity"].value * seen.losses["sparsity"].coefficient
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for layer in model.moe_layers():
            layer.router.end_step(True)
        used.append(np.mean([float((r.expert_ids_TK >= 0).sum(dim=1).float().mean()) for r in output.routings]))
    assert np.mean(used[:10]) > 3.5 and np.mean(used[-100:]) == pytest.approx(2.0, abs=0.2)


def test_relus_coefficient_is_state_and_moves_with_steps_taken(make_router: Make) -> None:
    router = filled(make_router(EXPERTS, width=WIDTH, mode="relu"))
    before = router.state_dict()["coefficient"].clone()
    router(inputs(), context())
    router.end_step(False)
    assert torch.equal(router.state_dict()["coefficient"], before) and before.dtype == torch.float32
    router(inputs(), context())
    router.end_step(True)
    assert float(router.state_dict()["coefficient"]) == pytest.approx(1.2 * float(before))  # three of six are used


@pytest.mark.parametrize(("seen", "factor"), [([3, 6], 1.2), ([2, 6], 1 / 1.2), ([1, 6], 1 / 1.2), ([0, 0], 1 / 1.2)])
def test_relus_coefficient_falls_at_its_sparsity(make_router: Make, seen: list[int], factor: float) -> None:
    router = make_router(3, mode="relu", top_k=1)  # a third of the gates may be positive
    router.used_and_all = torch.tensor(seen)  # type: ignore[assignment]
    router.end_step(True)
    assert float(router.coefficient) == pytest.approx(1e-8 * factor, rel=1e-6)  # type: ignore[arg-type]


def test_dense_asks_all(make_router: Make) -> None:
    router = filled(make_router(EXPERTS, width=WIDTH, mode="dense"))
    routing = router(inputs(), context())
    assert routing.counts_E.tolist() == [TOKENS] * EXPERTS
    torch.testing.assert_close(routing.weights_TK, (inputs() @ router.row_generations()[0].t()).softmax(1))


# --- bias, groups, scopes


def test_biases_even_out_a_skewed_router(make_router: Make) -> None:
    router = make_router(8, width=WIDTH, score=Score.sigmoid, bias_rate=0.01, balance_loss=0, z_loss=0)
    skew = torch.zeros(8, WIDTH)
    skew[:, 0] = torch.linspace(1.5, -1.5, 8)
    router.set_rows(skew + 0.1 * torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0)))
    worst = []
    for step in range(300):
        x = inputs(256, seed=step)
        x[:, 0] = 1.0
        counts = router(x, context(256, 1)).counts_E
        worst.append(float(counts.max() / counts.float().mean()))
        router.end_step(True)
    assert worst[0] > 3 and np.mean(worst[-50:]) < 1.5
    bias = router.state_dict()["bias_0"].clone()
    router.eval()(inputs(), context())
    router.end_step(True)
    assert torch.equal(router.state_dict()["bias_0"], bias) and bias.dtype == torch.float32


def test_small_steps_add_up_in_a_model_of_bfloat16(make_router: Make) -> None:
    router = make_router(2, width=WIDTH, bias_rate=0.001, balance_loss=0, z_loss=0, top_k=1, renormalize=False)
    router.to(torch.bfloat16)
    for _ in range(1200):
        router.counts_E = torch.tensor([0, 8])  # nobody goes to the first, all to the second
        router.end_step(True)
    assert {rows.dtype for rows in router.row_generations()} == {torch.bfloat16}
    assert router.state_dict()["bias_0"].dtype == torch.float32
    assert router.state_dict()["bias_0"].tolist() == pytest.approx([1.2, -1.2], abs=1e-4)  # bfloat16 stops at 0.5
    kept = router.state_dict()["bias_0"].clone()
    router.to("cpu", torch.bfloat16).float()
    assert torch.equal(router.state_dict()["bias_0"], kept)
    again = make_router(2, width=WIDTH, bias_rate=0.001).to(torch.bfloat16)
    again.load_state_dict(router.state_dict())
    assert torch.equal(again.state_dict()["bias_0"], kept)


def test_relus_coefficient_is_float32_in_a_model_of_bfloat16(make_router: Make) -> None:
    router = make_router(2, width=WIDTH, mode="relu", top_k=1).to(torch.bfloat16)
    for _ in range(100):
        router.used_and_all = torch.tensor([2, 2])  # too many
        router.end_step(True)
    assert router.state_dict()["coefficient"].dtype == torch.float32
    assert float(router.state_dict()["coefficient"]) == pytest.approx(1e-8 * 1.2**100, rel=1e-4)


def test_biases_choose_and_do_not_weigh(make_router: Make) -> None:
    router = filled(make_router(EXPERTS, width=WIDTH, score=Score.sigmoid, bias_rate=0.01, renormalize=False)).eval()
    plain = router(inputs(), context())
    router.bias_0[0] = 100.0  # type: ignore[index]
    biased = router(inputs(), context())
    assert bool((biased.expert_ids_TK[:, 0] == 0).all()) and not torch.equal(plain.expert_ids_TK, biased.expert_ids_TK)
    logits = inputs() @ router.row_generations()[0].detach().t()
    torch.testing.assert_close(biased.weights_TK, logits.sigmoid().gather(1, biased.expert_ids_TK))


def test_frozen_biases_stay(make_router: Make) -> None:
    router = filled(make_router(4, width=WIDTH, bias_rate=0.01))
    router.freeze()
    router.add_experts(2)
    filled(router)
    router(inputs(), context())
    router.end_step(True)
    assert not bool(router.bias_0.any()) and bool(router.bias_1.any())  # type: ignore[operator]


def test_micro_batches_count_as_one_batch(make_router: Make) -> None:
    router = filled(make_router(EXPERTS, width=WIDTH, balance_scope=BalanceScope.global_batch, z_loss=0))
    parts = [router(inputs()[i : i + 20], context(20, 1)).losses["balance"].value for i in (0, 20, 40)]
    probs = (inputs() @ router.row_generations()[0].t()).softmax(1)
    ids = probs.topk(2).indices
    counts = torch.bincount(ids.flatten(), minlength=EXPERTS).float()
    expected = EXPERTS * (counts / counts.sum() * probs[40:].mean(0)).sum()
    torch.testing.assert_close(parts[2], expected)  # f of all three, p of the last
    router.end_step(True)
    alone = router(inputs()[:20], context(20, 1)).losses["balance"].value
    torch.testing.assert_close(alone, parts[0])  # a new step begins at zero


def test_sequences_are_balanced_each_by_itself() -> None:
    even = torch.full((4, 2), 0.5)
    ids, mask = torch.tensor([[0], [0], [1], [1]]), torch.ones(4, dtype=torch.bool)
    assert float(sequence_balancing_loss(even, ids, mask, 2)) == pytest.approx(1.0)
    sure = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0], [0, 1.0]])
    assert float(load_balancing_loss(sure, ids, mask)) == pytest.approx(1.0)  # over both, all is even
    assert float(sequence_balancing_loss(sure, ids, mask, 2)) == pytest.approx(2.0)  # in each it is not
    fewer = torch.tensor([[0, -1], [1, -1], [1, -1], [0, 1]])  # a hole counts nowhere
    assert float(sequence_balancing_loss(even, fewer, mask, 2)) == pytest.approx(1.0)
    mask = torch.tensor([True, True, False, False])
    assert float(sequence_balancing_loss(sure, ids, mask, 2)) == pytest.approx(2.0)  # padding counts nowhere


# --- capacity


@pytest.mark.parametrize("priority", list(Priority))
@pytest.mark.parametrize("overflow", list(Overflow))
def test_no_expert_is_overfull(make_router: Make, priority: Priority, overflow: Overflow) -> None:
    capacity = CapacityConfig(factor=0.5, priority=priority, overflow=overflow, counts=Counts.assignments)
    router = filled(make_router(EXPERTS, width=WIDTH, capacity=capacity, allow_noncausal=True))
    routing = router(inputs(), context(padded=7))
    ids = routing.expert_ids_TK.unflatten(0, (3, -1))
    most = int(20 * 2 * 0.5 / EXPERTS)
    counts = torch.stack([(ids == e).sum(dim=(1, 2)) for e in range(EXPERTS)])
    assert int(counts.max()) == most
    assert bool((ids[2, -7:] == -1).all())  # padding takes no room
    for row in routing.expert_ids_TK:  # no expert twice
        chosen = row[row >= 0]
        assert len(chosen.unique()) == len(chosen)
    out = routing.combine(routing.dispatch(inputs()))
    assert bool((out[(routing.expert_ids_TK < 0).all(dim=1)] == 0).all())
    wanted, kept = (TOKENS - 7) * 2, int((routing.expert_ids_TK >= 0).sum())
    assert routing.dropped is not None and routing.dropped.tolist() == [wanted - kept, wanted]
    if overflow == Overflow.next_choice:
        assert kept == min(wanted, 3 * EXPERTS * most)


def test_with_room_enough_any_priority_is_dropless(make_router: Make) -> None:
    plain = filled(make_router(EXPERTS, width=WIDTH)).eval()(inputs(), context())
    for priority in Priority:
        capacity = CapacityConfig(eval_factor=EXPERTS, priority=priority)
        router = filled(make_router(EXPERTS, width=WIDTH, capacity=capacity, allow_noncausal=True)).eval()
        routing = router(inputs(), context())
        assert torch.equal(routing.expert_ids_TK, plain.expert_ids_TK) and int(routing.dropped[0]) == 0  # type: ignore[index]
        torch.testing.assert_close(routing.combine(routing.dispatch(inputs())), plain.combine(plain.dispatch(inputs())))


def test_batch_priority_keeps_larger_gates(make_router: Make) -> None:
    kept = {}
    for priority in (Priority.choice, Priority.batch):
        capacity = CapacityConfig(eval_factor=0.5, priority=priority)
        router = make_router(EXPERTS, width=WIDTH, capacity=capacity, renormalize=False, allow_noncausal=True)
        routing = filled(router).eval()(inputs(), context())
        kept[priority] = float(routing.weights_TK[routing.expert_ids_TK >= 0].detach().mean())
    assert kept[Priority.batch] > kept[Priority.choice]


def test_evaluation_draws_nothing(make_router: Make) -> None:
    capacity = CapacityConfig(eval_factor=0.5, factor=0.5, priority=Priority.random)
    router = filled(make_router(EXPERTS, width=WIDTH, capacity=capacity, allow_noncausal=True, jitter=0.3)).eval()
    assert torch.equal(router(inputs(), context()).expert_ids_TK, router(inputs(), context()).expert_ids_TK)
    router.train()
    torch.manual_seed(0)
    assert not torch.equal(router(inputs(), context()).expert_ids_TK, router(inputs(), context()).expert_ids_TK)


# --- GShard


def test_the_second_expert_is_used_as_often_as_its_gate_says(make_router: Make) -> None:
    router = filled(make_router(EXPERTS, width=WIDTH, mode="gshard", second=SecondExpert.random))
    torch.manual_seed(0)
    routings = [router(inputs(), context()) for _ in range(2000)]
    used = torch.stack([r.expert_ids_TK[:, 1] >= 0 for r in routings]).float().mean(dim=0)
    second = routings[0].weights_TK[:, 1].detach()
    torch.testing.assert_close(used, (2 * second).clamp_max(1), atol=0.05, rtol=0)
    lone = routings[0].expert_ids_TK[:, 1] < 0
    assert bool(lone.any()) and bool((routings[0].weights_TK[lone, 0] < 1).all())
    assert bool((router.eval()(inputs(), context()).expert_ids_TK >= 0).all())
    threshold = filled(make_router(EXPERTS, width=WIDTH, mode="gshard", second=SecondExpert.threshold))
    routing = threshold(inputs(), context())
    assert torch.equal(routing.expert_ids_TK[:, 1] >= 0, routing.weights_TK[:, 1] > 0.2)


@pytest.mark.parametrize("jitter", [0.01, 0.5])
def test_jitter_is_even_over_its_range(make_router: Make, jitter: float) -> None:
    """Of inputs 1, rows of the identity and sigmoids, the gates' logits are the factors themselves."""
    router = make_router(WIDTH, width=WIDTH, score=Score.sigmoid, renormalize=False, top_k=WIDTH, jitter=jitter)
    router.set_rows(torch.eye(WIDTH))
    torch.manual_seed(0)
    factors = router(torch.ones(2000, WIDTH), context(2000, 1)).weights_TK.detach().double().logit().flatten()
    assert kstest(factors.numpy(), uniform(1 - jitter, 2 * jitter).cdf).pvalue > 0.01


def test_jitter_reaches_the_router_only(make_router: Make) -> None:
    router = filled(make_router(EXPERTS, width=WIDTH, mode="switch", top_k=1, renormalize=False, jitter=0.5))
    torch.manual_seed(0)
    x = inputs()
    first, second = router(x, context()), router(x, context())
    assert torch.equal(x, inputs()) and not torch.equal(first.weights_TK, second.weights_TK)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mode": "switch", "renormalize": False}, r"routing\.mode=switch chooses 1 expert"),
        ({"mode": "gshard", "top_k": 3}, r"routing\.mode=gshard chooses 2 expert"),
        ({"mode": "relu", "balance_scope": BalanceScope.global_batch}, r"global_batch is for routing\.mode=learned or"),
        ({"top_groups": 2}, r"routing\.top_groups=2 must lie in 1 to routing\.expert_groups=1"),
        ({"jitter": 1.0}, r"routing\.jitter=1\.0 must be below 1"),
        ({"mode": "gshrad"}, r"Did you mean gshard\?"),
    ],
)
def test_mistakes(make_router: Make, config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_router(4, **config)
