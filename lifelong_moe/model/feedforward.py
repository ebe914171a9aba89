"""Feed-forward networks: experts, shared experts and dense layers.

Legend: N rows, D model width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_moe.config.model import Activation
from lifelong_moe.ops.few_rows import as_rows

FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.swiglu: F.silu,
    Activation.geglu: lambda x: F.gelu(x, approximate="tanh"),
    Activation.gelu: F.gelu,
    Activation.relu: F.relu,
}


def input_matrix(activation: Activation) -> str:
    """Name of the input matrix; with a gated activation, it holds the gate and up projections."""
    return "gate_up" if activation.is_gated else "up"


def feed_forward(
    x_ND: Tensor, *, into_GD: Tensor, down_DF: Tensor, activation: Activation, dropout: float = 0.0
) -> Tensor:
    """``(act(x G^T) * (x U^T)) W^T`` where the activation is gated, ``act(x U^T) W^T`` where not. No biases.

    Args:
        x_ND: ``(N, D)``.
        into_GD: ``(2·F, D)``, or ``(F, D)`` where the activation is not gated.
        down_DF: ``(D, F)``.
        activation: Between both.
        dropout: Share of hidden units that are dropped.

    Source:
        GLU variants (arXiv:2002.05202); Mixtral (arXiv:2401.04088): ``swiglu``; Grok-1's code: ``geglu`` with the tanh
        form of GELU; Switch (arXiv:2101.03961): ``relu``, not gated.
    """
    # Gate and up projections are one matrix: a small expert takes two matrix products rather than three.
    # shape: (N, G)
    act, pre_NG = FUNCTIONS[activation], F.linear(x_ND, as_rows(into_GD, x_ND))
    if activation.is_gated:
        gate_NF, up_NF = pre_NG.chunk(2, dim=-1)
        hidden_NF = act(gate_NF) * up_NF
    else:
        hidden_NF = act(pre_NG)
    if dropout:
        hidden_NF = F.dropout(hidden_NF, dropout)
    return F.linear(hidden_NF, as_rows(down_DF, hidden_NF))


class FeedForward(nn.Module):
    """:func:`feed_forward` with weights of its own."""

    def __init__(self, width: int, hidden_width: int, activation: Activation = Activation.swiglu) -> None:
        super().__init__()
        self.activation = activation
        if activation.is_gated:
            self.gate_up = nn.Parameter(torch.empty(2 * hidden_width, width))
        else:
            self.up = nn.Parameter(torch.empty(hidden_width, width))
        self.down = nn.Parameter(torch.empty(width, hidden_width))

    def forward(self, x_ND: Tensor) -> Tensor:
        """``(N, D)`` to ``(N, D)``."""
        into_GD = self.gate_up if self.activation.is_gated else self.up
        return feed_forward(x_ND, into_GD=into_GD, down_DF=self.down, activation=self.activation)
