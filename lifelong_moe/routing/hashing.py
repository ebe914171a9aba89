"""Routing by token id alone: nothing is learned and nothing is read. A baseline, and the null of token clusters."""

from __future__ import annotations

import torch
from torch import Tensor

from lifelong_moe.routing.base import Router, Routing, RoutingContext, token_hash


class HashRouter(Router):
    """The k experts that rank highest in an order of all experts that the token id alone decides, weighted 1/k each.

    Each pair of token and expert has a fixed pseudo-random rank, so a new generation of n among E experts takes n/E of
    every distribution's assignments, new text's and old text's alike, and what it does not take stays where it was.

    Source:
        Hash layers (arXiv:2106.04426), random hash, there with K = 1 and a fixed number of experts; experts that come
        and go: rendezvous hashing (Thaler & Ravishankar 1998). Class A.
    """

    def add_experts(self, num: int) -> None:
        """Let ``num`` more experts take part."""
        self.generations.append(num)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Choose k experts for each token id."""
        num, newest, top_k = self.num_experts, self.generations[-1], self.config.top_k
        experts_E = torch.arange(num - newest if self.held_down else num, device=x_TD.device)
        # Hashed twice, so that the ranks of one token's experts have nothing to do with those of its neighbour's.
        ranks_TE = token_hash(token_hash(context.token_ids_T, self.layer).unsqueeze(1) ^ experts_E, salt=self.layer)
        # With the expert's index as the last digit no two ranks are equal.
        ids_TK = (ranks_TE * num + experts_E).topk(top_k, dim=-1).indices
        return Routing(ids_TK, torch.full(ids_TK.shape, 1.0 / top_k, device=x_TD.device), num)
