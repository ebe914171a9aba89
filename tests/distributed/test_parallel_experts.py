"""Rows that travel to experts and back, against all experts at hand: outputs and all gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lifelong_moe.ops import collectives
from lifelong_moe.ops.collectives import ExpertPlacement, moved_blocks, parallel_experts
from tests.forked import run_forked
from tests.pretended_gpu import plain, pretended, pretended_gpu

D = 3
GENERATIONS = range(4), range(4, 6), range(6, 10)
E = 10


def apart(rows_ND: Tensor, counts: Sequence[int], matrices: Sequence[Tensor]) -> Tensor:
    """The readable reference: one expert after the other."""
    parts = zip(rows_ND.split([*counts]), matrices, strict=True)
    return torch.cat([(part_ND @ matrix).relu() for part_ND, matrix in parts])


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize(
    "counts",
    [
        [[3, 0, 2, 1, 4, 0, 0, 5, 1, 2], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]],
        [[0] * 10, [0, 0, 0, 0, 7, 3, 0, 0, 0, 0]],  # a rank without rows
        [[5, 0, 4, 0, 2, 0, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]],  # a rank that no rows come to
        [[0] * 10, [0] * 10],
    ],
)
def test_rows_come_back_from_their_experts(tmp_path: Path, counts: list[list[int]], first: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weights_EDD = torch.randn(E, D, D, dtype=torch.float64, generator=generator)
    rows = [torch.randn(sum(one), D, dtype=torch.float64, generator=generator) for one in counts]
    upstream = [torch.randn(sum(one), D, dtype=torch.float64, generator=generator) for one in counts]

    def work(rank: int) -> None:
        here = [i for generation in GENERATIONS for i in generation[rank::2]]
        mine_LDD = weights_EDD[here].requires_grad_()
        x_ND, counts_E = rows[rank].clone().requires_grad_(), torch.tensor(counts[rank])

        def experts(rows_ND: Tensor, counts_L: Tensor) -> Tensor:
            # From the first on and around, as some kernels want them.
            places = [(first + i) % len(here) for i in range(len(here))]
            return apart(rows_ND, counts_L[places].tolist(), [mine_LDD[i] for i in places])

        placement = ExpertPlacement.of(GENERATIONS, dist.group.WORLD, torch.device("cpu"))  # type: ignore[arg-type]
        out_ND = parallel_experts(x_ND, counts_E, placement, experts, first)
        out_ND.backward(upstream[rank])
        all_EDD, all_x = weights_EDD.clone().requires_grad_(), [one.clone().requires_grad_() for one in rows]
        expected = [apart(x, counts[r], list(all_EDD)) for r, x in enumerate(all_x)]
        for one, gradient in zip(expected, upstream, strict=True):
            one.backward(gradient)
        assert all_EDD.grad is not None
        # Within each rank: an error in any of them is the test's.
        torch.testing.assert_close(out_ND, expected[rank], rtol=0, atol=1e-12)
        torch.testing.assert_close(x_ND.grad, all_x[rank].grad, rtol=0, atol=1e-12)
        torch.testing.assert_close(mine_LDD.grad, all_EDD.grad[here], rtol=0, atol=1e-12)

    run_forked(2, work, tmp_path)


@pytest.mark.usefixtures("forked")
def test_all_ranks_go_back_though_one_has_nothing_that_trains(tmp_path: Path) -> None:
    def work(rank: int) -> list[float]:
        x_ND = torch.ones(4, D, requires_grad=rank == 0)
        placement = ExpertPlacement.of([range(4)], dist.group.WORLD, torch.device("cpu"))  # type: ignore[arg-type]
        out_ND = parallel_experts(x_ND, torch.ones(4, dtype=torch.int64), placement, lambda rows_ND, _: 2 * rows_ND)
        out_ND.sum().backward()
        return x_ND.grad.flatten().tolist() if x_ND.grad is not None else []

    assert run_forked(2, work, tmp_path) == [2.0] * 4 * D


def test_experts_are_striped_by_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two:
        def size(self) -> int:
            return 2

    placement = ExpertPlacement.of(GENERATIONS, Two(), torch.device("cpu"))  # type: ignore[arg-type]
    assert placement.experts_RL.tolist() == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]


def test_the_host_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # A rank alone, whose rows come back as they went.
    monkeypatch.setattr(dist, "all_to_all_single", lambda got, sent, group: got.copy_(sent))
    monkeypatch.setattr(collectives, "all_to_all_single_autograd", lambda rows_ND, *_: rows_ND)
    with pretended_gpu() as log:
        experts_RL = pretended(torch.tensor([[0, 2, 1]]))
        x_ND = pretended(torch.ones(6, D)).requires_grad_()
        counts_E = pretended(torch.tensor([3, 1, 2]))
        placement = collectives.ExpertPlacement(None, experts_RL)  # type: ignore[arg-type]
        out_ND = parallel_experts(x_ND, counts_E, placement, lambda rows_ND, _: 2 * rows_ND, first=1)
        out_ND.sum().backward()
        assert log.num_waits == 1, log.waits
    assert x_ND.grad is not None and bool((plain(x_ND.grad) == 2).all())


def test_blocks_of_rows_move_as_wholes() -> None:
    # Blocks a a, (nothing), c c c, d: to d, c, a and nothing.
    order_N = moved_blocks(torch.tensor([2, 0, 3, 1]), torch.tensor([3, 2, 0, 1]), 6)
    assert order_N.tolist() == [5, 2, 3, 4, 0, 1]
