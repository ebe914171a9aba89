"""P2: the mixture layer beside a dense feed-forward network of equal active FLOPs, forward and backward."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lifelong_moe.model.feedforward import FeedForward
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.routing.base import RoutingContext
from lifelong_moe.training.loop.execution import keep_freed_memory
from tests.benchmarks.performance.clock import paired
from tests.benchmarks.performance.goals import judged
from tests.benchmarks.performance.subjects import DEVICE, DTYPE, Size

SIZES = (
    Size(experts=8),
    Size(experts=32),
    Size(experts=8, width=512, expert_width=1024),
    Size(experts=32, width=512, expert_width=1024),
)


GPU = {"width": 2048, "expert_width": 768, "top_k": 8, "context": 2048, "sequences": 8}
GPU_SIZES = (Size(experts=16, **GPU), Size(experts=32, **GPU), Size(experts=128, **GPU))
MOST = 1.30 if DEVICE == "cuda" else 1.10
LEAST_TFLOPS = 250


def backward(module: nn.Module, run: Callable[[Tensor], Tensor], x_TD: Tensor, grad_TD: Tensor) -> Callable[[], None]:
    """One forward and backward pass, all gradients included."""

    def action() -> None:
        x_TD.grad = None
        module.zero_grad()
        run(x_TD).backward(grad_TD)

    return action


def layer_over_dense(size: Size, rounds: int) -> dict[str, Any]:
    """The layer's time over that of a network as wide as the experts that a token uses together."""
    model: LanguageModel = replace(size, layers=1).model().to(DEVICE, DTYPE).train()
    layer = next(model.moe_layers())
    dense = FeedForward(size.width, size.top_k * size.expert_width)
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.02)
    dense.to(DEVICE, DTYPE)
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(size.tokens, size.width, generator=generator).to(DEVICE, DTYPE).requires_grad_()
    grad_TD = torch.randn(size.tokens, size.width, generator=generator).to(DEVICE, DTYPE)
    ids_T = torch.zeros(size.tokens, dtype=torch.int64, device=DEVICE)
    context = RoutingContext(ids_T, torch.ones_like(ids_T, dtype=torch.bool), ids_T, num_sequences=size.sequences)

    def routed(x: Tensor) -> Tensor:
        out, routing = layer(x, context)
        for loss in routing.losses.values():  # its gradient goes through the router as in training
            out = out + 0.0 * loss.value
        return out

    return paired(backward(layer, routed, x_TD, grad_TD), backward(dense, dense, x_TD, grad_TD), rounds).json()


def measure(rounds: int = 15) -> dict[str, Any]:
    """Each size of the reference table."""
    torch.set_num_threads(1)
    keep_freed_memory()
    goals, detail = {}, {}
    for size in GPU_SIZES if DEVICE == "cuda" else SIZES:
        name = f"d {size.width} E {size.experts}"
        found = layer_over_dense(size, rounds)
        detail[name] = found
        if size.experts <= 32:
            spread = (found[part] for part in ("ratio", "low", "high"))
            goals[f"P2 layer over dense, {name}"] = judged(*spread, f"<= {MOST}", "x")
        else:
            flops = 3 * 2 * size.tokens * size.top_k * 3 * size.width * size.expert_width
            tflops = flops / found["seconds"][0] / 1e12
            goals[f"P5 layer, {name}"] = judged(tflops, tflops, tflops, f">= {LEAST_TFLOPS}", "TFLOP/s")
    return {"goals": goals, "detail": detail}


if __name__ == "__main__":
    print(json.dumps(measure()))
