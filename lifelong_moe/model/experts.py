"""Experts and the two banks they stand in.

Legend: N rows handed to experts, D model width, F expert width, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Expert(nn.Module):
    """SwiGLU feed-forward network: ``(silu(x G^T) * (x U^T)) W^T``, no biases.

    Gate and up projections are one matrix, so that a small expert is two matrix products and not three.

    Source:
        GLU variants (arXiv:2002.05202); Mixtral (arXiv:2401.04088).
    """

    def __init__(self, width: int, expert_width: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * expert_width, width))
        self.down = nn.Parameter(torch.empty(width, expert_width))

    def forward(self, x_ND: Tensor) -> Tensor:
        """``(N, D)`` to ``(N, D)``."""
        gate_NF, up_NF = F.linear(x_ND, self.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate_NF) * up_NF, self.down)


class ExpertBanks(nn.Module):
    """One layer's experts in order of birth: the *frozen* bank, then the *active* one.

    Each expert has Parameters of its own. A frozen expert's have no gradient, hence no optimizer state and no
    decay, and a step costs the same however many there are. Growing only moves the border between the banks:
    names and indices of old experts never change.
    """

    def __init__(self, width: int, expert_width: int) -> None:
        super().__init__()
        self.width, self.expert_width = width, expert_width
        self.experts = nn.ModuleList()
        self.num_frozen = 0

    def __len__(self) -> int:
        return len(self.experts)

    @property
    def frozen(self) -> list[nn.Module]:
        """The frozen bank."""
        return list(self.experts[: self.num_frozen])

    @property
    def active(self) -> list[nn.Module]:
        """The active bank: this stage's experts."""
        return list(self.experts[self.num_frozen :])

    def add(self, num: int) -> None:
        """Add ``num`` experts, uninitialized, to the active bank."""
        device = next(self.parameters()).device if len(self) else None
        for _ in range(num):
            self.experts.append(Expert(self.width, self.expert_width).to(device))

    def freeze(self) -> None:
        """Move all present experts to the frozen bank."""
        self.num_frozen = len(self)
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def forward(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Each expert on its slice.

        Args:
            rows_ND: Rows sorted by expert ``(N, D)``.
            counts_E: Rows of each expert, int64 ``(E,)``.

        Returns:
            ``(N, D)``. An active expert without rows still takes part, so that its gradient is zero and not
            absent: gradient synchronization between processes relies on it.
        """
        counts = counts_E.tolist()
        slices = rows_ND.split(counts)
        outputs = [
            expert(part)
            for i, (expert, part) in enumerate(zip(self.experts, slices, strict=True))
            if counts[i] or i >= self.num_frozen
        ]
        return torch.cat(outputs)
