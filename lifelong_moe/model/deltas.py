"""What belongs to one generation of the trunk: low-rank changes of its matrices, and rows for tokens that it added.

A generation is what one stage adds to the model: experts, their router rows, and these. The first stage trains the
trunk itself and has neither. Low-rank changes are used by the generation's tokens only, rows by later generations too.

On a CPU, and wherever nothing trains, each generation in use multiplies its own tokens by its own changed matrix, so
that later generations cannot change a bit of what it computes. On a GPU a step takes all generations' changes side by
side, as two narrow products for all tokens with a mask between them (:func:`join_changes`): nothing is sorted, no
changed matrix is made, and the number of kernels does not depend on the number of generations.

Legend: B batch, S sequence, T = B·S tokens, I input width, O output width, R rank, V vocabulary, D model width.

Source:
    LoRA (arXiv:2106.09685), without its scale; there one delta per task for all tokens, here one per generation,
    selected per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_moe.ops.dispatch import inverse_permutation, permute, sort_by_expert
from lifelong_moe.ops.expert_mlp import Weight
from lifelong_moe.ops.few_rows import as_rows, linear
from lifelong_moe.ops.low_rank import product


@dataclass(frozen=True)
class Owners:
    """The generation of each of several columns."""

    generations: tuple[int, ...]
    generation_R: Tensor
    """The same on the device, int64 ``(R,)``."""


@dataclass(frozen=True)
class GenerationSlices:
    """The tokens of a batch sorted by generation, so that each generation's tokens are one slice."""

    known_T: Tensor
    """Generation of each token, int64 ``(T,)``."""
    counts: list[int]
    """Number of tokens of each generation."""
    _used: dict[int, tuple[slice, Tensor | None] | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Of changes side by side what :meth:`columns` found; they are the same objects for all matrices."""

    @classmethod
    def of(
        cls, domain_ids_T: Tensor, num_generations: int, domain_counts: Sequence[int] | None = None
    ) -> GenerationSlices:
        """Sort tokens by generation; a generation that the model does not have counts as generation 0.

        Without ``domain_counts``, the number of tokens of each domain, the host waits for the device to learn it.
        """
        known_T = torch.where(domain_ids_T < num_generations, domain_ids_T, 0)
        if domain_counts is None:
            order_T, counts_G = sort_by_expert(known_T, num_generations)
            found = cls(known_T, counts_G.tolist())
            vars(found)["order_T"] = order_T  # known already: not sorted again
            return found
        counts = [*domain_counts[:num_generations], *[0] * (num_generations - len(domain_counts))]
        counts[0] += sum(domain_counts[num_generations:])
        return cls(known_T, counts)

    @cached_property
    def order_T(self) -> Tensor:  # noqa: N802 - named as the tensor that it is
        """Tokens sorted by generation, and then by position."""
        return sort_by_expert(self.known_T, len(self.counts))[0]

    @cached_property
    def inverse_T(self) -> Tensor:  # noqa: N802 - named as the tensor that it is
        """Place of each token in that order."""
        return inverse_permutation(self.order_T)

    def columns(self, owners: Owners) -> tuple[slice, Tensor | None] | None:
        """Columns from the first to the last that tokens use, and which of them are each token's own, bool ``(T, R)``.

        None for the latter if all are every token's own; None for both if no token uses any.
        """
        if id(owners) not in self._used:
            places = [i for i, generation in enumerate(owners.generations) if self.counts[generation]]
            found = None
            if places:
                part = slice(places[0], places[-1] + 1)
                # Generation 0 has no column: its tokens' are all masked.
                is_only = len(self.present) == 1
                found = part, None if is_only else self.known_T.unsqueeze(1) == owners.generation_R[part]
            self._used[id(owners)] = found
        return self._used[id(owners)]

    @property
    def present(self) -> frozenset[int]:
        """Generations that have tokens."""
        return frozenset(generation for generation, count in enumerate(self.counts) if count)

    def apply(self, x_TI: Tensor, function: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Apply ``function(generation, rows)`` to each generation's rows, and restore the order of the tokens."""
        # One generation has all tokens: nothing to reorder.
        if max(self.counts) == len(x_TI):
            return function(self.counts.index(len(x_TI)), x_TI)
        # `permute` is for gradients, which token ids do not have.
        rows = permute(x_TI, self.order_T, self.inverse_T) if x_TI.is_floating_point() else x_TI[self.order_T]
        parts = [function(g, part) for g, part in enumerate(rows.split(self.counts)) if len(part)]
        return permute(torch.cat(parts), self.inverse_T, self.order_T)


def apply_readable(
    x_TI: Tensor, domain_ids_T: Tensor, num_generations: int, function: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """What :meth:`GenerationSlices.apply` computes, one token at a time: the slow reference for the fast path."""
    known = [domain if domain < num_generations else 0 for domain in domain_ids_T.tolist()]
    return torch.cat([function(generation, x_TI[t : t + 1]) for t, generation in enumerate(known)])


class LowRank(nn.Module):
    """A change ``up @ down`` of a matrix ``(O, I)``; zero until trained, since ``up`` starts at zero."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.down = nn.Parameter(torch.zeros(rank, columns))

    @torch.no_grad()
    def begin(self, generator: torch.Generator) -> None:
        """Set ``up`` to zero, so that the change is zero, and ``down`` at random, so that ``up`` gets a gradient."""
        self.up.zero_()
        self.down.copy_(torch.randn(self.down.shape, generator=generator) / self.down.shape[1] ** 0.5)

    def forward(self) -> Tensor:
        """The change, ``(O, I)``."""
        return self.up @ self.down

    def apply_to(self, x_NI: Tensor) -> Tensor:
        """``x (up down)^T``, ``(N, O)``, without the change itself."""
        low_NR = F.linear(x_NI, as_rows(self.down, x_NI))
        return F.linear(low_NR, as_rows(self.up, low_NR))

    def suits(self, num_rows: int) -> bool:
        """Whether :meth:`apply_to` takes fewer multiply-adds for so many rows than making the change."""
        (rows, _), (_, columns) = self.up.shape, self.down.shape
        return num_rows * (rows + columns) < rows * columns


@dataclass(frozen=True)
class SideBySide:
    """Low-rank changes of one matrix that several generations made, for tokens of all of them at once."""

    down_RI: Tensor
    up_OR: Tensor
    owners: Owners

    def used(self, generations: GenerationSlices) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Columns that tokens use, of both factors, and which are each token's own; None if they use none."""
        found = generations.columns(self.owners)
        if found is None:
            return None
        part, own_TR = found
        is_all = part.stop - part.start == len(self.down_RI)
        return (self.down_RI, self.up_OR, own_TR) if is_all else (self.down_RI[part], self.up_OR[:, part], own_TR)

    def factors(self, x_TI: Tensor, generations: GenerationSlices) -> tuple[Tensor, Tensor] | None:
        """``(T, R)``, rows by the first factor with zeros in others' columns, and the second ``(O, R)``; or None."""
        used = self.used(generations)
        if used is None:
            return None
        down_RI, up_OR, own_TR = used
        low_TR = F.linear(x_TI, as_rows(down_RI, x_TI))
        return (low_TR if own_TR is None else low_TR * own_TR), up_OR


class Deltas(nn.ModuleDict):
    """The low-rank changes of one matrix, by generation."""

    def __init__(self) -> None:
        super().__init__()
        self.num_generations = 0
        """Number of generations, with a change of this matrix or without."""
        self.joined: tuple[SideBySide, ...] = ()
        """While a stage trains on a GPU: its changes in few products, those that are frozen in one."""

    def add_generation(self, base_OI: Tensor, rank: int) -> None:
        """Add a generation's change of a matrix; rank 0 is no change."""
        if rank:
            self[str(self.num_generations)] = LowRank(base_OI.shape[0], base_OI.shape[1], rank)
        self.num_generations += 1

    def of(self, generation: int) -> LowRank | None:
        """A generation's change; None if it has none."""
        return self._modules.get(str(generation))  # type: ignore[return-value]

    def weight(self, base_OI: Tensor, generation: int) -> Tensor:
        """The matrix that a generation's tokens use."""
        delta = self.of(generation)
        return base_OI if delta is None else base_OI + delta()

    @torch.no_grad()
    def join(self, base_OI: Tensor, owners: dict[tuple[int, ...], Owners]) -> None:
        """Lay the changes side by side, unless they are together so wide that products with them would cost more.

        Args:
            base_OI: The matrix that they change.
            owners: Generations of columns that matrices share, extended here: the device gets each only once.
        """
        trained = {int(g): one for g, one in self.items() if one.up.requires_grad}
        frozen = {int(g): one for g, one in self.items() if int(g) not in trained}
        ranks = {int(g): len(one.down) for g, one in self.items()}  # type: ignore[arg-type]
        rows, columns = base_OI.shape
        if sum(ranks.values()) * (rows + columns) > rows * columns:
            self.joined = ()
            return

        def owned(generations: Iterable[int]) -> Owners:
            each = tuple(g for g in generations for _ in range(ranks[g]))
            if each not in owners:
                owners[each] = Owners(each, torch.tensor(each, device=base_OI.device))
            return owners[each]

        joined = [SideBySide(one.down, one.up, owned([g])) for g, one in trained.items()]  # type: ignore[arg-type]
        if frozen:
            down_RI = torch.cat([one.down for one in frozen.values()])  # type: ignore[misc]
            up_OR = torch.cat([one.up for one in frozen.values()], dim=1)  # type: ignore[misc]
            joined.append(SideBySide(down_RI, up_OR, owned(frozen)))
        self.joined = tuple(joined)

    def factors(self, x_TI: Tensor, generations: GenerationSlices) -> list[tuple[Tensor, Tensor]]:
        """Of changes side by side: ``low_TR`` and ``up_OR``, whose product each adds to ``x W^T``."""
        found = (change.factors(x_TI, generations) for change in self.joined)
        return [one for one in found if one is not None]

    def product(self, x_NI: Tensor, base_OI: Tensor, generation: int) -> Tensor:
        """``(N, O)``: a generation's tokens times the matrix that they use."""
        delta = self.of(generation)
        # Only without gradients: a stage's weights do not depend on how many rows of a batch are of which generation.
        if delta is None or torch.is_grad_enabled() or not delta.suits(len(x_NI)):
            return linear(x_NI, self.weight(base_OI, generation))
        return linear(x_NI, base_OI) + delta.apply_to(x_NI)


class TokenRows(nn.ParameterDict):
    """Rows ``(tokens, D)`` of a matrix ``(V, D)`` for the tokens that generations added, by generation.

    Their ids come after those of the matrix, in the order of the generations.
    """

    def add_generation(self, generation: int, tokens: int, width: int) -> None:
        """Add a generation's rows, uninitialized; none are added for no tokens."""
        if tokens:
            self[str(generation)] = nn.Parameter(torch.empty(tokens, width))

    def until(self, generation: int) -> list[Tensor]:
        """The rows of a generation and of those before it, oldest first."""
        return [rows for born, rows in self.items() if int(born) <= generation]


class DeltaLinear(nn.Linear):
    """A linear map whose weight may have deltas; a bias, where there is one, is the same for all generations."""

    def __init__(self, columns: int, rows: int, *, bias: bool = False) -> None:
        super().__init__(columns, rows, bias=bias)
        self.deltas = Deltas()

    def add_generation(self, rank: int) -> None:
        """Add a generation, with a change of its own if its rank is not 0."""
        self.deltas.add_generation(self.weight, rank)

    def weight_of(self, generation: int) -> Tensor:
        """The weight ``(O, I)`` that a generation's tokens use."""
        return self.deltas.weight(self.weight, generation)

    def _held_weight(self) -> Weight:
        """The weight ``(O, I)``; one held in fewer bits as what makes it whole."""
        held: Any = self._modules.get("parametrizations")
        return self.weight if held is None or "weight" not in held else held["weight"]

    def forward(self, x: Tensor, generations: GenerationSlices | None = None) -> Tensor:
        """``(…, I)`` to ``(…, O)``; the leading dimensions are the tokens that ``generations`` sorts."""
        if generations is None or not self.deltas:
            out = product(x, self._held_weight())
        elif self.deltas.joined:
            x_TI = x.flatten(0, -2)
            out_TO = product(x_TI, self._held_weight())
            for low_TR, up_OR in self.deltas.factors(x_TI, generations):
                out_TO = torch.addmm(out_TO, low_TR, as_rows(up_OR, low_TR).t())
            out = out_TO.view(*x.shape[:-1], -1)
        else:
            out_TO = generations.apply(x.flatten(0, -2), lambda g, rows: self.deltas.product(rows, self.weight, g))
            out = out_TO.view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


class DeltaEmbedding(nn.Embedding):
    """Token vectors that may have deltas, and rows for added tokens."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__(vocab_size, width)
        self.deltas, self.added = Deltas(), TokenRows()

    def add_generation(self, rank: int) -> None:
        """Add a generation, with a change of its own if its rank is not 0."""
        self.deltas.add_generation(self.weight, rank)

    def slices(self, domain_ids: Tensor | None, domain_counts: Sequence[int] | None = None) -> GenerationSlices | None:
        """Tokens ``(...)`` sorted by generation; None if generations have nothing of their own in the trunk."""
        return generation_slices(self.deltas, self.added, domain_ids, domain_counts)

    def forward(self, token_ids_BS: Tensor, generations: GenerationSlices | None = None) -> Tensor:
        """int64 ``(B, S)`` to ``(B, S, D)``."""
        if generations is None or not (self.deltas or self.added):
            return F.embedding(token_ids_BS, self.weight)
        if self.deltas.joined and not self.added:
            ids_T = token_ids_BS.flatten()
            out_TD = F.embedding(ids_T, self.weight)
            for change in self.deltas.joined:
                if (used := change.used(generations)) is None:
                    continue
                down_RD, up_VR, own_TR = used
                low_TR = F.embedding(ids_T, up_VR)
                low_TR = low_TR if own_TR is None else low_TR * own_TR
                # No `addmm`, which autocast would let round the residual stream.
                out_TD = out_TD + low_TR @ as_rows(down_RD, low_TR)
            return out_TD.view(*token_ids_BS.shape, -1)
        out_TD = generations.apply(token_ids_BS.flatten(), self.look_up)
        return out_TD.view(*token_ids_BS.shape, -1)

    def look_up(self, generation: int, token_ids_N: Tensor) -> Tensor:
        """Vectors ``(N, D)`` of tokens as a generation uses them."""
        added, known = self.added.until(generation), len(self.weight)
        old_N = token_ids_N.clamp(max=known - 1) if added else token_ids_N
        base_ND, delta = F.embedding(old_N, self.weight), self.deltas.of(generation)
        found_ND = base_ND if delta is None else base_ND + F.embedding(old_N, delta.up) @ delta.down
        if not added:
            return found_ND
        # Both are looked up for every token, so that nothing waits for the device to say which are new.
        new_ND = F.embedding((token_ids_N - known).clamp(min=0), torch.cat(added))
        return torch.where((token_ids_N < known).unsqueeze(-1), found_ND, new_ND.to(found_ND.dtype))


def generation_slices(
    deltas: Deltas, rows: TokenRows, domain_ids: Tensor | None, domain_counts: Sequence[int] | None = None
) -> GenerationSlices | None:
    """Tokens ``(...)`` sorted by generation; None if no generation has changes or rows of its own.

    For ``domain_counts`` see :meth:`GenerationSlices.of`.
    """
    if domain_ids is None or not (deltas or rows):
        return None
    return GenerationSlices.of(domain_ids.flatten(), deltas.num_generations, domain_counts)


def join_changes(matrices: Iterable[DeltaLinear | DeltaEmbedding]) -> None:
    """Lay the low-rank changes of each matrix side by side, for as long as the same ones train; see the top.

    What trains is seen as it changes; frozen changes are copied, and must not change.
    """
    owners: dict[tuple[int, ...], Owners] = {}
    for matrix in matrices:
        matrix.deltas.join(matrix.weight, owners)


def part_changes(matrices: Iterable[DeltaLinear | DeltaEmbedding]) -> None:
    """Undo :func:`join_changes`."""
    for matrix in matrices:
        matrix.deltas.joined = ()
