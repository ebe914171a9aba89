"""A process goes on with its own random numbers; ranks for real are in tests/distributed."""

from __future__ import annotations

import pytest
import torch

from lifelong_moe.training.loop import random_state
from lifelong_moe.training.loop.random_state import random_states, restore_random_state, seed_rank

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def _leave_no_trace() -> None:
    torch.manual_seed(0)


def test_numbers_go_on() -> None:
    torch.manual_seed(3)
    torch.rand(5)
    states = random_states(CPU)
    expected = torch.rand(4)
    torch.manual_seed(8)
    restore_random_state(states, CPU, seed=0)
    assert [list(state) for state in states] == [["cpu"]] and torch.equal(torch.rand(4), expected)


def test_ranks_draw_other_numbers() -> None:
    drawn = []
    for rank in range(3):
        seed_rank(7, rank)
        drawn.append(torch.rand(4).tolist())
    torch.manual_seed(7)
    assert drawn[0] == torch.rand(4).tolist() and drawn[0] != drawn[1] != drawn[2] != drawn[0]


def test_the_generator_of_a_gpu_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {1: torch.tensor([5, 6], dtype=torch.uint8)}  # in place of a GPU's generator
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: held[device.index].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: held.update({device.index: state}))
    states = random_states(CUDA)
    held[1] = torch.tensor([0, 0], dtype=torch.uint8)
    restore_random_state(states, CUDA, seed=0)
    assert held[1].tolist() == [5, 6]
    assert sorted(states[0]) == ["cpu", "cuda"]
    held[1] = torch.tensor([9, 9], dtype=torch.uint8)
    restore_random_state([{"cpu": states[0]["cpu"]}], CUDA, seed=0)  # of a checkpoint that was made on the CPU
    assert held[1].tolist() == [9, 9]
    restore_random_state(states, CPU, seed=0)  # and the other way round
    assert held[1].tolist() == [9, 9]


def test_a_rank_that_was_not_there_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    states = random_states(CPU)
    monkeypatch.setattr(random_state.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(random_state.dist, "get_rank", lambda: 1)
    restore_random_state(states, CPU, seed=11)
    found = torch.rand(4)
    seed_rank(11, 1)
    assert torch.equal(found, torch.rand(4))
