"""Whole training runs on the fast paths and on the readable ones, from identical weights: the same path in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong_moe.config.model import ExpertsImplementation
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.ops.dispatch import mixture_readable
from lifelong_moe.ops.losses import TeacherTargets, distillation_loss, linear_losses
from lifelong_moe.retention.teacher import make_teacher
from lifelong_moe.routing.base import Routing

Make = Callable[..., LanguageModel]
Batch = Callable[..., dict[str, Tensor]]
STEPS = 12
TEMPERATURE = 2.0


def readable_forward(model: LanguageModel) -> None:
    """Let every layer take one token at a time."""
    for layer in model.moe_layers():

        def forward(x_TD: Tensor, context: object, layer: torch.nn.Module = layer) -> tuple[Tensor, Routing]:
            routing = layer.router(x_TD, context)
            experts = layer.banks.networks()
            return mixture_readable(x_TD, routing.expert_ids_TK, routing.weights_TK.to(x_TD.dtype), experts), routing

        layer.forward = forward  # type: ignore[method-assign, assignment]


def objective(model: LanguageModel, teacher: LanguageModel, batch: dict[str, Tensor], fast: bool) -> Tensor:
    """Next tokens, balance, and distillation on the replayed half."""
    output, target_T = model(TokenBatch(batch["token_ids"])), batch["target_ids"].flatten()
    hidden_TD, rows = output.hidden_BSD.flatten(0, 1), batch["replayed"].nonzero().flatten()
    with torch.no_grad():
        taught_ND = teacher(TokenBatch(batch["token_ids"][rows])).hidden_BSD.flatten(0, 1)
    length = batch["token_ids"].shape[1]
    tokens_N = (rows.unsqueeze(1) * length + torch.arange(length)).flatten()
    balance = sum(r.losses["balance"].value for r in output.routings)
    if fast:
        lesson = TeacherTargets(tokens_N, taught_ND, teacher.head.weight, TEMPERATURE, weight=0.5)
        return linear_losses(hidden_TD, model.head.weight, target_T, lesson, chunk=7)[0] + 0.01 * balance
    student_TV, taught_TV = hidden_TD @ model.head.weight.t(), taught_ND @ teacher.head.weight.t()
    kl = distillation_loss(student_TV[tokens_N], taught_TV, TEMPERATURE)
    return F.cross_entropy(student_TV, target_T) + 0.5 * kl + 0.01 * balance


def trajectory(
    make_model: Make, make_batch: Batch, dtype: torch.dtype, steps: int, how: ExpertsImplementation | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Losses of so many AdamW steps, and the weights or, of one step, gradients; None is one token at a time."""
    model = make_model("learned", (2, 2), model={"init_std": 0.1}).to(dtype)
    teacher = make_teacher(make_model("learned", (2,), seed=1, model={"init_std": 0.1}).to(dtype), [])
    for layer in model.moe_layers():
        layer.banks.implementation = how or ExpertsImplementation.readable
    if how is None:
        readable_forward(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for step in range(steps):
        loss = objective(model, teacher, make_batch(seed=step % 3), fast=how is not None)
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    last = [p.grad for p in trained if p.grad is not None] if steps == 1 else [p.detach() for p in trained]
    return losses, last


def test_a_run_takes_the_same_path(make_model: Make, make_batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    # Routers choose in float32 by contract; here they choose in float64 too, so that nothing rounds differently.
    monkeypatch.setattr(Tensor, "float", lambda x: x)
    readable = trajectory(make_model, make_batch, torch.float64, STEPS, None)
    fast = trajectory(make_model, make_batch, torch.float64, STEPS, ExpertsImplementation.slices)
    assert readable[0][-1] < 0.95 * readable[0][0]  # it learns
    for ours, theirs in zip(fast[0] + fast[1], readable[0] + readable[1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("how", [ExpertsImplementation.slices, ExpertsImplementation.grouped_mm])
def test_a_step_is_the_same_within_rounding(make_model: Make, make_batch: Batch, how: ExpertsImplementation) -> None:
    readable = trajectory(make_model, make_batch, torch.float32, 1, None)
    fast = trajectory(make_model, make_batch, torch.float32, 1, how)
    assert float((fast[0][0] - readable[0][0]).abs() / readable[0][0]) < 1e-6
    norm = torch.cat([g.flatten() for g in readable[1]]).norm()
    for ours, theirs in zip(fast[1], readable[1], strict=True):
        assert float((ours - theirs).norm() / norm) < 1e-5
