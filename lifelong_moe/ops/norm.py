"""Root-mean-square normalization, in half the passes over memory that PyTorch takes on a CPU.

Legend: D model width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        # One pass; `x.square().mean()` would first write a tensor of x's size.
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        # Not x * scale: to multiply again is cheaper than to keep it.
        ctx.save_for_backward(x, weight_D, scale)
        return (x * scale).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_D, scale = ctx.saved_tensors
        unit = x * scale
        product = grad * unit
        grad_weight_D = product.flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight_D, None
        # d(unit) = scale * (g - unit * mean(g * unit)) with g = grad * weight
        mean = (product @ weight_D).unsqueeze(-1).div_(x.shape[-1])
        return (grad * weight_D).addcmul_(unit, mean, value=-1).mul_(scale), grad_weight_D, None


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) * weight`` over the last dimension.

    Source:
        Zhang and Sennrich (arXiv:1910.07467), eq. 4. The same as ``nn.RMSNorm`` in value and gradients.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., D)``."""
        if x.device.type == "cpu" and x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.float64):
            return _RMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
