"""The average with the weights of the beginning: of what trained and was there before, and of nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lifelong_moe.retention.average import average_with, between, moved_since, old_trainable


def test_trained_weights_move_towards_the_old_ones() -> None:
    model = nn.ModuleDict({"old": nn.Linear(2, 1), "frozen": nn.Linear(2, 1), "new": nn.Linear(2, 1)})
    model["frozen"].requires_grad_(False)
    previous = {name: torch.full_like(p, 4.0) for name, p in model.named_parameters() if not name.startswith("new")}
    start = old_trainable(model, previous)
    assert start.keys() == {"old.weight", "old.bias"}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(8.0)
    average_with(model, start, 0.25)
    assert [float(p.detach().mean()) for p in model["old"].parameters()] == [7.0, 7.0]
    assert all(float(p.detach().mean()) == 8.0 for name in ("frozen", "new") for p in model[name].parameters())


def test_halves_are_averaged_in_float32() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average_with(model, {"weight": torch.tensor([[1.0078125]], dtype=torch.bfloat16)}, 0.75)
    assert float(model.weight.detach()) == float(torch.tensor(1.005859375).bfloat16())


def test_the_way_goes_over_what_both_ends_have_and_comes_back() -> None:
    model = nn.ModuleDict({"old": nn.Linear(2, 1), "still": nn.Linear(2, 1), "new": nn.Linear(2, 1)})
    previous = {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("new")}
    previous |= {"gone": torch.ones(3), "new.weight": torch.ones(1, 7)}  # of another shape
    with torch.no_grad():
        for p in model["old"].parameters():
            p.fill_(8.0)
    for name in ("old.weight", "old.bias"):
        previous[name].fill_(4.0)
    end = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = moved_since(model, previous)
    assert start.keys() == {"old.weight", "old.bias"}
    seen = [(share, float(model["old"].bias.detach())) for share in between(model, start, (0.0, 0.25, 1.0, 0.5))]
    assert seen == [(0.0, 4.0), (0.25, 5.0), (1.0, 8.0), (0.5, 6.0)]
    assert all(torch.equal(end[name], p) for name, p in model.named_parameters())
    assert moved_since(model, {name: p.detach().clone() for name, p in model.named_parameters()}) == {}


def test_an_error_on_the_way_leaves_the_end() -> None:
    model = nn.Linear(1, 1, bias=False)
    end = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="stop"):
        for _ in (way := between(model, {"weight": end + 1}, (0.0, 1.0))):
            way.throw(RuntimeError("stop"))
    assert torch.equal(model.weight.detach(), end)
