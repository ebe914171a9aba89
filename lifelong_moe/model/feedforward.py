"""Feed-forward networks: an expert, a shared expert, and what a layer without a mixture has.

Legend: N rows, D model width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_moe.model.config import Activation
from lifelong_moe.ops.expert_mlp import Weight

FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.swiglu: F.silu,
    Activation.geglu: lambda x: F.gelu(x, approximate="tanh"),
    Activation.gelu: F.gelu,
    Activation.relu: F.relu,
}


class FeedForward(nn.Module):
    """``(act(x G^T) * (x U^T)) W^T`` where the activation is gated, ``act(x U^T) W^T`` where not. No biases.

    Gate and up projections are one matrix, so that a small expert is two matrix products and not three.

    Source:
        GLU variants (arXiv:2002.05202); Mixtral (arXiv:2401.04088): ``swiglu``; Grok-1's code: ``geglu`` with the tanh
        form of GELU; Switch (arXiv:2101.03961): ``relu``, not gated.
    """

    def __init__(self, width: int, hidden_width: int, activation: Activation = Activation.swiglu) -> None:
        super().__init__()
        self.act, self.is_gated = FUNCTIONS[activation], activation.is_gated
        self.dropout = 0.0
        """Share of hidden units dropped in training; set for a stage, no state."""
        if self.is_gated:
            self.gate_up = nn.Parameter(torch.empty(2 * hidden_width, width))
        else:
            self.up = nn.Parameter(torch.empty(hidden_width, width))
        self.down = nn.Parameter(torch.empty(width, hidden_width))

    @property
    def into(self) -> Tensor:
        """The matrix, or both, that inputs meet: ``(2 * hidden_width, width)`` where the activation is gated."""
        return self.gate_up if self.is_gated else self.up

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The matrix into it and the one out of it; those held in 8 bits as what makes them whole."""
        held: Any = self._modules.get("parametrizations") or {}
        names = ("gate_up" if self.is_gated else "up", "down")
        return tuple(held[name] if name in held else getattr(self, name) for name in names)

    def forward(self, x_ND: Tensor) -> Tensor:
        """``(N, D)`` to ``(N, D)``."""
        if self.is_gated:
            gate_NF, up_NF = F.linear(x_ND, self.gate_up).chunk(2, dim=-1)
            hidden_NF = self.act(gate_NF) * up_NF
        else:
            hidden_NF = self.act(F.linear(x_ND, self.up))
        if self.dropout and self.training:
            hidden_NF = F.dropout(hidden_NF, self.dropout)
        return F.linear(hidden_NF, self.down)
