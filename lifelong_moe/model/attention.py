"""Grouped-query attention with rotary positions.

Legend: B batch, S sequence, D model width, H query heads, J key and value heads, P positions in the cache, A angles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_moe.config.model import ModelConfig, QKNorm, RopeScaling, RopeType
from lifelong_moe.model.cache import LayerCache
from lifelong_moe.model.deltas import DeltaLinear, GenerationSlices
from lifelong_moe.ops.document_attention import Documents, document_attention
from lifelong_moe.ops.rotary import (
    inverse_frequencies,
    llama3_frequencies,
    rotary_tables,
    rotate,
    yarn_attention_factor,
    yarn_frequencies,
)


def softcapped_attention(
    query_BHSP: Tensor, key_BHPW: Tensor, value_BHPW: Tensor, mask: Tensor | None, cap: float, *, is_causal: bool
) -> Tensor:
    """Attention whose logits are bounded: ``softmax(mask(cap * tanh(q k^T / (sqrt(W) cap)))) v``, softmax in float32.

    Args:
        query_BHSP: Queries ``(B, H, S, W)``.
        key_BHPW: Keys ``(B, H, P, W)``.
        value_BHPW: Values.
        mask: True where a query may look, ``(B, 1, S, P)``.
        cap: The bound.
        is_causal: Let query ``s`` look at positions up to ``s`` only.

    Source:
        Grok-1's released code; Gemma 2 (arXiv:2408.00118), section 2.
    """
    # shape: (B, H, S, P)
    logits = (query_BHSP @ key_BHPW.transpose(-1, -2)).float() / query_BHSP.shape[-1] ** 0.5
    # Before the mask, or tanh would make -inf finite.
    logits = cap * (logits / cap).tanh()
    if is_causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return logits.softmax(dim=-1).to(value_BHPW.dtype) @ value_BHPW


def grouped_query_attention(query_BHSW: Tensor, key_BJPW: Tensor, value_BJPW: Tensor, mask: Tensor | None) -> Tensor:
    """Attention in which H / J queries share a key and a value, ``(B, H, S, W)``; causal without a mask.

    Args:
        query_BHSW: Queries; heads that share stand side by side.
        key_BJPW: Keys.
        value_BJPW: Values.
        mask: True where a query may look, ``(B, 1, S, P)``.

    Source:
        GQA (arXiv:2305.13245), section 2.2.
    """
    batch, heads, length, width = query_BHSW.shape
    sharing = heads // key_BJPW.shape[1]
    if length == 1:  # queries of one group look at the same keys, as if they were a sequence
        query_BJGW = query_BHSW.reshape(batch, -1, sharing, width)
        mixed_BJGW = F.scaled_dot_product_attention(query_BJGW, key_BJPW, value_BJPW, attn_mask=mask)
        return mixed_BJGW.reshape(query_BHSW.shape)
    # On CUDA the fused kernels that know groups take half precision and no mask; without one, logits are in memory.
    has_gqa = query_BHSW.device.type == "cpu" or (mask is None and query_BHSW.dtype != torch.float32)
    if not has_gqa:
        key_BJPW, value_BJPW = (x.repeat_interleave(sharing, dim=1) for x in (key_BJPW, value_BJPW))
    return F.scaled_dot_product_attention(
        query_BHSW, key_BJPW, value_BJPW, attn_mask=mask, is_causal=mask is None, enable_gqa=has_gqa
    )


@dataclass(frozen=True)
class AttentionContext:
    """Inputs of attention that all layers share."""

    rotary: tuple[Tensor, Tensor]
    """Cosines and sines of these S positions, each ``(S, head_width)``."""
    mask: Tensor | Documents | None = None
    """True where a query may look at a key, bool ``(B, 1, S, P)``; or documents, within which attention is causal;
    None means causal."""
    generations: GenerationSlices | None = None
    """The B·S tokens sorted by generation, if the trunk has deltas."""


def position_tables(config: ModelConfig, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a model's rotary angles, float32 ``(num_positions, head_width)`` each."""
    frequencies_A = inverse_frequencies(config.attention_width, config.rope_base, device)
    frequencies_A, factor = _scaled(frequencies_A, config.rope_scaling, config.rope_base)
    return rotary_tables(num_positions, frequencies_A, factor)


def _scaled(frequencies_A: Tensor, scaling: RopeScaling | None, base: float) -> tuple[Tensor, float]:
    """Frequencies for a longer context, and the factor on cosines and sines that goes with them."""
    if scaling is None:
        return frequencies_A, 1.0
    if scaling.rope_type == RopeType.linear:
        return frequencies_A / scaling.factor, 1.0
    original = scaling.original_max_position_embeddings
    assert original is not None  # the section requires it
    if scaling.rope_type == RopeType.llama3:
        turns = scaling.low_freq_factor, scaling.high_freq_factor
        return llama3_frequencies(frequencies_A, scaling.factor, turns, original), 1.0
    turns = scaling.beta_slow, scaling.beta_fast
    slowed_A = yarn_frequencies(frequencies_A, scaling.factor, turns, original, base=base, truncate=scaling.truncate)
    return slowed_A, scaling.attention_factor or yarn_attention_factor(scaling.factor)


class Attention(nn.Module):
    """Causal self-attention; ``heads`` queries share ``kv_heads`` keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_width, self.softcap = config.attention_width, config.attention_softcap
        self.clip = config.qkv_clip
        bias = config.attention_bias
        self.query = DeltaLinear(config.width, self.heads * self.head_width, bias=bias)
        self.key = DeltaLinear(config.width, self.kv_heads * self.head_width, bias=bias)
        self.value = DeltaLinear(config.width, self.kv_heads * self.head_width, bias=bias)
        self.output = DeltaLinear(self.heads * self.head_width, config.width)
        widths = {QKNorm.head: (self.head_width, self.head_width)}
        widths[QKNorm.full] = (self.heads * self.head_width, self.kv_heads * self.head_width)
        self.query_norm: nn.RMSNorm | None = None
        self.key_norm: nn.RMSNorm | None = None
        if config.qk_norm in widths:
            self.query_norm, self.key_norm = (nn.RMSNorm(w, eps=config.norm_eps) for w in widths[config.qk_norm])
        self.normalizes_heads = config.qk_norm == QKNorm.head

    def forward(self, x_BSD: Tensor, context: AttentionContext, cache: LayerCache | None = None) -> Tensor:
        """Attend: ``(B, S, D)`` to ``(B, S, D)``; a cache has the positions before these, and these are added to it."""
        mask, generations = context.mask, context.generations
        batch, length, _ = x_BSD.shape
        shape = (batch, length, -1, self.head_width)
        query = self._normalized(self.query(x_BSD, generations), self.query_norm, shape)
        key = self._normalized(self.key(x_BSD, generations), self.key_norm, shape)
        value = self.value(x_BSD, generations).view(shape)
        if self.clip is not None:
            query, key, value = (x.clamp(-self.clip, self.clip) for x in (query, key, value))
        # shape: (B, H, S, W) and (B, J, S, W)
        query, key = (rotate(x.transpose(1, 2), *context.rotary) for x in (query, key))
        value = value.transpose(1, 2)
        # After rotation: cached keys keep the angles of their own positions. shape: (B, J, P, W)
        if cache is not None:
            key, value = cache.extend(key, value)
        if self.softcap is None and isinstance(mask, Documents):
            mixed = document_attention(query, key, value, mask)
        elif self.softcap is None:
            mixed = grouped_query_attention(query, key, value, mask)  # type: ignore[arg-type]
        else:
            mask = mask.mask if isinstance(mask, Documents) else mask
            key, value = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (key, value))
            # A single new token may look at all of the cache.
            is_causal = mask is None and length > 1
            mixed = softcapped_attention(query, key, value, mask, self.softcap, is_causal=is_causal)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, -1), generations)

    def _normalized(self, x_BSO: Tensor, norm: nn.RMSNorm | None, shape: tuple[int, int, int, int]) -> Tensor:
        """Heads ``(B, S, H, head_width)``, normalized each by itself, or all together before they are divided."""
        if norm is None:
            return x_BSO.view(shape)
        return norm(x_BSO.view(shape)) if self.normalizes_heads else norm(x_BSO).view(shape)
