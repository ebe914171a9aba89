"""Sorting, experts on slices and summing back against one token at a time: outputs and all gradients."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lifelong_moe.config.growth import FrozenWeights
from lifelong_moe.config.model import Activation, ExpertsImplementation
from lifelong_moe.model.experts import ExpertBanks
from lifelong_moe.model.int8 import hold_frozen, round_frozen
from lifelong_moe.ops.dispatch import inverse_permutation, mixture_readable, sort_by_expert
from lifelong_moe.ops.expert_mlp import slices
from lifelong_moe.routing.base import Routing

D, F = 8, 4
"""``grouped_mm`` wants rows of 16 bytes."""
IMPLEMENTATIONS = [
    (ExpertsImplementation.readable, torch.float64),
    (ExpertsImplementation.slices, torch.float64),
    (ExpertsImplementation.slices, torch.float32),
    (ExpertsImplementation.grouped_mm, torch.float32),
]
ATOL = {torch.float64: 1e-11, torch.float32: 2e-4}
"""Against values of up to some hundreds: weights are of size 1 here, so that no error hides."""


def make_banks(
    num_experts: int,
    num_frozen: int,
    seed: int,
    activation: Activation = Activation.swiglu,
    newest: bool = True,
    trained: tuple[int, ...] | None = None,
    expert_width: int = F,
) -> ExpertBanks:
    """Of so many frozen experts, which come first, or with ``newest=False`` last; or of one a generation, all frozen
    but ``trained``."""
    banks = ExpertBanks(D, expert_width, activation)
    if trained is None:
        sizes = [num_frozen, num_experts - num_frozen]
        for size in sizes if newest else reversed(sizes):
            banks.add(size)
        banks.freeze(1 if newest else 0)
    else:
        for expert in range(num_experts):
            banks.add(1)
            banks.born[expert].requires_grad_(expert in trained)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for expert in banks.matrices():
            for matrix in expert:
                matrix.copy_(torch.randn(matrix.shape, generator=generator))
    return banks


def check_parity(ids_TK: Tensor, num_experts: int, num_frozen: int, seed: int, **options: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, top_k = ids_TK.shape
    x0 = torch.randn(tokens, D, generator=generator)
    w0 = torch.rand(tokens, top_k, generator=generator)
    upstream = torch.randn(tokens, D, generator=generator)

    def computed(how: ExpertsImplementation | None, dtype: torch.dtype) -> list[Tensor | None]:
        banks = make_banks(num_experts, num_frozen, seed, **options).to(dtype)
        x, w = x0.to(dtype, copy=True).requires_grad_(), w0.to(dtype, copy=True).requires_grad_()
        if how is None:
            out = mixture_readable(x, ids_TK, w, banks.networks())
        else:
            banks.implementation = how
            routing = Routing(ids_TK, w, num_experts)
            first = banks.sorted_from(x)
            out = routing.combine(banks(routing.dispatch(x, first), routing.counts_E), first)
        (out * upstream).sum().backward()
        return [out.detach(), x.grad, w.grad, *(p.grad for p in banks.parameters())]

    expected = computed(None, torch.float64)
    parameters = make_banks(num_experts, num_frozen, seed, **options).parameters()
    active = [True] * 3 + [p.requires_grad if p.numel() else None for p in parameters]
    for how, dtype in IMPLEMENTATIONS:
        for fast, slow, trains in zip(computed(how, dtype), expected, active, strict=True):
            if trains is None:
                continue  # of a generation without experts
            if not trains:
                assert fast is None and slow is None
                continue
            assert fast is not None  # an active expert without tokens has a zero gradient, not an absent one
            slow = torch.zeros_like(fast) if slow is None else slow
            torch.testing.assert_close(fast, slow.to(dtype), atol=ATOL[dtype], rtol=1e-5)


@st.composite
def assignments(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Distinct experts for each token, from a range that may leave most experts empty."""
    num_experts = draw(st.integers(1, 7))
    top_k = draw(st.integers(1, min(3, num_experts)))
    tokens = draw(st.integers(1, 12))
    used = draw(st.integers(top_k, num_experts))
    row = st.permutations(range(used)).map(lambda order: order[:top_k])
    ids = draw(st.lists(row, min_size=tokens, max_size=tokens))
    return torch.tensor(ids), num_experts, draw(st.integers(0, num_experts))


@given(assignments(), st.integers(0, 1000))
def test_fast_equals_readable(case: tuple[Tensor, int, int], seed: int) -> None:
    check_parity(*case, seed)


@pytest.mark.parametrize("expert", [0, 2, 4])
@pytest.mark.parametrize("frozen", [0, 3])
@pytest.mark.parametrize("newest", [True, False])
def test_all_tokens_to_one_expert(expert: int, frozen: int, newest: bool) -> None:
    check_parity(torch.full((9, 1), expert), num_experts=5, num_frozen=frozen, seed=0, newest=newest)


@pytest.mark.parametrize("activation", list(Activation))
def test_every_activation(activation: Activation) -> None:
    ids = torch.tensor([[0, 2], [2, 1], [2, 0], [1, 0], [0, 4]])
    check_parity(ids, num_experts=5, num_frozen=2, seed=0, activation=activation)


@pytest.mark.parametrize("trained", [(0, 4), (1, 2), (2,), (0, 2, 4)])
def test_wherever_experts_train(trained: tuple[int, ...]) -> None:
    ids = torch.tensor([[0, 2], [2, 1], [2, 0], [1, 0], [0, 4]])
    check_parity(ids, num_experts=5, num_frozen=0, seed=0, trained=trained)


def test_grouped_is_not_chosen_where_it_would_be_wrong() -> None:
    x = torch.randn(4, D)
    apart, together = (make_banks(4, 0, seed=0, trained=trained) for trained in ((0, 3), (1, 2)))
    for banks in (apart, together):
        banks.implementation = ExpertsImplementation.grouped_mm
    assert apart.chosen(x) == ExpertsImplementation.slices and apart.sorted_from(x) == 0
    assert together.chosen(x) == ExpertsImplementation.grouped_mm and together.sorted_from(x) == 1
    hold_frozen(together, FrozenWeights.int8)
    assert together.chosen(x) == ExpertsImplementation.slices


@pytest.mark.parametrize(
    ("capability", "by_itself", "asked_for"),
    [((8, 0), False, True), ((9, 0), True, True), ((10, 0), False, False), ((12, 0), False, False)],
)
def test_grouped_is_not_chosen_on_gpus_where_experts_without_rows_get_gradients_of_garbage(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], by_itself: bool, asked_for: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    rows: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    banks = ExpertBanks(8, 8)
    banks.add(4)
    for how, grouped in ((ExpertsImplementation.auto, by_itself), (ExpertsImplementation.grouped_mm, asked_for)):
        banks.implementation = how
        expected = ExpertsImplementation.grouped_mm if grouped else ExpertsImplementation.slices
        assert banks.chosen(rows) == expected


@pytest.mark.parametrize("rows_learn", [True, False])
def test_experts_held_in_eight_bits(rows_learn: bool) -> None:
    banks, found = make_banks(5, 3, seed=0), []
    hold_frozen(banks, FrozenWeights.int8)
    rows = torch.randn(8, D, generator=torch.Generator().manual_seed(0))
    for how in (ExpertsImplementation.readable, ExpertsImplementation.slices):
        banks.implementation = how
        banks.zero_grad()
        x = rows.clone().requires_grad_(rows_learn)
        out = banks(x, torch.tensor([3, 0, 2, 3, 0]))  # of both banks one expert gets nothing
        out.square().sum().backward()
        grads = [p.grad for p in banks.parameters() if p.requires_grad]
        found.append([out.detach(), *([x.grad] if rows_learn else []), *grads])
    assert len(found[1]) == 1 + rows_learn + 2 and all(tensor is not None for tensor in found[1])
    for fast, slow in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-5)


def test_active_experts_that_a_phase_leaves_alone_get_no_gradients() -> None:
    banks = make_banks(3, 1, seed=0)
    banks.implementation = ExpertsImplementation.grouped_mm
    for parameter in banks.parameters():
        parameter.requires_grad_(False)
    rows = torch.randn(6, D, requires_grad=True)
    banks(rows, torch.tensor([1, 2, 3])).sum().backward()
    assert rows.grad is not None and all(p.grad is None for p in banks.parameters())


@pytest.mark.parametrize("wanted", [wanted for wanted in product((True, False), repeat=5) if any(wanted)])
def test_whatever_gradients_are_wanted(wanted: tuple[bool, ...]) -> None:
    """Of the rows, and of each matrix of two generations: those that are wanted, and no others."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator).double() for shape in ((5, D), *((1, 2 * F, D), (1, D, F)) * 2)]
    upstream = torch.randn(5, D, generator=generator).double()
    found = []
    for fast in (True, False):
        rows, *weights = leaves = [
            one.clone().requires_grad_(is_wanted) for one, is_wanted in zip(drawn, wanted, strict=True)
        ]
        if fast:
            out = slices(rows, [2, 3], weights, "swiglu")
        else:
            parts = []
            for x, (into, out_of) in zip(rows.split([2, 3]), (weights[:2], weights[2:]), strict=True):
                gate, up = (x @ into[0].t()).chunk(2, dim=1)
                parts.append((gate * gate.sigmoid() * up) @ out_of[0].t())
            out = torch.cat(parts)
        (out * upstream).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for ours, theirs, is_wanted in zip(*found, wanted, strict=True):
        assert (ours is not None) == (theirs is not None) == is_wanted
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_experts_in_one_buffer_stay_themselves() -> None:
    banks, rows = make_banks(4, 2, seed=0), torch.randn(6, D)
    before = {name: p.clone() for name, p in banks.named_parameters()}
    parameters, counts = dict(banks.named_parameters()), torch.tensor([1, 2, 3, 0])
    banks.implementation = ExpertsImplementation.grouped_mm
    apart, pointers = banks(rows, counts), [p.data_ptr() for p in banks.parameters()]
    assert pointers == [p.data_ptr() for p in banks.parameters()]  # who gathers parameters still knows their memory
    banks.join()
    assert torch.equal(banks(rows, counts), apart)
    moved = {p.untyped_storage().data_ptr() for p in banks.parameters()}
    assert len(moved) == 2  # one buffer a matrix
    assert all(p is parameters[n] and torch.equal(p, before[n]) for n, p in banks.named_parameters())
    with torch.no_grad():  # what an optimizer does in place is seen
        banks.matrices()[3][1].add_(1.0)
        assert not torch.equal(banks(rows, counts.roll(1)), banks(rows, counts))
    pointers = [p.data_ptr() for p in banks.parameters()]
    banks.join()
    assert pointers == [p.data_ptr() for p in banks.parameters()]  # moved once


@pytest.mark.parametrize("trained", [(0,), (2, 3), (4,)])
def test_experts_that_train_in_float32_have_places_among_those_that_are_held_in_bfloat16(
    trained: tuple[int, ...],
) -> None:
    rows, counts, found = (
        torch.randn(12, D, generator=torch.Generator().manual_seed(5)),
        torch.tensor([2, 1, 4, 0, 5]),
        [],
    )
    upstream = torch.randn(12, D, generator=torch.Generator().manual_seed(6))
    for rounds, joins in ((False, False), (True, False), (True, True)):
        banks = make_banks(5, 0, seed=0, trained=trained, expert_width=D)  # rows of 16 bytes in bfloat16, too
        banks.implementation = ExpertsImplementation.grouped_mm
        if rounds:
            round_frozen(banks)
        if joins:
            banks.join()
        x = rows.clone().requires_grad_()
        pointers = [p.data_ptr() for p in banks.parameters()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = banks(x, counts)
        out.backward(upstream.to(out.dtype))
        assert pointers == [p.data_ptr() for p in banks.parameters()]
        grads = [p.grad for p in banks.parameters() if p.requires_grad]
        assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
        found.append([out.detach(), x.grad, *grads])
        held = {p.untyped_storage().data_ptr() for p in banks.parameters() if not p.requires_grad}
        assert len(held) == (2 if joins else 2 * (5 - len(trained)))
        with torch.no_grad():  # an optimizer's step is seen by the next pass
            banks.born[trained[0]].down.add_(1.0)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found[-1].append(banks(x, counts))
            found[-1].append(banks(x, counts.roll(1)))  # without autocast, in float32
    for others in found[1:]:
        # Rounded once or in each pass: the same bits. Without autocast frozen ones are rounded, and were not.
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(others[:-1], found[0][:-1], strict=True))
    assert torch.equal(found[1][-1], found[2][-1])
    torch.testing.assert_close(found[1][-1], found[0][-1], atol=2.0, rtol=0.02)


def test_gradients_are_those_of_finite_differences() -> None:
    banks = make_banks(4, 0, seed=3).double()
    ids = torch.tensor([[0, 2], [2, 1], [2, 0], [1, 0], [0, 1]])
    x = torch.randn(5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    w = torch.rand(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def mixture(x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        routing = Routing(ids, weights_TK, 4)
        return routing.combine(banks(routing.dispatch(x_TD), routing.counts_E))

    assert torch.autograd.gradcheck(mixture, (x, w))


def test_sorting_by_hand() -> None:
    order, counts = sort_by_expert(torch.tensor([2, 0, 2, 0, 3]), 5)
    assert order.tolist() == [1, 3, 0, 2, 4]  # by expert, then by position
    assert counts.tolist() == [2, 0, 2, 1, 0]
    assert inverse_permutation(order).tolist() == [2, 0, 3, 1, 4]


def test_weighted_sum_by_hand() -> None:
    routing = Routing(torch.tensor([[1, 0], [0, 1]]), torch.tensor([[0.25, 0.75], [1.0, 0.5]]), 2)
    rows = routing.dispatch(torch.tensor([[1.0], [10.0]]))
    assert rows.flatten().tolist() == [1, 10, 1, 10]  # expert 0: both tokens; expert 1: both tokens
    assert routing.counts_E.tolist() == [2, 2]
    doubled = rows * torch.tensor([[2.0], [2.0], [3.0], [3.0]])
    assert routing.combine(doubled).flatten().tolist() == [0.25 * 3 + 0.75 * 2, 1.0 * 20 + 0.5 * 30]


@pytest.mark.parametrize("ragged", [False, True])
def test_a_routing_sorts_once_and_only_if_it_is_asked(monkeypatch: pytest.MonkeyPatch, ragged: bool) -> None:
    sorts: list[int] = []

    def counted(ids_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        sorts.append(len(ids_N))
        return sort_by_expert(ids_N, num_experts)

    monkeypatch.setattr("lifelong_moe.ops.dispatch.sort_by_expert", counted)
    ids = torch.tensor([[0, 2], [2, 1], [2, -1 if ragged else 0]])
    x, weights = torch.tensor([[1.0], [2.0], [4.0]]), torch.ones(3, 2)
    routing = Routing(ids, weights, 3, ragged=ragged)
    assert sorts == []
    assert routing.counts_E.tolist() == [1 if ragged else 2, 1, 3]
    # As where experts 1 and 2 train: theirs first, then around to expert 0.
    rows = routing.dispatch(x, 1)
    assert rows.flatten().tolist() == [2.0, 1.0, 2.0, 4.0, 1.0] + ([] if ragged else [4.0])
    for first in (0, 1, 2):
        rows = routing.dispatch(x, first)
        assert routing.combine(rows, first).flatten().tolist() == [2.0, 4.0, 4.0 if ragged else 8.0]
    assert sorts == [5 if ragged else 6]
