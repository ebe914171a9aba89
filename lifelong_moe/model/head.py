"""From final hidden states to next tokens: logits, and losses without all of them in memory.

Legend: B batch, S sequence, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lifelong_moe.model.deltas import DeltaLinear
from lifelong_moe.ops.losses import linear_cross_entropy, token_nats
from lifelong_moe.routing.base import Routing


class LinearHead(DeltaLinear):
    """Logits are the product of a hidden state and one matrix ``(V, D)``, which may have deltas."""

    @property
    def is_one_matrix(self) -> bool:
        """Whether the matrix is the same for every token."""
        return not self.deltas

    def read(self, hidden_BSD: Tensor, routing: Routing) -> Tensor:
        """What the head reads of the final hidden states and the last layer's routing, one row per token."""
        return hidden_BSD

    def logits(self, hidden: Tensor, domain_ids: Tensor | None = None) -> Tensor:
        """Logits ``(..., V)`` of hidden states ``(..., D)``, whose domains ``(...)`` matter with deltas only."""
        return self(hidden, self.deltas.slices(domain_ids))

    def cross_entropy(self, hidden_TD: Tensor, target_T: Tensor, domain_ids_T: Tensor | None = None) -> Tensor:
        """Mean next-token loss in nats, scalar float32; all logits are never in memory at once."""
        # Means over each generation's tokens, weighted by their number: the mean over all tokens.
        parts = [
            linear_cross_entropy(hidden_TD[rows], self.weight_of(generation), target_T[rows]) * share
            for generation, rows, share in self._slices(domain_ids_T)
        ]
        return torch.stack(parts).sum()

    @torch.no_grad()
    def token_nats(self, hidden_TD: Tensor, target_T: Tensor, domain_ids_T: Tensor | None = None) -> Tensor:
        """Next-token loss of each token in nats, float32 ``(T,)``; no gradient."""
        nats_T = torch.empty(len(target_T), device=hidden_TD.device)
        for generation, rows, _ in self._slices(domain_ids_T):
            nats_T[rows] = token_nats(hidden_TD[rows], self.weight_of(generation), target_T[rows])
        return nats_T

    def _slices(self, domain_ids_T: Tensor | None) -> Iterator[tuple[int, Tensor | slice, float]]:
        """Each generation in use, its tokens, and their share of all."""
        generations = self.deltas.slices(domain_ids_T)
        if generations is None:
            yield 0, slice(None), 1.0
            return
        for generation, rows in enumerate(generations.order_T.split(generations.counts)):
            if len(rows):
                yield generation, rows, len(rows) / len(generations.order_T)
