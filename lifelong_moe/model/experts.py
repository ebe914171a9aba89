"""Routed experts of a layer, by generation.

In memory, the experts of a generation share one 3-D Parameter per matrix: they train and freeze together, and a step
needs only a few calls per generation. In a state dictionary, and so on disk, each expert has its own tensors,
``experts.<index in the layer>.<matrix>``: single experts can be borrowed, dropped, merged and traced.

Old experts are frozen by ``LanguageModel.freeze_generations``, which calls :meth:`ExpertBanks.freeze` in each layer
(a phase of training may freeze more, in ``training/loop/optimizer.py``). A frozen generation has
``requires_grad=False``, and the optimizer never sees its Parameters.

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
    """Experts of one layer that one stage added; may be empty.

    Args:
        first: Index in the layer of the first expert; never changes.
        num: Number of experts.
        width: D.
        hidden_width: F.
        activation: Between the two matrices.
    """

    def __init__(self, first: int, num: int, width: int, hidden_width: int, activation: Activation) -> None:
        super().__init__()
        self.indices = range(first, first + num)
        """Their indices in the layer."""
        self.matrices = input_matrix(activation), "down"
        """Names of the input matrices, ``(E, G, D)``, and of the output matrices, ``(E, D, F)``."""
        hidden_rows = (2 if activation.is_gated else 1) * hidden_width
        self.register_parameter(self.matrices[0], nn.Parameter(torch.empty(num, hidden_rows, width)))
        self.down = nn.Parameter(torch.empty(num, width, hidden_width))

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def into(self) -> Tensor:
        """The input matrices, ``(E, G, D)``."""
        into: Tensor = getattr(self, self.matrices[0])
        return into

    @property
    def weights(self) -> tuple[Weights, Weights]:
        """Both matrices; a matrix held in 8 bits as functions that dequantize one expert each."""
        held: Any = self._modules.get("parametrizations") or {}
        into, down = (_makers(held[name]) if name in held else getattr(self, name) for name in self.matrices)
        return into, down

    @property
    def trains(self) -> bool:
        """Whether any of their matrices is trainable."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def stored_names(self, matrix: str) -> list[str]:
        """Name of each expert's matrix in a state dictionary, relative to the layer's banks."""
        return [f"experts.{index}.{matrix}" for index in self.indices]


def _makers(held: ParametrizationList) -> list[Callable[[], Tensor]]:
    """Functions that dequantize one expert's matrix each."""
    # Dequantizing a whole generation at once would take the memory that 8 bits save.

    def make(expert: int) -> Tensor:
        whole: Tensor = held[0](held.original0[expert], held.original1[expert])  # type: ignore[index]
        return whole

    return [partial(make, expert) for expert in range(len(held.original0))]  # type: ignore[arg-type]


class ExpertBanks(nn.Module):
    """One layer's experts in order of creation.

    Experts of *frozen* generations have no gradient, hence no optimizer state and no weight decay; the others are
    *active*. Growing adds a generation; a stage that continues an old generation trains only that one. Indices of old
    experts never change.
    """

    def __init__(self, width: int, expert_width: int, activation: Activation = Activation.swiglu) -> None:
        super().__init__()
        self.width, self.expert_width, self.activation = width, expert_width, activation
        self.generations = nn.ModuleList()
        self.dropout = 0.0
        """Fraction of hidden units dropped in training; set per stage, not part of the state."""
        self.implementation = ExpertsImplementation.auto
        """A setting of the machine, not part of the state."""
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
        """Freeze all generations except one; None freezes all."""
        for g, generation in enumerate(self.generations):
            generation.requires_grad_(g == but)

    def matrices(self) -> list[tuple[Tensor, Tensor]]:
        """Each expert's two matrices, ``(G, D)`` and ``(D, F)``, as detached views that may be written to."""
        return [pair for g in self.born for pair in zip(g.into.detach(), g.down.detach(), strict=True)]

    def networks(self) -> list[Callable[[Tensor], Tensor]]:
        """Each expert as a function from ``(N, D)`` to ``(N, D)``: the readable reference."""
        dropout = self.dropout if self.training else 0.0
        pairs = (pair for g in self.born for pair in zip(g.into, g.down, strict=True))
        return [
            partial(feed_forward, into_GD=into, down_DF=down, activation=self.activation, dropout=dropout)
            for into, down in pairs
        ]

    @staticmethod
    def _store_apart(banks: ExpertBanks, state_dict: dict[str, Tensor], prefix: str, _: Any) -> None:
        """Split each generation into one tensor per expert and matrix: views, not copies."""
        for g, generation in enumerate(banks.born):
            for matrix in generation.matrices:
                # Absent if held in 8 bits, a form that exists in memory only while a stage trains.
                whole = state_dict.pop(f"{prefix}generations.{g}.{matrix}", ())
                state_dict |= zip((prefix + name for name in generation.stored_names(matrix)), whole, strict=False)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for g, generation in enumerate(self.born):
            for matrix in generation.matrices:
                names = [f"{prefix}{name}" for name in generation.stored_names(matrix)]
                # All or none: what is missing is reported by the strict load below.
                if all(name in state_dict for name in names):
                    tensors = [state_dict.pop(name) for name in names]
                    whole = torch.stack(tensors) if tensors else getattr(generation, matrix)
                    state_dict[f"{prefix}generations.{g}.{matrix}"] = whole
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _around(self) -> tuple[list[ExpertGeneration], int] | None:
        """Generations, beginning with the trainable ones, and the number of these; None if they are not adjacent."""
        # Empty generations are skipped: they have no rows and no gradient.
        born = [generation for generation in self.born if len(generation)]
        trained = [g for g, generation in enumerate(born) if generation.trains]
        if not trained:
            return born, 0
        # Usually the newest generation only. A phase, or fine-tuning, may train another one, or several.
        first, last = trained[0], trained[-1]
        return ([*born[first:], *born[:first]], len(trained)) if last - first < len(trained) else None

    def chosen(self, rows: Tensor) -> ExpertsImplementation:
        """The implementation that computes rows of this device and dtype.

        ``auto`` is ``grouped_mm`` in bfloat16 on a GPU of compute capability 9, ``slices`` elsewhere. Where
        ``grouped_mm`` cannot be used, it falls back to ``slices``; dropout within experts is always ``readable``.
        """
        how = self.implementation
        # The fast implementations have no dropout.
        if self.training and self.dropout:
            return ExpertsImplementation.readable
        if how == ExpertsImplementation.auto:
            how = self._fastest(rows)
        if how == ExpertsImplementation.grouped_mm and not self._can_be_grouped(rows.device):
            return ExpertsImplementation.slices
        return how

    def _can_be_grouped(self, device: torch.device) -> bool:
        # From compute capability 10 on, torch's kernel leaves weight gradients of experts without rows unwritten.
        is_sound = device.type != "cuda" or torch.cuda.get_device_capability(device) < (10, 0)
        # Trainable generations must be adjacent, and weights must be tensors, which those held in 8 bits are not.
        return is_sound and self._around() is not None and not any(is_parametrized(g) for g in self.born)

    def _fastest(self, rows: Tensor) -> ExpertsImplementation:
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        # Only there does the kernel run without a synchronization with the host.
        fits = device == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows.device)[0] == 9
        # The kernel needs rows of a multiple of 16 bytes.
        aligned = self.width % 8 == 0 and self.expert_width % 8 == 0
        return ExpertsImplementation.grouped_mm if fits and aligned else ExpertsImplementation.slices

    def sorted_from(self, x: Tensor) -> int:
        """The expert whose rows must come first: with ``grouped_mm`` the first trainable one, else 0."""
        around = self._around()
        if self.chosen(x) != ExpertsImplementation.grouped_mm or not around or not around[0]:
            return 0
        return around[0][0].indices.start

    def forward(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Each expert on its slice.

        Args:
            rows_ND: Rows sorted by expert ``(N, D)``, starting at expert :meth:`sorted_from` and wrapping around.
            counts_E: Rows of each expert by index, int64 ``(E,)``.

        Returns:
            ``(N, D)``. An active expert without rows gets a gradient of zero rather than none, which gradient
            synchronization between processes relies on.
        """
        how = self.chosen(rows_ND)
        if how == ExpertsImplementation.grouped_mm:
            around, num_trained = self._around() or ([], 0)
            ins, outs = [generation.into for generation in around], [generation.down for generation in around]
            # In the order of the rows, which start at the first trainable expert.
            counts_E = counts_E.roll(-around[0].indices.start)
            return grouped(rows_ND, counts_E, ins, outs, num_trained, self.activation)
        # Waits for the device; `grouped_mm` above does not.
        counts: list[int] = counts_E.tolist()
        if how == ExpertsImplementation.readable:
            parts = zip(self.networks(), rows_ND.split(counts), strict=True)
            return torch.cat([network(part) for network, part in parts])
        weights = [weight for generation in self.born for weight in generation.weights]
        return slices(rows_ND, counts, weights, self.activation)
