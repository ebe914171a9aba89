"""One layer of the decoder: attention and a mixture of experts, each added to the stream.

Legend: B batch, S sequence, T = B·S tokens, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lifelong_moe.config.model import SharedMix
from lifelong_moe.config.parts import Part, Place
from lifelong_moe.model.attention import Attention, AttentionContext
from lifelong_moe.model.cache import LayerCache
from lifelong_moe.model.experts import ExpertBanks, WholeExperts
from lifelong_moe.model.feedforward import FeedForward
from lifelong_moe.model.moe import DenseLayer, MoELayer
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.routing.base import Routing, RoutingContext
from lifelong_moe.routing.registry import build_router


class Block(nn.Module):
    """Norm, attention, norm, mixture of experts, each added to the stream."""

    def __init__(self, architecture: Architecture, layer: int, *, causal: bool = True) -> None:
        super().__init__()
        config = architecture.model
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.moe = build_moe(architecture, layer, causal=causal)
        self.attention_out_norm: nn.RMSNorm | None = None
        self.moe_out_norm: nn.RMSNorm | None = None
        if config.sandwich_norms:
            self.attention_out_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
            self.moe_out_norm = nn.RMSNorm(config.width, eps=config.norm_eps)

        self.recomputes = False
        """Whether attention is recomputed in the backward pass."""

    def places(self, layer: int) -> dict[nn.Parameter, Place]:
        """The place of each parameter, given the index of this layer."""
        found = self.moe.places(layer)
        found |= dict.fromkeys(self.attention.parameters(), Place(Part.attention, layer))
        for module in self.children():
            if isinstance(module, nn.RMSNorm):
                found |= dict.fromkeys(module.parameters(), Place(Part.norm, layer))
        return found

    def residual_weights(self) -> list[Tensor]:
        """The matrices that write into the residual stream, which are initialized smaller."""
        feed_forwards = (module for module in self.moe.modules() if isinstance(module, FeedForward | WholeExperts))
        return [self.attention.output.weight, *(module.down for module in feed_forwards)]

    def forward(
        self, x_BSD: Tensor, attention: AttentionContext, routing: RoutingContext, cache: LayerCache | None = None
    ) -> tuple[Tensor, Routing]:
        """``(B, S, D)`` to ``(B, S, D)``, and the router's decision."""
        # shape: (B, S, D)
        x_BSD = self.attend(x_BSD, attention, cache)
        # shape: (T, D): routers see tokens, not sequences
        out_TD, decided = self.moe(self.moe_norm(x_BSD).flatten(0, 1), routing)
        out_TD = out_TD if self.moe_out_norm is None else self.moe_out_norm(out_TD)
        return x_BSD + out_TD.view_as(x_BSD), decided

    def decide(self, x_BSD: Tensor, attention: AttentionContext, routing: RoutingContext) -> Routing:
        """The router's decision on ``(B, S, D)``, without experts."""
        return self.moe.decide(self.moe_norm(self.attend(x_BSD, attention, None)).flatten(0, 1), routing)

    def attend(self, x_BSD: Tensor, context: AttentionContext, cache: LayerCache | None) -> Tensor:
        """Attention and its residual connection."""
        # Without gradients nothing is stored, and there is nothing to recompute.
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(self._attend, x_BSD, context, cache, use_reentrant=False)
        return self._attend(x_BSD, context, cache)

    def _attend(self, x_BSD: Tensor, context: AttentionContext, cache: LayerCache | None) -> Tensor:
        mixed = self.attention(self.attention_norm(x_BSD), context, cache)
        return x_BSD + (mixed if self.attention_out_norm is None else self.attention_out_norm(mixed))


def build_moe(architecture: Architecture, layer: int, *, causal: bool) -> MoELayer:
    """A layer's mixture of experts, without experts yet, or its dense network."""
    config = architecture.model
    router = build_router(architecture.routing, width=config.width, layer=layer, causal=causal)
    banks = ExpertBanks(config.width, config.expert_width, config.activation)
    if layer not in config.moe_layers:
        # By default as wide as the experts that a token uses, so that the layers cost the same.
        dense_width = config.dense_width or config.expert_width * architecture.routing.top_k
        return DenseLayer(router, banks, FeedForward(config.width, dense_width, config.dense_activation))
    if not config.shared_experts:
        return MoELayer(router, banks)
    # Several shared experts are one wider network.
    shared = FeedForward(config.width, config.shared_experts * config.expert_width, config.activation)
    return MoELayer(router, banks, shared, mixes=config.shared_mix == SharedMix.learned)
