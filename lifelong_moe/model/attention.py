"""Grouped-query attention with rotary positions.

Legend: B batch, S sequence, D model width, H query heads, J key and value heads, P positions in the cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_moe.model.config import ModelConfig
from lifelong_moe.model.deltas import BundleSlices, DeltaLinear

KeyValue = tuple[Tensor, Tensor]


def rotary_tables(num_positions: int, head_width: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, float32 ``(num_positions, head_width)`` each.

    Source:
        RoFormer (arXiv:2104.09864), eq. 34, with the halves rotated as in Llama and Mixtral.
    """
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width
    angles = torch.arange(num_positions, dtype=torch.float32, device=device).outer(base**-exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BHSP: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head's halves against each other by position."""
    first, second = x_BHSP.chunk(2, dim=-1)
    return (x_BHSP * cos + torch.cat([-second, first], dim=-1) * sin).to(x_BHSP.dtype)


class Attention(nn.Module):
    """Causal self-attention; ``heads`` queries share ``kv_heads`` keys and values. No biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_width = config.width // config.heads
        self.query = DeltaLinear(config.width, self.heads * self.head_width)
        self.key = DeltaLinear(config.width, self.kv_heads * self.head_width)
        self.value = DeltaLinear(config.width, self.kv_heads * self.head_width)
        self.output = DeltaLinear(self.heads * self.head_width, config.width)

    def forward(
        self,
        x_BSD: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        past: KeyValue | None,
        bundles: BundleSlices | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Attend.

        Args:
            x_BSD: Input ``(B, S, D)``.
            cos: Rotary cosines of these S positions ``(S, head_width)``.
            sin: Sines.
            mask: True where a query may look at a key, bool ``(B, 1, S, P)``; None means causal.
            past: Keys and values ``(B, J, P - S, head_width)`` of the positions before these.
            bundles: The B·S tokens by bundle, where the trunk has deltas.

        Returns:
            Output ``(B, S, D)``, and keys and values of all P positions.
        """
        batch, length, _ = x_BSD.shape
        shape = (batch, length, -1, self.head_width)
        query = rotate(self.query(x_BSD, bundles).view(shape).transpose(1, 2), cos, sin)
        key = rotate(self.key(x_BSD, bundles).view(shape).transpose(1, 2), cos, sin)
        value = self.value(x_BSD, bundles).view(shape).transpose(1, 2)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        repeat = self.heads // self.kv_heads
        mixed = F.scaled_dot_product_attention(
            query,
            key.repeat_interleave(repeat, dim=1),
            value.repeat_interleave(repeat, dim=1),
            attn_mask=mask,
            is_causal=mask is None and length > 1,
        )
        return self.output(mixed.transpose(1, 2).reshape(batch, length, -1), bundles), (key, value)
