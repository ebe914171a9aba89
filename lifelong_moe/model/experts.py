"""Routed experts of a layer, by generation.

In memory, the experts of a generation share one 3-D Parameter per matrix: they train and freeze together, and a step
needs only a few calls per generation. In a state dictionary, and so on disk, each expert has its own tensors,
``experts.<index in the layer>.<matrix>``: single experts can be borrowed, dropped, merged and traced. Low-rank experts
store their factors so, and the index of the whole expert that they change.

Old experts are frozen by ``LanguageModel.freeze_generations``, which calls :meth:`ExpertBanks.freeze` in each layer
(a phase of training may freeze more, in ``training/loop/optimizer.py``). A frozen generation has
``requires_grad=False``, and the optimizer never sees its Parameters.

Legend: N rows handed to experts, D model width, F expert width, E experts, of a generation or of all, G = 2·F where the
activation is gated, F where not, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from lifelong_moe.config.model import Activation, ExpertsImplementation
from lifelong_moe.model.feedforward import feed_forward, input_matrix
from lifelong_moe.ops.collectives import ExpertPlacement
from lifelong_moe.ops.expert_mlp import Weights, grouped, join, slices
from lifelong_moe.ops.low_rank import Change, changed, low_rank


class ExpertGeneration(nn.Module):
    """Experts of one layer that one stage added; may be empty.

    Args:
        first: Index in the layer of the first expert; never changes.
        num: Number of experts.
        tensors: Names of their tensors, which each expert stores apart.
    """

    def __init__(self, first: int, num: int, tensors: tuple[str, ...]) -> None:
        super().__init__()
        self.indices = range(first, first + num)
        """Their indices in the layer."""
        self.here = self.indices
        """Their places among the layer's experts that this process has."""
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def trains(self) -> bool:
        """Whether any of their matrices is trainable."""
        # Asked of each generation in each layer of each step. Without modules of its own, as those that hold a matrix
        # in fewer bits, there is nothing to walk through.
        held = self.parameters() if self._modules else self._parameters.values()
        return any(parameter is not None and parameter.requires_grad for parameter in held)

    def stored_names(self, tensor: str) -> list[str]:
        """Name of each expert's tensor in a state dictionary, relative to the layer's banks."""
        return [f"experts.{index}.{tensor}" for index in self.indices]


class WholeExperts(ExpertGeneration):
    """Experts with matrices of their own.

    Args:
        first: Index in the layer of the first expert.
        num: Number of experts.
        width: D.
        hidden_width: F.
        activation: Between the two matrices.
    """

    def __init__(self, first: int, num: int, width: int, hidden_width: int, activation: Activation) -> None:
        super().__init__(first, num, (input_matrix(activation), "down"))
        hidden_rows = (2 if activation.is_gated else 1) * hidden_width
        self.register_parameter(self.tensors[0], nn.Parameter(torch.empty(num, hidden_rows, width)))
        self.down = nn.Parameter(torch.empty(num, width, hidden_width))

    @property
    def into(self) -> Tensor:
        """The input matrices, ``(E, G, D)``."""
        into: Tensor = getattr(self, self.tensors[0])
        return into

    @property
    def weights(self) -> tuple[Weights, Weights]:
        """Both matrices; a matrix held in fewer bits as functions that make it whole, one expert each."""
        held: Any = self._modules.get("parametrizations") or {}
        into, down = (_makers(held[name]) if name in held else getattr(self, name) for name in self.tensors)
        return into, down


class LowRankExperts(ExpertGeneration):
    """Experts that change an older whole expert, which stays frozen, by a product of two factors for each matrix.

    Args:
        first: Index in the layer of the first expert.
        num: Number of experts.
        banks: The layer's experts, for their shape.
        rank: R.
    """

    def __init__(self, first: int, num: int, banks: ExpertBanks, rank: int) -> None:
        name, parts = input_matrix(banks.activation), 2 if banks.activation.is_gated else 1
        super().__init__(first, num, (f"{name}_a", f"{name}_b", "down_a", "down_b", "base"))
        self.rank = rank
        width, hidden_width = banks.width, banks.expert_width
        shapes = (parts * rank, width), (parts * hidden_width, rank), (rank, hidden_width), (width, rank)
        for tensor, shape in zip(self.tensors, shapes, strict=False):
            self.register_parameter(tensor, nn.Parameter(torch.empty(num, *shape)))
        self.base: Tensor
        self.register_buffer("base", torch.zeros(num, dtype=torch.int64))

    @property
    def changes(self) -> tuple[Change, Change]:
        """Of the input and the output matrices."""
        into_a, into_b, down_a, down_b = (getattr(self, name) for name in self.tensors[:4])
        return Change(into_a, into_b), Change(down_a, down_b)

    @torch.no_grad()
    def begin(self, generator: torch.Generator | None) -> None:
        """Begin with changes of zero: one factor is zero, and the other random, so that the first gets a gradient."""
        for change in self.changes:
            # Drawn on the CPU, like all numbers of a seed: the same on every device.
            drawn = torch.empty_like(change.a_EPI, device="cpu")
            change.a_EPI.copy_(nn.init.normal_(drawn, std=change.a_EPI.shape[-1] ** -0.5, generator=generator))
            change.b_EOR.zero_()

    @torch.no_grad()
    def begin_as(self, place: int, other: LowRankExperts, its_place: int) -> None:
        """Begin an expert, given its place in this generation, as an expert of another generation of the same rank."""
        for name in self.tensors:
            getattr(self, name)[place] = getattr(other, name)[its_place]


def _makers(held: ParametrizationList) -> list[Callable[[], Tensor]]:
    """Functions that make one expert's matrix each."""
    # Making a whole generation at once would take the memory that fewer bits save.
    originals = list(held.parameters())

    def make(expert: int) -> Tensor:
        whole: Tensor = held[0](*(original[expert] for original in originals))
        return whole

    return [partial(make, expert) for expert in range(len(originals[0]))]


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
        self.placement: ExpertPlacement | None = None
        """Where experts are of which this process has a part, while a stage trains."""
        self.register_state_dict_post_hook(self._store_apart)

    def __len__(self) -> int:
        return sum(len(generation) for generation in self.born)

    @property
    def born(self) -> list[ExpertGeneration]:
        """The generations, oldest first."""
        return [*self.generations]

    def add(self, num: int, rank: int = 0) -> None:
        """Add a generation of ``num`` experts, uninitialized; with a rank, they are low-rank experts."""
        born: ExpertGeneration
        if rank:
            born = LowRankExperts(len(self), num, self, rank)
        else:
            born = WholeExperts(len(self), num, self.width, self.expert_width, self.activation)
        self.generations.append(born.to(next((p.device for p in self.parameters()), None)))

    def freeze(self, but: int | None = None) -> None:
        """Freeze all generations except one; None freezes all."""
        for g, generation in enumerate(self.generations):
            generation.requires_grad_(g == but)

    def at(self, index: int) -> tuple[ExpertGeneration, int]:
        """The generation of an expert, and its place there."""
        generation = next(one for one in self.born if index in one.indices)
        return generation, index - generation.indices.start

    def base_of(self, index: int) -> int:
        """The whole expert that an expert is or changes."""
        generation, place = self.at(index)
        return int(generation.base[place]) if isinstance(generation, LowRankExperts) else index

    def has_sound_bases(self) -> bool:
        """Whether each low-rank expert changes a whole expert that is older."""
        low = [generation for generation in self.born if isinstance(generation, LowRankExperts)]
        whole = {i for one in self.born if isinstance(one, WholeExperts) for i in one.indices}
        return all(b in whole and b < one.indices.start for one in low for b in one.base.tolist())

    def _whole(self, generation: ExpertGeneration) -> Iterator[tuple[Tensor, Tensor]]:
        """Both matrices of each expert of a generation: its own, or made of what it changes."""
        if isinstance(generation, WholeExperts):
            yield from zip(generation.into, generation.down, strict=True)
        elif isinstance(generation, LowRankExperts):
            into, down = generation.changes
            for place, base in enumerate(generation.base.tolist()):
                home, its_place = self.at(base)
                assert isinstance(home, WholeExperts)
                yield (
                    changed(home.into[its_place], into.a_EPI[place], into.b_EOR[place]),
                    changed(home.down[its_place], down.a_EPI[place], down.b_EOR[place]),
                )

    def matrices(self) -> list[tuple[Tensor, Tensor]]:
        """Each expert's two matrices, ``(G, D)`` and ``(D, F)``, detached.

        Those of whole experts are views that may be written to.
        """
        return [(into.detach(), down.detach()) for g in self.born for into, down in self._whole(g)]

    def networks(self) -> list[Callable[[Tensor], Tensor]]:
        """Each expert as a function from ``(N, D)`` to ``(N, D)``: the readable reference."""
        dropout = self.dropout if self.training else 0.0
        return [
            partial(feed_forward, into_GD=into, down_DF=down, activation=self.activation, dropout=dropout)
            for generation in self.born
            for into, down in self._whole(generation)
        ]

    @staticmethod
    def _store_apart(banks: ExpertBanks, state_dict: dict[str, Tensor], prefix: str, _: Any) -> None:
        """Split each generation into one tensor per expert and matrix: views, not copies."""
        for g, generation in enumerate(banks.born):
            for matrix in generation.tensors:
                # Absent if held in 8 bits, a form that exists in memory only while a stage trains.
                whole: Any = state_dict.pop(f"{prefix}generations.{g}.{matrix}", ())
                # Divided among processes by experts: only whole can it be split.
                if any(one.is_shard(dim=0) for one in getattr(whole, "placements", ())):
                    whole = whole.full_tensor()
                state_dict |= zip((prefix + name for name in generation.stored_names(matrix)), whole, strict=False)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for g, generation in enumerate(self.born):
            for matrix in generation.tensors:
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
        ``grouped_mm`` cannot be used, as with low-rank experts, it falls back to ``slices``; dropout within experts is
        always ``readable``.
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
        plain = all(isinstance(g, WholeExperts) and not is_parametrized(g) for g in self.born)
        return is_sound and plain and self._around() is not None

    def _fastest(self, rows: Tensor) -> ExpertsImplementation:
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        # Only there does the kernel run without a synchronization with the host.
        fits = device == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows.device)[0] == 9
        # The kernel needs rows of a multiple of 16 bytes.
        aligned = self.width % 8 == 0 and self.expert_width % 8 == 0
        return ExpertsImplementation.grouped_mm if fits and aligned else ExpertsImplementation.slices

    def sorted_from(self, x: Tensor) -> int:
        """The expert whose rows must come first: with ``grouped_mm`` the first trainable one, else 0.

        It is given by its place among the experts of this process.
        """
        if self.chosen(x) != ExpertsImplementation.grouped_mm or not (around := self._around()) or not around[0]:
            return 0
        return around[0][0].here.start

    def join(self) -> None:
        """Move the generations' matrices side by side, as ``grouped_mm`` reads them, which else copies them each time.

        Not for sharded parameters, whose memory belongs to whoever shards them.
        """
        device = next((one.device for one in self.parameters()), torch.device("cpu"))
        chosen_on_cuda = self.implementation == ExpertsImplementation.auto and device.type == "cuda"
        asked = chosen_on_cuda or self.implementation == ExpertsImplementation.grouped_mm
        around, _ = self._around() or ([], 0)
        matrices = [[getattr(one, one.tensors[i]) for one in around] for i in (0, 1)] if asked else []
        sharded = any(hasattr(one, "placements") for each in matrices for one in each)
        if around and not sharded and self._can_be_grouped(device):
            for each in matrices:
                join(each)

    def forward(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Each expert of this process on its slice.

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
            ins, outs = ([getattr(one, one.tensors[i]) for one in around] for i in (0, 1))
            # In the order of the rows, which start at the first trainable expert.
            counts_E = counts_E.roll(-around[0].here.start)
            return grouped(rows_ND, counts_E, ins, outs, num_trained, self.activation)
        # Waits for the device; `grouped_mm` above does not.
        counts: list[int] = counts_E.tolist()
        if how == ExpertsImplementation.readable:
            parts = zip(self.networks(), rows_ND.split(counts), strict=True)
            return torch.cat([network(part) for network, part in parts])
        return self._in_slices(rows_ND, counts)

    def _in_slices(self, rows_ND: Tensor, counts: list[int]) -> Tensor:
        """Generations in turn: adjacent ones of whole experts at once, each one of low-rank experts by itself."""
        each, with_gradient = (
            ((one, counts[one.here.start : one.here.stop]) for one in self.born),
            torch.is_grad_enabled(),
        )
        # Without rows only what trains is asked, for its gradient of zero: old generations cost nothing here.
        asked = [(one, here) for one, here in each if any(here) or (with_gradient and len(one) and one.trains)]
        runs: list[list[tuple[ExpertGeneration, list[int]]]] = []
        for is_whole, members in groupby(asked, lambda pair: isinstance(pair[0], WholeExperts)):
            run = [*members]
            runs += [run] if is_whole else [[one] for one in run]
        numbers = [[count for _, here in run for count in here] for run in runs]
        parts = zip(rows_ND.split([sum(number) for number in numbers]), numbers, runs, strict=True)
        outputs = [self._run(part_ND, number, [one for one, _ in run]) for part_ND, number, run in parts]
        if len(outputs) > 1:
            return torch.cat(outputs)
        return outputs[0] if outputs else rows_ND

    def _run(self, rows_ND: Tensor, counts: list[int], run: list[ExpertGeneration]) -> Tensor:
        if not isinstance(low := run[0], LowRankExperts):
            weights = [weight for one in run if isinstance(one, WholeExperts) for weight in one.weights]
            return slices(rows_ND, counts, weights, self.activation)
        bases, shared = low.base.tolist(), {}
        for base in set(bases):
            home, place = self.at(base)
            assert isinstance(home, WholeExperts)
            into, down = home.weights
            shared[base] = into[place], down[place]
        return low_rank(rows_ND, counts, bases, shared, low.changes, self.activation)
