"""Token-level clustered routing: FAISS centroids as a frozen linear router. Never trained."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong_moe.config.routing.base import Level
from lifelong_moe.config.routing.routers import ClusterConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.routing.base import Router, Routing, RoutingContext, hashed_experts
from lifelong_moe.routing.routers.domain import DocumentRouter


def build_cluster_router(config: ClusterConfig, *, width: int, layer: int) -> Router:
    """The router of ``routing.mode=cluster`` at ``routing.level``."""
    build = TokenClusterRouter if config.level == Level.token else DocumentRouter
    return build(config, width=width, layer=layer)


class TokenClusterRouter(Router):
    """The k centroids with the largest ``x·c``, weighted ``softmax(scale · x·c)`` over those k.

    ``x`` is the token's frozen feature (``features=embedding``) or the layer's input (``features=hidden``), at unit
    length; centroids have unit length and are buffers, one per generation. A later stage adds centroids and leaves
    the old ones untouched; with ``bundles`` a token sees those of its own generation alone. Until its first centroids
    are set, the router hashes token ids.

    Source:
        Clusters before training: c-BTM (arXiv:2303.14177), there of documents; hashing until the first fit: Hash
        layers (arXiv:2106.04426). Class A.
    """

    config: ClusterConfig

    def __init__(self, config: ClusterConfig, *, width: int, layer: int) -> None:
        super().__init__(config, width=width, layer=layer)
        self.feature_width = width if config.clusters_hidden else config.feature_width
        self.hashing = True

    def add_experts(self, num: int) -> None:
        """Make room for ``num`` centroids, all zero until :meth:`set_rows`."""
        device = self.centroids()[0].device if self.generations else None
        zeros = torch.zeros(num, self.feature_width, device=device)
        self.register_buffer(f"centroids_{len(self.generations)}", zeros)
        self.generations.append(num)

    def set_rows(self, rows_ED: Tensor) -> None:
        """Set the newest generation's centroids ``(num, F)``; from now on they route."""
        buffer = self.centroids()[-1]
        if rows_ED.shape != buffer.shape:
            raise ConfigError(f"layer {self.layer} needs centroids of shape {tuple(buffer.shape)}.")
        with torch.no_grad():
            buffer.copy_(rows_ED)
        self.hashing = False

    def centroids(self) -> list[Tensor]:
        """Each generation's centroids ``(E_g, F)``, oldest first."""
        return [getattr(self, f"centroids_{i}") for i in range(len(self.generations))]

    def features(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """What is compared with centroids: float32 ``(T, F)`` at unit length."""
        x = x_TD if context.features_TF is None else context.features_TF
        # Detached: centroids are fixed, and routing must not shape hidden states.
        return F.normalize(x.detach().float(), dim=-1)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Choose the k nearest centroids; before the first fit, k experts by token hash."""
        top_k = self.config.top_k
        if self.hashing:
            start_T = torch.zeros_like(context.token_ids_T)
            size_T = torch.full_like(context.token_ids_T, self.num_available)
            ids_TK = hashed_experts(context.token_ids_T, start_T, size_T, top_k, salt=self.layer)
            return Routing(ids_TK, torch.full(ids_TK.shape, 1.0 / top_k, device=x_TD.device), self.num_experts)
        with torch.autocast(x_TD.device.type, enabled=False):
            features_TF, allowed_TE = self.features(x_TD, context), self.allowed(context)
            # A product each, as a LinearRouter's rows have.
            unmasked = self.centroids()[: len(self.available)]
            scores_TE = torch.cat([F.linear(features_TF, c.float()) for c in unmasked], dim=-1)
            if allowed_TE is not None:
                scores_TE = scores_TE.masked_fill(~allowed_TE, -math.inf)
            chosen_TK, ids_TK = scores_TE.topk(top_k, dim=-1)
            weights_TK = (self.config.scale * chosen_TK).softmax(dim=-1)
        return Routing(ids_TK, weights_TK, self.num_experts)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # Unset centroids are exactly zero, so the tensors themselves say whether clusters have been fitted.
        self.hashing = not (self.generations and bool(self.centroids()[0].any()))
