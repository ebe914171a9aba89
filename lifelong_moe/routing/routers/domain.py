"""Routing by domain: a token's domain (document cluster or label) owns a set of experts. Never trained.

Legend: T tokens, D model width, K experts per token, G domains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lifelong_moe.config.routing.base import RoutingConfig
from lifelong_moe.config.routing.routers import ClusterConfig
from lifelong_moe.routing.base import Router, Routing, RoutingContext, hashed_experts


class DomainRouter(Router):
    """Each domain owns consecutive experts of its generation; a token uses ``top_k`` of them, weighted 1/k.

    A domain with exactly ``top_k`` experts uses them all; in a larger one the token id's hash chooses. Domains are
    numbered through all generations, oldest first; a token whose domain does not exist here goes to domain 0.
    """

    starts_G: Tensor
    sizes_G: Tensor

    def __init__(self, config: RoutingConfig, *, width: int, layer: int) -> None:
        super().__init__(config, width=width, layer=layer)
        # Structure, not state: rebuilt from the generations, hence not persistent, and with memory in each model.
        self.register_buffer("starts_G", torch.zeros(0, dtype=torch.int64, device="cpu"), persistent=False)
        self.register_buffer("sizes_G", torch.zeros(0, dtype=torch.int64, device="cpu"), persistent=False)

    def domains_of(self, num_experts: int) -> int:
        """How many domains a generation of ``num_experts`` experts is divided into."""
        raise TypeError(f"{type(self).__name__} must implement domains_of(num_experts)")

    def add_experts(self, num: int) -> None:
        """Give the new generation's experts to its domains: as evenly as it goes, the last takes the rest."""
        start, domains = self.num_experts, self.domains_of(num)
        size = num // domains
        starts = [start + g * size for g in range(domains)]
        sizes = [size] * (domains - 1) + [num - size * (domains - 1)]
        self.starts_G = torch.cat([self.starts_G, torch.tensor(starts, device=self.starts_G.device)])
        self.sizes_G = torch.cat([self.sizes_G, torch.tensor(sizes, device=self.sizes_G.device)])
        self.generations.append(num)

    @property
    def num_domains(self) -> int:
        """Domains over all generations."""
        return len(self.starts_G)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Choose ``top_k`` experts of each token's domain."""
        top_k = self.config.top_k
        # A domain that this layer does not know goes to the first.
        domain_T = torch.where(context.domain_ids_T < self.num_domains, context.domain_ids_T, 0)
        ids_TK = hashed_experts(
            context.token_ids_T, self.starts_G[domain_T], self.sizes_G[domain_T], top_k, salt=self.layer
        )
        return Routing(ids_TK, torch.full(ids_TK.shape, 1.0 / top_k, device=x_TD.device), self.num_experts)


class LabelRouter(DomainRouter):
    """One domain a generation: the distribution that a stage learned owns the experts born in that stage.

    Source:
        DEMix layers (arXiv:2108.05036), there with one expert a domain.
    """

    def domains_of(self, num_experts: int) -> int:
        """One."""
        return 1


class DocumentRouter(DomainRouter):
    """One domain a document cluster; which cluster a chunk belongs to is decided from the text before it.

    Source:
        c-BTM (arXiv:2303.14177): balanced clusters of tf-idf features; there each cluster trains a whole model and
        inference mixes several, here it owns experts.
    """

    config: ClusterConfig

    def domains_of(self, num_experts: int) -> int:
        """``routing.clusters``, or one for every ``top_k`` experts."""
        return self.config.num_clusters(num_experts)
