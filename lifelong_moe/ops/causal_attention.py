"""Causal attention of short sequences on a CPU. Its backward pass finds probabilities kept, and does not remake them.

Queries are taken a tile at a time, and a tile looks at the keys up to its own end only, so what is masked costs next to
nothing. Kept are half of the ``S²`` probabilities of each head, which is why it is for short sequences.

Legend: B batch, H query heads, J key and value heads, S sequence, W head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TILE = 32
"""Queries of a tile."""
SHORTEST, LONGEST = 129, 1024
"""Tokens of the sequences that this is faster for than the fused kernel, forward and backward on one thread: 0.75 of
its time at 256, 0.58 at 512, 0.81 at 1,024; at 64 it would be 1.2."""
MOST_KEPT = 2**24
"""Probabilities that one layer keeps at most; 64 MiB."""


class _CausalAttention(torch.autograd.Function):
    """Heads that share a key stand in one matrix: ``(B·J, H/J, S, W)``."""

    @staticmethod
    def forward(ctx: Any, query_BHSW: Tensor, key_BJSW: Tensor, value_BJSW: Tensor) -> Tensor:
        batch, heads, length, width = query_BHSW.shape
        groups, sharing = batch * key_BJSW.shape[1], heads // key_BJSW.shape[1]
        # Queries that share a key stand in one batch entry, so each key is read once. shape: (B·J, H/J, S, W)
        query = query_BHSW.reshape(groups, sharing, length, width)
        key, value = (x.reshape(groups, length, width) for x in (key_BJSW, value_BJSW))
        out, probs = torch.empty_like(query), []
        for start, end in _tiles(length):
            tile = query[:, :, start:end].reshape(groups, -1, width)
            scores = torch.bmm(tile, key[:, :end].transpose(1, 2)).mul_(width**-0.5)
            # Only the tile's own square holds later keys; every key before it is visible.
            later = torch.ones(end - start, end - start, dtype=torch.bool).triu_(1)
            scores.view(groups, sharing, end - start, end)[..., start:].masked_fill_(later, float("-inf"))
            # shape: (B·J, H/J · tile, end)
            probs.append(scores.softmax(dim=-1))
            out[:, :, start:end] = torch.bmm(probs[-1], value[:, :end]).view(groups, sharing, -1, width)
        ctx.save_for_backward(query, key, value, *probs)
        ctx.kv_shape = key_BJSW.shape
        return out.view(query_BHSW.shape)

    @staticmethod
    def backward(ctx: Any, grad_BHSW: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *probs = ctx.saved_tensors
        groups, _, length, width = query.shape
        grad = grad_BHSW.reshape(query.shape)
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for (start, end), tile_probs in zip(_tiles(length), probs, strict=True):
            tile = query[:, :, start:end].reshape(groups, -1, width)
            grad_tile = grad[:, :, start:end].reshape(groups, -1, width)
            grad_value[:, :end].baddbmm_(tile_probs.transpose(1, 2), grad_tile)
            grad_probs = torch.bmm(grad_tile, value[:, :end].transpose(1, 2))
            # The softmax's own backward kernel, from kept probabilities: no exponential is computed twice.
            grad_scores = torch._softmax_backward_data(grad_probs, tile_probs, -1, query.dtype).mul_(width**-0.5)
            grad_query[:, :, start:end] = torch.bmm(grad_scores, key[:, :end]).view(groups, -1, end - start, width)
            grad_key[:, :end].baddbmm_(grad_scores.transpose(1, 2), tile)
        return grad_query.view(grad_BHSW.shape), grad_key.view(ctx.kv_shape), grad_value.view(ctx.kv_shape)


def _tiles(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + TILE, length)) for start in range(0, length, TILE)]


def is_faster_here(query_BHSW: Tensor) -> bool:
    """Whether :func:`causal_attention` is the faster way to train: on a CPU, unrounded, in short sequences."""
    batch, heads, length, _ = query_BHSW.shape
    kept = batch * heads * length**2 // 2
    short = kept <= MOST_KEPT and SHORTEST <= length <= LONGEST
    # In half precision the probabilities that are kept would be rounded.
    exact = query_BHSW.dtype in (torch.float32, torch.float64)
    return short and exact and query_BHSW.device.type == "cpu" and torch.is_grad_enabled()


def causal_attention(query_BHSW: Tensor, key_BJSW: Tensor, value_BJSW: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(W)) v`` over keys that are not later, ``(B, H, S, W)``; H / J queries share a key.

    The same as ``F.scaled_dot_product_attention(..., is_causal=True, enable_gqa=True)`` in value and gradients.
    """
    return _CausalAttention.apply(query_BHSW, key_BJSW, value_BJSW)


def window_mask(length: int, num_positions: int, window: int, device: torch.device) -> Tensor:
    """Where the last of the positions may look: at themselves and the ``window - 1`` before, bool ``(1, 1, S, P)``.

    Source:
        Mistral 7B (arXiv:2310.06825), section 2, with the window's number of tokens as in its released code.
    """
    before = num_positions - length
    seen = torch.ones(length, num_positions, dtype=torch.bool, device=device)
    return seen.tril_(before).triu_(before - window + 1)[None, None]
