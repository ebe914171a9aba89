"""Experts and the two banks they stand in.

Legend: N rows handed to experts, D model width, F expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Collection

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
    """One layer's experts in order of birth: the *frozen* bank and the *active* one.

    Each expert has Parameters of its own. A frozen expert's have no gradient, hence no optimizer state and no
    decay, and a step costs the same however many there are. Growing only changes which experts are active, the newest
    ones; continuing an old generation makes that one active alone. Names and indices of old experts never change.
    """

    def __init__(self, width: int, expert_width: int) -> None:
        super().__init__()
        self.width, self.expert_width = width, expert_width
        self.experts = nn.ModuleList()
        self._active: set[int] = set()

    def __len__(self) -> int:
        return len(self.experts)

    @property
    def frozen(self) -> list[nn.Module]:
        """The frozen bank."""
        return [expert for i, expert in enumerate(self.experts) if i not in self._active]

    @property
    def active(self) -> list[nn.Module]:
        """The active bank: those that train."""
        return [expert for i, expert in enumerate(self.experts) if i in self._active]

    def add(self, num: int) -> None:
        """Add ``num`` experts, uninitialized, to the active bank."""
        device = next(self.parameters()).device if len(self) else None
        self._active |= set(range(len(self), len(self) + num))
        for _ in range(num):
            self.experts.append(Expert(self.width, self.expert_width).to(device))

    def freeze(self, but: Collection[int] = ()) -> None:
        """Move all present experts to the frozen bank, but those of these indices, which alone train."""
        self._active = set(but)
        for i, expert in enumerate(self.experts):
            expert.requires_grad_(i in self._active)

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
            if counts[i] or i in self._active
        ]
        return torch.cat(outputs) if outputs else rows_ND
