"""Routing by token id alone: nothing is learned and nothing is read. A baseline, and the null of token clusters."""

from __future__ import annotations

import torch
from torch import Tensor

from lifelong_moe.config.routing.routers import HashConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.routing.base import Router, Routing, RoutingContext, token_hash


class HashRouter(Router):
    """The k experts that rank highest in an order of all experts that the token id alone decides, weighted 1/k each.

    Each pair of token and expert has a fixed pseudo-random rank, so a new generation of n among E experts takes n/E of
    every distribution's assignments, new text's and old text's alike, and what it does not take stays where it was.
    With ``expert_groups`` a token uses the highest of each group, at weight 1: experts are then segments of a network
    that each have their own hash. With a ``table`` it uses the expert of its bucket; layers count from another one
    each.

    Source:
        Hash layers (arXiv:2106.04426): random, balanced and clustered hashes, there with K = 1 and a fixed number of
        experts, and MultiHash; experts that come and go: rendezvous hashing (Thaler & Ravishankar 1998). Class A.
    """

    config: HashConfig

    def add_experts(self, num: int) -> None:
        """Let ``num`` more experts take part."""
        if num % self.config.expert_groups:
            raise ConfigError(f"routing.expert_groups={self.config.expert_groups} must divide the experts ({num}).")
        self.generations.append(num)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Choose experts for each token id."""
        num, groups, top_k = self.num_experts, self.config.expert_groups, self.config.top_k
        if self.config.has_table:
            ids_T1 = ((context.buckets_of[num] + self.layer) % num).unsqueeze(1)
            return Routing(ids_T1, torch.ones(ids_T1.shape, device=x_TD.device), num)
        experts_E = torch.arange(self.num_available, device=x_TD.device)
        # Hashed twice, so that the ranks of one token's experts have nothing to do with those of its neighbour's.
        ranks_TE = token_hash(token_hash(context.token_ids_T, self.layer).unsqueeze(1) ^ experts_E, salt=self.layer)
        # With the expert's index as the last digit no two ranks are equal.
        ranks_TE = ranks_TE * num + experts_E
        if groups == 1:
            ids_TK = ranks_TE.topk(top_k, dim=-1).indices
            return Routing(ids_TK, torch.full(ids_TK.shape, 1.0 / top_k, device=x_TD.device), num)
        sizes = [n // groups for n in self.available for _ in range(groups)]
        group_E = self.owners(sizes, x_TD.device) % groups
        of_group = [ranks_TE.masked_fill(group_E != g, -1).argmax(dim=1) for g in range(groups)]
        ids_TK = torch.stack(of_group, dim=1)
        return Routing(ids_TK, torch.ones(ids_TK.shape, device=x_TD.device), num)
