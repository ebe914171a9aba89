"""Routed experts: a layer's generations of them, one Parameter a matrix in each.

In memory the experts of a generation are one 3-D Parameter a matrix: they train and freeze together, and a step costs
as few calls as there are generations. In a state dictionary, and so on disk, each expert's matrices are tensors of
their own, ``experts.<index in the layer>.<matrix>``: a stage then borrows, drops, merges and traces single experts, and
reads what was committed when each expert was a module.

Legend: N rows handed to experts, D model width, F expert width, E experts, of a generation or of all, G = 2·F where the
activation is gated, F where not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from lifelong_moe.config.model import Activation, ExpertsImplementation
from lifelong_moe.model.feedforward import feed_forward, input_matrix
from lifelong_moe.ops.expert_mlp import Weights, grouped, slices


class ExpertGeneration(nn.Module):
    """Experts of one layer that were born together; perhaps none.

    Args:
        first: Index in the layer of the first of them, which never changes.
        num: How many.
        width: D.
        hidden_width: F.
        activation: Between their two matrices.
    """

    def __init__(self, first: int, num: int, width: int, hidden_width: int, activation: Activation) -> None:
        super().__init__()
        self.indices = range(first, first + num)
        """Their indices in the layer."""
        self.matrices = input_matrix(activation), "down"
        """Names of the matrix into them, ``(E, G, D)``, and the one out of them, ``(E, D, F)``."""
        hidden_rows = (2 if activation.is_gated else 1) * hidden_width
        self.register_parameter(self.matrices[0], nn.Parameter(torch.empty(num, hidden_rows, width)))
        self.down = nn.Parameter(torch.empty(num, width, hidden_width))

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def into(self) -> Tensor:
        """The matrices that inputs meet, ``(E, G, D)``."""
        into: Tensor = getattr(self, self.matrices[0])
        return into

    @property
    def weights(self) -> tuple[Weights, Weights]:
        """Both matrices; those held in 8 bits as what makes one expert's whole."""
        held: Any = self._modules.get("parametrizations") or {}
        into, down = (_makers(held[name]) if name in held else getattr(self, name) for name in self.matrices)
        return into, down

    @property
    def trains(self) -> bool:
        """Whether they have gradients."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def stored_names(self, matrix: str) -> list[str]:
        """Name of each expert's own matrix in a state dictionary, within the layer's banks."""
        return [f"experts.{index}.{matrix}" for index in self.indices]


def _makers(held: ParametrizationList) -> list[Callable[[], Tensor]]:
    """What makes each expert's matrix whole by itself: all of a generation's at once would take their full memory."""

    def make(expert: int) -> Tensor:
        whole: Tensor = held[0](held.original0[expert], held.original1[expert])  # type: ignore[index]
        return whole

    return [partial(make, expert) for expert in range(len(held.original0))]  # type: ignore[arg-type]


class ExpertBanks(nn.Module):
    """One layer's experts in order of birth. Those of *frozen* generations have no gradient, hence no optimizer state
    and no decay, and a step costs the same however many there are; the others are *active*.

    Growing adds a generation; continuing an old one makes that one active alone. Indices of old experts never change.
    """

    def __init__(self, width: int, expert_width: int, activation: Activation = Activation.swiglu) -> None:
        super().__init__()
        self.width, self.expert_width, self.activation = width, expert_width, activation
        self.generations = nn.ModuleList()
        self.dropout = 0.0
        """Share of hidden units dropped in training; set for a stage, no state."""
        self.implementation = ExpertsImplementation.auto
        """No state: a setting of the machine at hand."""
        self.register_state_dict_post_hook(self._store_apart)

    def __len__(self) -> int:
        return sum(len(generation) for generation in self.born)

    @property
    def born(self) -> list[ExpertGeneration]:
        """The generations, oldest first."""
        return [*self.generations]

    def add(self, num: int) -> None:
        """Add a generation of ``num`` experts, uninitialized."""
        born = ExpertGeneration(len(self), num, self.width, self.expert_width, self.activation)
        self.generations.append(born.to(next((p.device for p in self.parameters()), None)))

    def freeze(self, but: int | None = None) -> None:
        """Freeze all generations there are but one, which alone trains."""
        for g, generation in enumerate(self.generations):
            generation.requires_grad_(g == but)

    def matrices(self) -> list[tuple[Tensor, Tensor]]:
        """Each expert's two matrices, ``(G, D)`` and ``(D, F)``, to read or to write; no gradient sees it."""
        return [pair for g in self.born for pair in zip(g.into.detach(), g.down.detach(), strict=True)]

    def networks(self) -> list[Callable[[Tensor], Tensor]]:
        """Each expert by itself, from ``(N, D)`` to ``(N, D)``: the readable way to compute them."""
        dropout = self.dropout if self.training else 0.0
        pairs = (pair for g in self.born for pair in zip(g.into, g.down, strict=True))
        return [
            partial(feed_forward, into_GD=into, down_DF=down, activation=self.activation, dropout=dropout)
            for into, down in pairs
        ]

    @staticmethod
    def _store_apart(banks: ExpertBanks, state_dict: dict[str, Tensor], prefix: str, _: Any) -> None:
        """Give each expert's matrices a name of their own; they stay views of their generation's."""
        for g, generation in enumerate(banks.born):
            for matrix in generation.matrices:
                # Absent where they are held in 8 bits, which is for a stage's time in memory alone.
                whole = state_dict.pop(f"{prefix}generations.{g}.{matrix}", ())
                state_dict |= zip((prefix + name for name in generation.stored_names(matrix)), whole, strict=False)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for g, generation in enumerate(self.born):
            for matrix in generation.matrices:
                names = [f"{prefix}{name}" for name in generation.stored_names(matrix)]
                if all(name in state_dict for name in names):
                    tensors = [state_dict.pop(name) for name in names]
                    whole = torch.stack(tensors) if tensors else getattr(generation, matrix)
                    state_dict[f"{prefix}generations.{g}.{matrix}"] = whole
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _around(self) -> tuple[list[ExpertGeneration], int] | None:
        """Generations from the first that trains on and around, and how many train; None if these are not in a row.

        Some that are active may not train: a phase, or fine-tuning, may leave them alone.
        """
        born = [generation for generation in self.born if len(generation)]
        trained = [g for g, generation in enumerate(born) if generation.trains]
        if not trained:
            return born, 0
        first, last = trained[0], trained[-1]
        return ([*born[first:], *born[:first]], len(trained)) if last - first < len(trained) else None

    def chosen(self, rows: Tensor) -> ExpertsImplementation:
        """How rows of this device and dtype are computed.

        ``auto`` takes ``grouped_mm`` where it needs no answer from the device, which is in bfloat16 on a GPU of
        compute capability 9, and ``slices`` elsewhere. Dropout within experts is ``readable`` always. Whatever was
        asked for, ``grouped_mm`` needs the experts that train side by side, and weights that are tensors of their own,
        which those held in 8 bits are not: else it is ``slices``. So it is on a GPU of compute capability 10 or more,
        where torch's kernel does not write the weight gradients of experts without rows.
        """
        how = self.implementation
        if self.training and self.dropout:
            return ExpertsImplementation.readable
        if how == ExpertsImplementation.auto:
            how = self._fastest(rows)
        if how == ExpertsImplementation.grouped_mm and not self._can_be_grouped(rows.device):
            return ExpertsImplementation.slices
        return how

    def _can_be_grouped(self, device: torch.device) -> bool:
        is_sound = device.type != "cuda" or torch.cuda.get_device_capability(device) < (10, 0)
        return is_sound and self._around() is not None and not any(is_parametrized(g) for g in self.born)

    def _fastest(self, rows: Tensor) -> ExpertsImplementation:
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        fits = device == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows.device)[0] == 9
        aligned = self.width % 8 == 0 and self.expert_width % 8 == 0
        return ExpertsImplementation.grouped_mm if fits and aligned else ExpertsImplementation.slices

    def sorted_from(self, x: Tensor) -> int:
        """The expert that rows must begin with: where weight gradients are grouped, the first that trains."""
        around = self._around()
        if self.chosen(x) != ExpertsImplementation.grouped_mm or not around or not around[0]:
            return 0
        return around[0][0].indices.start

    def forward(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Each expert on its slice.

        Args:
            rows_ND: Rows sorted by expert ``(N, D)``, from expert :meth:`sorted_from` on and around.
            counts_E: Rows of each expert by index, int64 ``(E,)``.

        Returns:
            ``(N, D)``. An active expert without rows still takes part, so that its gradient is zero and not
            absent: gradient synchronization between processes relies on it. Otherwise only experts that have rows cost
            anything.
        """
        how = self.chosen(rows_ND)
        if how == ExpertsImplementation.grouped_mm:
            around, num_trained = self._around() or ([], 0)
            ins, outs = [generation.into for generation in around], [generation.down for generation in around]
            counts_E = counts_E.roll(-around[0].indices.start)
            return grouped(rows_ND, counts_E, ins, outs, num_trained, self.activation)
        counts: list[int] = counts_E.tolist()
        if how == ExpertsImplementation.readable:
            parts = zip(self.networks(), rows_ND.split(counts), strict=True)
            return torch.cat([network(part) for network, part in parts])
        weights = [weight for generation in self.born for weight in generation.weights]
        return slices(rows_ND, counts, weights, self.activation)
