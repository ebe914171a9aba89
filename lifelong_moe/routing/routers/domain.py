"""Routing by group: a token's group (document cluster or label) owns a set of experts. Never trained."""

from __future__ import annotations

import torch
from torch import Tensor

from lifelong_moe.config.routing.base import RoutingConfig
from lifelong_moe.config.routing.routers import ClusterConfig
from lifelong_moe.routing.base import Router, Routing, RoutingContext, hashed_experts


class DomainRouter(Router):
    """Each group owns consecutive experts of its generation; a token uses ``top_k`` of them, weighted 1/k.

    A group with exactly ``top_k`` experts uses them all; in a larger one the token id's hash chooses. Groups are
    numbered through all generations, oldest first; a token whose group does not exist here goes to group 0.
    """

    starts_G: Tensor
    sizes_G: Tensor

    def __init__(self, config: RoutingConfig, *, width: int, layer: int) -> None:
        super().__init__(config, width=width, layer=layer)
        # Structure, not state: rebuilt from the generations, hence not persistent.
        self.register_buffer("starts_G", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("sizes_G", torch.zeros(0, dtype=torch.int64), persistent=False)

    def groups_of(self, num_experts: int) -> int:
        """How many groups a generation of ``num_experts`` experts is divided into."""
        raise TypeError(f"{type(self).__name__} must implement groups_of(num_experts)")

    def add_experts(self, num: int) -> None:
        """Give the new generation's experts to its groups: as evenly as it goes, the last takes the rest."""
        start, groups = self.num_experts, self.groups_of(num)
        size = num // groups
        starts = [start + g * size for g in range(groups)]
        sizes = [size] * (groups - 1) + [num - size * (groups - 1)]
        self.starts_G = torch.cat([self.starts_G, torch.tensor(starts, device=self.starts_G.device)])
        self.sizes_G = torch.cat([self.sizes_G, torch.tensor(sizes, device=self.sizes_G.device)])
        self.generations.append(num)

    @property
    def num_domains(self) -> int:
        """Groups over all generations."""
        return len(self.starts_G)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Choose ``top_k`` experts of each token's group."""
        top_k = self.config.top_k
        # A domain that this layer does not know goes to the first.
        domain_T = torch.where(context.domain_ids_T < self.num_domains, context.domain_ids_T, 0)
        ids_TK = hashed_experts(
            context.token_ids_T, self.starts_G[domain_T], self.sizes_G[domain_T], top_k, salt=self.layer
        )
        return Routing(ids_TK, torch.full(ids_TK.shape, 1.0 / top_k, device=x_TD.device), self.num_experts)


class LabelRouter(DomainRouter):
    """One group a generation: the distribution that a stage learned owns the experts born in that stage.

    Source:
        DEMix layers (arXiv:2108.05036), there with one expert a domain.
    """

    def groups_of(self, num_experts: int) -> int:
        """One."""
        return 1


class DocumentRouter(DomainRouter):
    """One group a document cluster; which cluster a chunk belongs to is decided from the text before it.

    Source:
        c-BTM (arXiv:2303.14177): balanced clusters of tf-idf features; there each cluster trains a whole model and
        inference mixes several, here it owns experts.
    """

    config: ClusterConfig

    def groups_of(self, num_experts: int) -> int:
        """``routing.clusters``, or one for every ``top_k`` experts."""
        return self.config.num_clusters(num_experts)
