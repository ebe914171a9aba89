"""Rotary positions: frequencies, their forms for long contexts, tables of cosines and sines, and the rotation.

Legend: B batch, H heads, S sequence, P head width, A = P / 2 angles.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def inverse_frequencies(head_width: int, base: float, device: torch.device | None = None) -> Tensor:
    """Radians per position of each pair of a head, fastest first, float32 ``(A,)``.

    Source:
        RoFormer (arXiv:2104.09864), section 3.2.2.
    """
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width
    return base**-exponents


def llama3_frequencies(frequencies_A: Tensor, factor: float, turns: tuple[float, float], original: int) -> Tensor:
    """Frequencies of few turns in a context of pretraining are slowed, those of many stay, float32 ``(A,)``.

    Args:
        frequencies_A: As from :func:`inverse_frequencies`.
        factor: How much slower the slowest become.
        turns: In a context of pretraining: up to the first number all of it, from the second on nothing, and linear
            between both.
        original: Tokens of that context.

    Source:
        Llama 3.1's released code, ``apply_scaling``.
    """
    low, high = turns
    kept_A = ((original * frequencies_A / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return frequencies_A * kept_A + frequencies_A / factor * (1 - kept_A)


def yarn_frequencies(
    frequencies_A: Tensor,
    factor: float,
    turns: tuple[float, float],
    original: int,
    *,
    base: float,
    truncate: bool = True,
) -> Tensor:
    """As :func:`llama3_frequencies`, but linear in the number of the pair and not in its turns.

    Args:
        frequencies_A: As from :func:`inverse_frequencies`.
        factor: How much slower the slowest become.
        turns: In a context of pretraining: of the slowest pair that is slowed in full, and of the last that stays.
        original: Tokens of that context.
        base: Of the frequencies.
        truncate: Take whole numbers of pairs, away from each other.

    Source:
        YaRN (arXiv:2309.00071), section 3.2, and its released code.
    """
    num_angles = len(frequencies_A)
    width = 2 * num_angles

    def pair_of(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    last, first = pair_of(turns[1]), pair_of(turns[0])
    if truncate:
        last, first = math.floor(last), math.ceil(first)
    # The bound by the head's width, not by the number of its pairs, is the released code's.
    last, first = max(last, 0), min(first, width - 1)
    pairs_A = torch.arange(num_angles, dtype=torch.float32, device=frequencies_A.device)
    slowed_A = ((pairs_A - last) / ((first - last) or 0.001)).clamp(0, 1)
    return frequencies_A / factor * slowed_A + frequencies_A * (1 - slowed_A)


def yarn_attention_factor(factor: float, share: float = 1.0) -> float:
    """What cosines and sines are multiplied with, so that attention is as sharp as before.

    Source:
        YaRN (arXiv:2309.00071), eq. 22; ``share`` is ``mscale`` in DeepSeek-V2's released code.
    """
    return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0


def rotary_tables(num_positions: int, frequencies_A: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, times a factor, float32 ``(num_positions, P)`` each.

    Source:
        RoFormer (arXiv:2104.09864), eq. 34, with the halves rotated as in Llama and Mixtral.
    """
    positions = torch.arange(num_positions, dtype=torch.float32, device=frequencies_A.device)
    angles = positions.outer(frequencies_A)
    angles = torch.cat([angles, angles], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x_BHSP: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x_BHSP, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad_BHSP: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad_BHSP, cos, -sin), None, None


def _rotated(x_BHSP: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x_BHSP.shape[-1] // 2
    out = x_BHSP * cos
    out[..., :half].addcmul_(x_BHSP[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x_BHSP[..., :half], sin[..., half:])
    return out.to(x_BHSP.dtype)


def rotate(x_BHSP: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head's halves against each other by position; both halves of the tables are the same."""
    return _Rotate.apply(x_BHSP, cos, sin)
