"""Low-rank changes of the trunk that belong to one stage: only tokens of that stage's bundle use them.

A bundle is what one stage gave the model: a generation of experts, their router rows, and these deltas. Bundle g is
the g-th generation, counted from 0; the first stage trains the trunk itself and has no deltas.

Legend: B batch, S sequence, T = B·S tokens, I input width, O output width, R rank, V vocabulary, D model width.

Source:
    LoRA (arXiv:2106.09685), without its scale; there one delta a task for all tokens, here one a stage, chosen per
    token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_moe.ops.dispatch import inverse_permutation, permute, sort_by_expert
from lifelong_moe.ops.few_rows import linear


@dataclass(frozen=True)
class BundleSlices:
    """The tokens of a batch sorted by bundle, so that each bundle's tokens are one slice."""

    order_T: Tensor
    inverse_T: Tensor
    counts: list[int]
    """Tokens of each bundle."""

    @classmethod
    def of(cls, domain_ids_T: Tensor, num_bundles: int) -> BundleSlices:
        """Sort tokens by bundle; a bundle that the model does not have counts as bundle 0."""
        known_T = torch.where(domain_ids_T < num_bundles, domain_ids_T, 0)
        order_T, counts = sort_by_expert(known_T, num_bundles)
        return cls(order_T, inverse_permutation(order_T), counts.tolist())

    def apply(self, x_TI: Tensor, function: Callable[[int, Tensor], Tensor]) -> Tensor:
        """``function(bundle, rows)`` on each bundle's rows, put back in the order of the tokens."""
        if max(self.counts) == len(x_TI):
            return function(self.counts.index(len(x_TI)), x_TI)
        rows = permute(x_TI, self.order_T, self.inverse_T) if x_TI.is_floating_point() else x_TI[self.order_T]
        parts = [function(g, part) for g, part in enumerate(rows.split(self.counts)) if len(part)]
        return permute(torch.cat(parts), self.inverse_T, self.order_T)


def apply_readable(
    x_TI: Tensor, domain_ids_T: Tensor, num_bundles: int, function: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """What :meth:`BundleSlices.apply` computes, one token at a time: the oracle of the fast path; slow."""
    known = [group if group < num_bundles else 0 for group in domain_ids_T.tolist()]
    return torch.cat([function(bundle, x_TI[t : t + 1]) for t, bundle in enumerate(known)])


class LowRank(nn.Module):
    """A change ``up @ down`` of a matrix ``(O, I)``; zero until it is trained, since ``up`` begins at zero."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.down = nn.Parameter(torch.zeros(rank, columns))

    @torch.no_grad()
    def begin(self, generator: torch.Generator) -> None:
        """``up`` at zero, so that it changes nothing yet, and ``down`` at random."""
        self.up.zero_()
        self.down.copy_(torch.randn(self.down.shape, generator=generator) / self.down.shape[1] ** 0.5)

    def forward(self) -> Tensor:
        """The change, ``(O, I)``."""
        return self.up @ self.down


class Deltas(nn.ModuleDict):
    """The low-rank changes of one matrix by bundle."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bundles = 0
        """How many there are, with a change of this matrix or without."""

    def add_bundle(self, base_OI: Tensor, rank: int) -> None:
        """Make room for one more bundle's change of a matrix; rank 0 is none."""
        if rank:
            self[str(self.num_bundles)] = LowRank(base_OI.shape[0], base_OI.shape[1], rank)
        self.num_bundles += 1

    def slices(self, domain_ids: Tensor | None) -> BundleSlices | None:
        """Tokens ``(...)`` by bundle; None where that makes no difference."""
        if domain_ids is None or not self:
            return None
        return BundleSlices.of(domain_ids.flatten(), self.num_bundles)

    def of(self, bundle: int) -> LowRank | None:
        """A bundle's change; None if it has none."""
        return self._modules.get(str(bundle))  # type: ignore[return-value]

    def weight(self, base_OI: Tensor, bundle: int) -> Tensor:
        """The matrix as a bundle's tokens see it."""
        delta = self.of(bundle)
        return base_OI if delta is None else base_OI + delta()


class DeltaLinear(nn.Linear):
    """A linear map without bias whose weight may change by bundle."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows, bias=False)
        self.deltas = Deltas()

    def add_bundle(self, rank: int) -> None:
        """Add a bundle, with a change of its own if its rank is not 0."""
        self.deltas.add_bundle(self.weight, rank)

    def weight_of(self, bundle: int) -> Tensor:
        """The weight ``(O, I)`` that a bundle's tokens use."""
        return self.deltas.weight(self.weight, bundle)

    def forward(self, x: Tensor, bundles: BundleSlices | None = None) -> Tensor:
        """``(…, I)`` to ``(…, O)``; the leading dimensions are the tokens that ``bundles`` sorts."""
        if bundles is None or not self.deltas:
            return linear(x, self.weight)
        out_TO = bundles.apply(x.flatten(0, -2), lambda g, rows: linear(rows, self.weight_of(g)))
        return out_TO.view(*x.shape[:-1], -1)


class DeltaEmbedding(nn.Embedding):
    """Token vectors that may change by bundle."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__(vocab_size, width)
        self.deltas = Deltas()

    def add_bundle(self, rank: int) -> None:
        """Add a bundle, with a change of its own if its rank is not 0."""
        self.deltas.add_bundle(self.weight, rank)

    def forward(self, token_ids_BS: Tensor, bundles: BundleSlices | None = None) -> Tensor:
        """int64 ``(B, S)`` to ``(B, S, D)``."""
        if bundles is None or not self.deltas:
            return F.embedding(token_ids_BS, self.weight)
        out_TD = bundles.apply(token_ids_BS.flatten(), self._look_up)
        return out_TD.view(*token_ids_BS.shape, -1)

    def _look_up(self, bundle: int, token_ids_N: Tensor) -> Tensor:
        base_ND, delta = F.embedding(token_ids_N, self.weight), self.deltas.of(bundle)
        return base_ND if delta is None else base_ND + F.embedding(token_ids_N, delta.up) @ delta.down
