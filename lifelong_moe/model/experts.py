"""The two banks that experts stand in.

Legend: N rows handed to experts, D model width, F expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lifelong_moe.model.config import Activation, ExpertsImplementation
from lifelong_moe.model.feedforward import FeedForward
from lifelong_moe.ops.expert_mlp import grouped, slices


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
        self.implementation = ExpertsImplementation.auto
        """No state: a setting of the machine at hand."""

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

    def _trained(self) -> range | None:
        """Indices of the experts whose weights have gradients, if they stand side by side; None if they do not.

        Some that are active may not train: a phase, or fine-tuning, may leave them alone.
        """
        found = [i for i, expert in enumerate(self.experts) if any(p.requires_grad for p in expert.parameters())]
        trained = range(found[0], found[-1] + 1) if found else range(0)
        return trained if len(trained) == len(found) else None

    def chosen(self, rows: Tensor) -> ExpertsImplementation:
        """How rows of this device and dtype are computed.

        ``auto`` takes ``grouped_mm`` where it needs no answer from the device, which is in bfloat16 on a GPU of
        compute capability 9, and ``slices`` elsewhere. Dropout within experts is ``readable`` always. Whatever was
        asked for, ``grouped_mm`` needs the experts that train side by side, and weights that are tensors of their own,
        which those held in 8 bits are not: else it is ``slices``. So it is on a GPU of compute capability 10 or more,
        where torch's kernel does not write the weight gradients of experts without rows.
        """
        how = self.implementation
        if self.training and any(expert.dropout for expert in self.experts):
            return ExpertsImplementation.readable
        if how == ExpertsImplementation.auto:
            how = self._fastest(rows)
        if how == ExpertsImplementation.grouped_mm and not self._can_be_grouped(rows.device):
            return ExpertsImplementation.slices
        return how

    def _can_be_grouped(self, device: torch.device) -> bool:
        is_sound = device.type != "cuda" or torch.cuda.get_device_capability(device) < (10, 0)
        return is_sound and self._trained() is not None and not self._in_int8()

    def _in_int8(self) -> bool:
        return any(is_parametrized(expert) for expert in self.experts)

    def _fastest(self, rows: Tensor) -> ExpertsImplementation:
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        fits = device == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows.device)[0] == 9
        aligned = self.width % 8 == 0 and self.expert_width % 8 == 0
        return ExpertsImplementation.grouped_mm if fits and aligned else ExpertsImplementation.slices

    def sorted_from(self, x: Tensor) -> int:
        """The expert that rows must begin with: where weight gradients are grouped, the first that trains."""
        if self.chosen(x) != ExpertsImplementation.grouped_mm:
            return 0
        return (self._trained() or range(0)).start

    def forward(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Each expert on its slice.

        Args:
            rows_ND: Rows sorted by expert ``(N, D)``, from expert :meth:`sorted_from` on and around.
            counts_E: Rows of each expert by index, int64 ``(E,)``.

        Returns:
            ``(N, D)``. An active expert without rows still takes part, so that its gradient is zero and not
            absent: gradient synchronization between processes relies on it. Without gradients only experts that have
            rows cost anything.
        """
        how = self.chosen(rows_ND)
        if how == ExpertsImplementation.grouped_mm:
            trained = self._trained() or range(0)
            first = trained.start
            around: list[FeedForward] = [*self.experts[first:], *self.experts[:first]]
            ins, outs = [expert.into for expert in around], [expert.down for expert in around]
            return grouped(rows_ND, counts_E.roll(-first), ins, outs, len(trained), self.activation)
        counts: list[int] = counts_E.tolist()
        learning = self._active if torch.is_grad_enabled() else ()
        used = [i for i, count in enumerate(counts) if count or i in learning]
        if not used:
            return rows_ND
        experts: list[FeedForward] = [self.experts[i] for i in used]  # type: ignore[misc]
        counts = [counts[i] for i in used]
        if how == ExpertsImplementation.readable:
            parts = rows_ND.split(counts)
            return torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])
        return slices(rows_ND, counts, [weight for expert in experts for weight in expert.weights], self.activation)
