"""The losses of 1991, by their gradients and against torch's mixture distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from lifelong_moe.ops.jacobs import competitive_loss, cooperative_loss, expected_loss

T, E, D = 6, 4, 3


def drawn(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((T, E), (T, E, D), (T, D))
    logits, outputs, target = (torch.randn(size, generator=generator) * scale for size in sizes)
    return logits, outputs.requires_grad_(), target


def test_the_competitive_gradient_is_the_posterior_times_the_error() -> None:
    logits, outputs, target = drawn()
    competitive_loss(logits, outputs, target).backward()
    error = target.unsqueeze(1) - outputs.detach()
    posterior = (logits.log_softmax(1) - error.square().sum(2) / 2).softmax(1)
    assert outputs.grad is not None
    torch.testing.assert_close(outputs.grad * T, -posterior.unsqueeze(2) * error, atol=2e-7, rtol=1e-6)


def test_it_is_the_likelihood_of_a_mixture_up_to_a_constant() -> None:
    logits, outputs, target = drawn()
    mixture = MixtureSameFamily(Categorical(logits=logits), Independent(Normal(outputs, 1.0), 1))
    constant = D / 2 * math.log(2 * math.pi)
    torch.testing.assert_close(competitive_loss(logits, outputs, target), -mixture.log_prob(target).mean() - constant)


def test_one_expert_is_half_the_squared_error() -> None:
    logits, outputs, target = drawn()
    one = outputs[:, :1].detach()
    error = (target - one[:, 0]).square().sum(1).mean()
    torch.testing.assert_close(competitive_loss(logits[:, :1], one, target), error / 2)
    torch.testing.assert_close(cooperative_loss(logits[:, :1], one, target), error)
    torch.testing.assert_close(expected_loss(logits[:, :1], one, target), error)


def test_far_off_it_stays_finite() -> None:
    logits, outputs, target = drawn(1000.0)
    loss = competitive_loss(logits, outputs, target)
    loss.backward()
    assert outputs.grad is not None and bool(loss.isfinite()) and bool(outputs.grad.isfinite().all())


def test_by_hand() -> None:
    logits, outputs, target = torch.zeros(1, 2), torch.tensor([[[1.0], [3.0]]]), torch.tensor([[2.0]])
    assert float(cooperative_loss(logits, outputs, target)) == 0.0  # the mean is right
    assert float(expected_loss(logits, outputs, target)) == 1.0  # nobody alone is
    assert float(competitive_loss(logits, outputs, target)) == 0.5


def test_competing_experts_divide_the_work() -> None:
    """Two lines crossing: a gate and two linear experts find them; cooperating ones settle for worse."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(400, 1, generator=generator) * 2 - 1
    target = x.abs()
    features = torch.cat([x, torch.ones_like(x)], dim=1)
    gate, experts = torch.randn(2, 2, generator=generator) * 0.1, torch.randn(2, 2, generator=generator) * 0.5
    parameters = [gate.requires_grad_(), experts.requires_grad_()]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        outputs = (features @ experts.t()).unsqueeze(2)
        competitive_loss(features @ gate.t(), outputs * 10, target * 10).backward()
        optimizer.step()
    chosen = (features @ gate.t()).argmax(1)
    best = (features @ experts.t()).gather(1, chosen.unsqueeze(1))
    assert float((best - target).square().mean().detach()) < 1e-3
    assert bool((chosen[x[:, 0] > 0.1] == chosen[x[:, 0].argmax()]).all()) and len(chosen.unique()) == 2
