"""Groups of experts: which of them a token uses, against the sources' rules written again with loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lifelong_moe.config.routing.base import BalanceScope, Score
from lifelong_moe.config.run import RunConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.ops.selection import within_best_groups
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.routing.base import Router, RoutingContext

Make = Callable[..., Router]
TOKENS, WIDTH = 60, 8


def context(tokens: int = TOKENS, sequences: int = 3) -> RoutingContext:
    ids_T = torch.arange(tokens)
    return RoutingContext(ids_T, torch.ones_like(ids_T, dtype=torch.bool), ids_T * 0, num_sequences=sequences)


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def filled(router: Router) -> Router:
    for generation, rows in enumerate(router.row_generations()):
        rows.data.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(generation + 1)))
    return router


# --- groups of which some stay open (DeepSeek)


def deepseek_choice(scores: list[float], bias: list[float] | None, groups: int, open_groups: int, k: int) -> set[int]:
    """Experts that one token uses, as ``Gate`` of DeepSeek-V3's inference code chooses them."""
    ranked = scores if bias is None else [a + b for a, b in zip(scores, bias, strict=True)]
    size = len(scores) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    of_group = []
    for experts in members:
        best = sorted((ranked[e] for e in experts), reverse=True)
        of_group.append(best[0] if bias is None else best[0] + best[1])
    stay = sorted(range(groups), key=lambda g: -of_group[g])[:open_groups]
    return set(sorted((e for g in stay for e in members[g]), key=lambda e: -ranked[e])[:k])


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("score", list(Score))
@pytest.mark.parametrize(("experts", "groups", "top_groups", "top_k"), [(16, 4, 2, 4), (12, 3, 1, 2), (8, 4, 3, 2)])
def test_groups_are_opened_as_deepseek_opens_them(
    make_router: Make, biased: bool, score: Score, experts: int, groups: int, top_groups: int, top_k: int
) -> None:
    keys = {"expert_groups": groups, "top_groups": top_groups, "top_k": top_k, "score": score}
    router = filled(make_router(experts, width=WIDTH, bias_rate=0.01 if biased else 0.0, **keys)).eval()
    bias = torch.randn(experts, generator=torch.Generator().manual_seed(5)) * 0.3
    if biased:
        router.bias_0.copy_(bias)  # type: ignore[operator]
    logits = inputs() @ router.row_generations()[0].detach().t()
    scores = logits.softmax(dim=1) if score == Score.softmax else logits.sigmoid()
    chosen = [set(row) for row in router(inputs(), context()).expert_ids_TK.tolist()]
    expected = [
        deepseek_choice(row, bias.tolist() if biased else None, groups, top_groups, top_k) for row in scores.tolist()
    ]
    assert chosen == expected
    of_two = [deepseek_choice(row, [0.0] * experts, groups, top_groups, top_k) for row in scores.tolist()]
    assert biased or top_groups == 3 or expected != of_two  # another rule would have been noticed


@given(seed=st.integers(0, 999), best=st.integers(1, 4))
def test_best_groups_by_sorting(seed: int, best: int) -> None:
    scores = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
    kept = within_best_groups(scores, 4, 2, best).isfinite().unflatten(1, (4, 3))
    for row, open_groups in zip(scores.tolist(), kept.all(dim=2).tolist(), strict=True):
        sums = [sum(sorted(row[g * 3 : g * 3 + 3])[-best:]) for g in range(4)]
        assert {g for g in range(4) if open_groups[g]} == set(sorted(range(4), key=lambda g: -sums[g])[:2])
    assert torch.equal(kept.any(dim=2), kept.all(dim=2))


def test_two_good_experts_beat_a_single_best_where_two_count() -> None:
    scores = torch.tensor([[5.0, 0, 3, 3]])
    assert within_best_groups(scores, 2, 1, 2).isfinite().tolist() == [[False, False, True, True]]
    assert within_best_groups(scores, 2, 1, 1).isfinite().tolist() == [[True, True, False, False]]


def test_deepseek_moes_loss_is_one_of_each_sequence(make_router: Make) -> None:
    """``seq_aux`` of the released model's gate: how often a sequence chose an expert, times its mean score there."""
    keys = {"top_k": 2, "renormalize": False, "balance_scope": BalanceScope.sequence, "z_loss": 0.0}
    router = filled(make_router(6, width=WIDTH, **keys))
    loss = router(inputs(), context()).losses["balance"].value
    scores = (inputs() @ router.row_generations()[0].detach().t()).softmax(dim=1)
    total = 0.0
    for rows in scores.tolist()[:20], scores.tolist()[20:40], scores.tolist()[40:]:
        for expert in range(6):
            taken = sum(expert in sorted(range(6), key=lambda e: -row[e])[:2] for row in rows)
            total += taken / (20 * 2 / 6) * sum(row[expert] for row in rows) / 20
    assert float(loss.detach()) == pytest.approx(total / 3, rel=1e-5)


@pytest.mark.parametrize(("generations", "fits"), [((4,), True), ((6,), True), ((5,), False), ((4, 4), False)])
def test_open_groups_divide_the_experts_and_do_not_grow(
    make_router: Make, generations: tuple[int, ...], fits: bool
) -> None:
    if fits:
        make_router(*generations, expert_groups=2, top_groups=1)
        return
    with pytest.raises(ConfigError, match=r"routing\.expert_groups=2 must divide .* groups cannot grow"):
        make_router(*generations, expert_groups=2, top_groups=1)


# --- a gate of gates


def hierarchys_gates(groups: list[list[float]], outer: list[float], top_groups: int, each: int) -> dict[int, float]:
    """One token's experts and gates by appendix B of the paper, without noise: softmaxes over what each gate kept."""
    gates, first = {}, 0
    kept = sorted(range(len(groups)), key=lambda g: -outer[g])[:top_groups]
    total = sum(math.exp(outer[g]) for g in kept)
    for g, inner in enumerate(groups):
        if g in kept:
            best = sorted(range(len(inner)), key=lambda e: -inner[e])[:each]
            within = sum(math.exp(inner[e]) for e in best)
            gates |= {first + e: math.exp(outer[g]) / total * math.exp(inner[e]) / within for e in best}
        first += len(inner)
    return gates


@pytest.mark.parametrize(
    ("generations", "sizes", "expert_groups", "top_groups", "top_k"),
    [
        ((8,), [2, 2, 2, 2], 4, 2, 4),
        ((8,), [4, 4], 2, 2, 4),
        ((8, 2), [2, 2, 2, 2, 2], 4, 2, 4),  # less than a group each: as many groups as are whole
        ((8, 2, 6), [4, 4, 2, 3, 3], 2, 2, 4),
        ((12, 6), [3, 3, 3, 3, 3, 3], 4, 3, 9),
    ],
)
def test_two_gates_choose_and_weigh(
    make_router: Make, generations: tuple[int, ...], sizes: list[int], expert_groups: int, top_groups: int, top_k: int
) -> None:
    keys = {"mode": "hierarchical", "expert_groups": expert_groups, "top_groups": top_groups, "top_k": top_k}
    router = filled(make_router(*generations, width=WIDTH, **keys)).eval()
    parameters = dict(router.named_parameters())
    for g in range(len(generations)):
        rows = parameters[f"group_rows.{g}"]
        rows.data.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(10 + g)))
    outer = torch.cat([inputs() @ parameters[f"group_rows.{g}"].detach().t() for g in range(len(generations))], dim=1)
    inner = torch.cat([inputs() @ rows.detach().t() for rows in router.row_generations()], dim=1)
    assert outer.shape[1] == len(sizes)
    routing = router(inputs(), context())
    for t in range(TOKENS):
        expected = hierarchys_gates(
            [part.tolist() for part in inner[t].split(sizes)], outer[t].tolist(), top_groups, top_k // top_groups
        )
        found = dict(zip(routing.expert_ids_TK[t].tolist(), routing.weights_TK[t].tolist(), strict=True))
        assert found == pytest.approx(expected, abs=1e-5)


def test_new_groups_begin_at_the_mean_of_their_experts_rows(make_router: Make) -> None:
    router = make_router(8, 4, width=WIDTH, mode="hierarchical", expert_groups=4, top_groups=2, top_k=4)
    rows = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    router.set_rows(rows)
    found = dict(router.named_parameters())["group_rows.1"].detach()
    torch.testing.assert_close(found, torch.stack([rows[:2].mean(dim=0), rows[2:].mean(dim=0)]))


@pytest.mark.parametrize("generations", [(6,), (4,), (8, 1), (8, 5), (5,)])
def test_what_does_not_divide_into_groups_is_refused(make_router: Make, generations: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"expert_groups=4 must divide the number of experts"):
        make_router(*generations, mode="hierarchical", expert_groups=4, top_groups=2, top_k=4)


# --- what a run may ask for


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("expert_groups=4", "top_groups=1", "top_k=3"), r"routing\.top_k=3 is more than the 2 experts .* model\.exp"),
        (("expert_groups=8", "top_groups=1"), r"routing\.top_k=2 is more than the 1 experts"),
        (("expert_groups=3", "top_groups=2"), r"model\.experts=8 must be a multiple of routing\.expert_groups=3"),
        (("mode=hash", "expert_groups=3", "top_k=3"), r"model\.experts=8 must be a multiple of .*expert_groups=3"),
        (("mode=hash", "expert_groups=4", "top_k=4", "grow=2"), r"stages\[1\]\.grow\.experts=2 must be a multiple of"),
        (
            ("mode=hierarchical", "expert_groups=3"),
            r"model\.experts=8 must be a multiple of 3 group\(s\) of at least 2",
        ),
        (
            ("mode=hierarchical", "grow=1"),
            r"stages\[1\]\.grow\.experts=1 must be a multiple of 1 group\(s\) of at least 2",
        ),
        (("mode=hierarchical", "grow=5"), r"stages\[1\]\.grow\.experts=5 must be a multiple of 2 group\(s\)"),
        (("mode=hierarchical", "experts=[8, 9]"), r"model\.experts=9 must be a multiple of 2 group\(s\)"),
        (("mode=hierarchical", "grow=1", "method=static_moe"), r"model\.experts=9 must be"),
    ],
)
def test_groups_that_cannot_be_are_refused(
    overrides: tuple[str, ...], message: str, make_run: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ConfigError, match=message):
        stage_specs(make_run(*of_run(overrides)))


@pytest.mark.parametrize(
    "overrides",
    [
        ("expert_groups=4", "top_groups=2", "top_k=4"),
        ("expert_groups=8", "top_groups=2"),
        ("mode=hash", "expert_groups=4", "top_k=4", "grow=4"),
        ("mode=hierarchical", "expert_groups=4", "grow=2"),
        ("mode=hierarchical", "grow=3"),
        ("mode=hierarchical", "grow=2", "method=static_moe"),
        ("mode=hierarchical", "top_k=9", "top_groups=3", "expert_groups=3", "experts=9"),
    ],
)
def test_groups_that_are_taken_can_be_built(overrides: tuple[str, ...], make_run: Callable[..., RunConfig]) -> None:
    config = make_run(*of_run(overrides))
    made = None
    for spec in stage_specs(config):
        made = spec.architecture(made, 61, 0)
        with torch.device("meta"):
            LanguageModel(made)


def of_run(overrides: tuple[str, ...]) -> list[str]:
    """Overrides of a run whose layers have eight experts, and that does not grow unless it is said."""
    sections = {"grow": "stage_defaults.grow.experts", "method": "method", "experts": "model.experts"}
    pairs = {"experts": "8", "grow": "0"} | dict(one.split("=", 1) for one in overrides)
    return [f"{sections.get(key, f'routing.{key}')}={value}" for key, value in pairs.items()]
