"""A small non-causal encoder of the decoder's blocks: patches in place of tokens, a class in place of the next token.

It serves routers that a decoder cannot use: Soft MoE and batch-priority routing. No command trains it.

Legend: B images, S patches, W values of a patch, D model width, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lifelong_moe.model.attention import AttentionContext
from lifelong_moe.model.block import Block
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.routing.base import Routing, RoutingContext


class Encoder(nn.Module):
    """Patch projection, learned positions, blocks with full attention, mean over patches, class head.

    Args:
        architecture: Shape, routing and experts; ``vocab_size`` is the number of classes, ``model.context`` that of
            patches.
        patch_width: W.

    Source:
        ViT (arXiv:2010.11929), there with LayerNorm, a class token and biases; V-MoE (arXiv:2106.05974).
    """

    def __init__(self, architecture: Architecture, patch_width: int) -> None:
        super().__init__()
        config = architecture.model
        self.architecture = architecture
        self.patches = nn.Linear(patch_width, config.width)
        self.positions = nn.Parameter(torch.randn(config.context, config.width) * config.init_std)
        self.blocks = nn.ModuleList(Block(architecture, layer, causal=False) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, architecture.vocab_size)
        for layer, block in enumerate(self.blocks):
            for generation in architecture.generations:
                block.moe.add_experts(generation.experts_in(layer))  # type: ignore[operator, union-attr]
        as_made = {p for block in self.blocks for p in block.moe.router.preset_parameters()}  # type: ignore[operator, union-attr]
        for parameter in self.blocks.parameters():
            if parameter.dim() > 1 and parameter not in as_made:
                nn.init.normal_(parameter, std=config.init_std)
        for block in self.blocks:
            block.moe.initialize()  # type: ignore[operator, union-attr]

    def forward(self, patches_BSW: Tensor) -> tuple[Tensor, list[Routing]]:
        """Class logits ``(B, C)``, and each layer's routing decision."""
        batch, length, _ = patches_BSW.shape
        # shape: (B, S, D)
        x_BSD = self.patches(patches_BSW) + self.positions[:length]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=x_BSD.device)
        # Rotation by an angle of 0: positions are learned and added instead.
        still = x_BSD.new_ones(length, self.architecture.model.attention_width)
        attention = AttentionContext((still, torch.zeros_like(still)), mask)
        nobody_T = torch.zeros(batch * length, dtype=torch.int64, device=x_BSD.device)
        context = RoutingContext(nobody_T, torch.ones_like(nobody_T, dtype=torch.bool), nobody_T, num_sequences=batch)
        routings = []
        for block in self.blocks:
            x_BSD, routing = block(x_BSD, attention, context)
            routings.append(routing)
        return self.head(self.norm(x_BSD).mean(dim=1)), routings
