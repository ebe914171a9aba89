"""The average with the weights of the beginning: of what trained and was there before, and of nothing else."""

from __future__ import annotations

import torch
from torch import nn

from lifelong_moe.retention.average import average_with, old_trainable


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
