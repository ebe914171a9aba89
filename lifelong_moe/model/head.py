"""From final hidden states to next tokens: logits, and losses without all of them in memory.

Legend: B batch, S sequence, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong_moe.model.deltas import DeltaLinear, GenerationSlices, TokenRows, generation_slices
from lifelong_moe.ops.few_rows import linear
from lifelong_moe.ops.losses import linear_cross_entropy, linear_losses, token_nats
from lifelong_moe.routing.base import Routing


class LinearHead(DeltaLinear):
    """Logits are the product of a hidden state and one matrix ``(V, D)``, which may have deltas and added rows.

    A generation predicts the tokens of its own vocabulary: its rows, those of the generations before it, and no others,
    so nothing that is added later takes any of its probability.
    """

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows)
        self.added = TokenRows()

    @property
    def is_one_matrix(self) -> bool:
        """Whether the matrix is the same for every token."""
        return not self.deltas and not self.added

    def slices(self, domain_ids: Tensor | None, domain_counts: Sequence[int] | None = None) -> GenerationSlices | None:
        """Tokens ``(...)`` sorted by generation; None if all use the same matrix.

        Raises:
            ValueError: If generations have changes or rows, and nothing says which one each token belongs to.
        """
        if domain_ids is None and not self.is_one_matrix:
            raise ValueError("generations have heads of their own: give the domain_ids that the model has read.")
        return generation_slices(self.deltas, self.added, domain_ids, domain_counts)

    def weight_of(self, generation: int) -> Tensor:
        """The weight that a generation's tokens use, as many rows as its vocabulary has tokens."""
        known, added = super().weight_of(generation), self.added.until(generation)
        # In the matrix's type, which `cat` would widen where a frozen one is held in fewer bits.
        return torch.cat([known, *(rows.to(known.dtype) for rows in added)]) if added else known

    def read(self, hidden_BSD: Tensor, routing: Routing) -> Tensor:
        """What the head reads of the final hidden states and the last layer's routing, one row per token."""
        return hidden_BSD

    def logits(
        self, hidden: Tensor, domain_ids: Tensor | None = None, domain_counts: Sequence[int] | None = None
    ) -> Tensor:
        """Logits of hidden states ``(..., D)``, whose domains ``(...)`` matter where generations have deltas or rows.

        Returns:
            ``(..., V)``, V of all vocabularies: minus infinity for tokens of generations after the hidden state's own.
        """
        generations = self.slices(domain_ids, domain_counts)
        if not self.added:
            return self(hidden, generations)
        num_tokens = len(self.weight) + sum(len(rows) for rows in self.added.values())

        def of(generation: int, hidden_ND: Tensor) -> Tensor:
            logits_NV = linear(hidden_ND, self.weight_of(generation))
            return F.pad(logits_NV, (0, num_tokens - logits_NV.shape[-1]), value=float("-inf"))

        hidden_TD = hidden.flatten(0, -2)
        logits_TV = of(0, hidden_TD) if generations is None else generations.apply(hidden_TD, of)
        return logits_TV.view(*hidden.shape[:-1], -1)

    def cross_entropy(
        self,
        hidden_TD: Tensor,
        target_T: Tensor,
        domain_ids_T: Tensor | None = None,
        domain_counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Mean next-token loss in nats, scalar float32; all logits are never in memory at once.

        With ``domain_counts``, the number of tokens of each domain, the host need not wait for the device.
        """
        generations = self.slices(domain_ids_T, domain_counts)
        if generations is not None and self.deltas.joined and not self.added:
            changes = self.deltas.factors(hidden_TD, generations)
            return linear_losses(hidden_TD, self.weight, target_T, changes=changes)[0]
        # Means over each generation's tokens, weighted by their number: the mean over all tokens.
        parts = [
            linear_cross_entropy(hidden_TD[rows], self.weight_of(generation), target_T[rows]) * share
            for generation, rows, share in _slices(generations)
        ]
        return torch.stack(parts).sum()

    @torch.no_grad()
    def token_nats(self, hidden_TD: Tensor, target_T: Tensor, domain_ids_T: Tensor | None = None) -> Tensor:
        """Next-token loss of each token in nats, float32 ``(T,)``; no gradient."""
        nats_T = torch.empty(len(target_T), device=hidden_TD.device)
        for generation, rows, _ in _slices(self.slices(domain_ids_T)):
            nats_T[rows] = token_nats(hidden_TD[rows], self.weight_of(generation), target_T[rows])
        return nats_T


def _slices(generations: GenerationSlices | None) -> Iterator[tuple[int, Tensor | slice, float]]:
    """Each generation in use, its tokens, and their share of all."""
    if generations is None:
        yield 0, slice(None), 1.0
        return
    first = 0
    for generation, count in enumerate(generations.counts):
        if count:
            rows = generations.order_T[first : first + count]
            yield generation, rows, count / len(generations.order_T)
        first += count
