"""The two banks that experts stand in.

Legend: N rows handed to experts, D model width, F expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from lifelong_moe.model.config import Activation
from lifelong_moe.model.feedforward import FeedForward


class ExpertBanks(nn.Module):
    """One layer's experts in order of birth: the *frozen* bank and the *active* one.

    Each expert has Parameters of its own. A frozen expert's have no gradient, hence no optimizer state and no
    decay, and a step costs the same however many there are. Growing only changes which experts are active, the newest
    ones; continuing an old generation makes that one active alone. Names and indices of old experts never change.
    """

    def __init__(self, width: int, expert_width: int, activation: Activation = Activation.swiglu) -> None:
        super().__init__()
        self.width, self.expert_width, self.activation = width, expert_width, activation
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
            self.experts.append(FeedForward(self.width, self.expert_width, self.activation).to(device))

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
