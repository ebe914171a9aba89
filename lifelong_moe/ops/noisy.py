"""Noisy top-k gating: how likely an expert would be chosen if its noise were drawn again. Pure.

Legend: B sequences, T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lifelong_moe.ops.router_losses import cv_squared


def prob_in_top_k(clean_TE: Tensor, noisy_TE: Tensor, deviation_TE: Tensor, top_k: int) -> Tensor:
    """Probability that an expert is among the k largest, if only its own noise were drawn again.

    ``Φ((clean − threshold) / deviation)``; the threshold is the k-th largest noisy value of all *other* experts. The
    sum over a token's experts is not k.

    Args:
        clean_TE: Logits without noise, float32 ``(T, E)``.
        noisy_TE: With it.
        deviation_TE: Standard deviation of the noise, positive.
        top_k: k, less than E.

    Returns:
        float32 ``(T, E)``, with gradient through all three.

    Source:
        Sparsely-gated mixture of experts (arXiv:1701.06538), appendix A, eqs. 8–9.
    """
    if not 1 <= top_k < noisy_TE.shape[1]:
        raise ValueError(f"top_k={top_k} must be at least 1 and less than the number of experts, {noisy_TE.shape[1]}")
    largest = noisy_TE.topk(top_k + 1, dim=1).values
    kth_T1, next_T1 = largest[:, top_k - 1 : top_k], largest[:, top_k:]
    threshold_TE = torch.where(noisy_TE >= kth_T1, next_T1, kth_T1)  # without oneself the next one moves up
    return torch.special.ndtr((clean_TE - threshold_TE) / deviation_TE)


def prob_above_threshold(clean_TE: Tensor, noisy_TE: Tensor, deviation: float, top_k: int) -> Tensor:
    """Probability that an expert's noise, drawn again, lifts it over the k-th largest noisy value there is now.

    ``1 − Φ((threshold − clean) / deviation)``. Unlike in :func:`prob_in_top_k`, the threshold may be the
    expert's own value.

    Args:
        clean_TE: Logits without noise, float32 ``(T, E)``.
        noisy_TE: With it.
        deviation: Standard deviation of the noise, positive.
        top_k: k, at most E.

    Returns:
        float32 ``(T, E)``, with gradient through both.

    Source:
        V-MoE (arXiv:2106.05974), appendix A.2; ``_load_auxiliary_loss`` in google-research/vmoe, vmoe/nn/routing.py.
    """
    threshold_T1 = noisy_TE.topk(top_k, dim=1).values[:, -1:]
    return torch.special.ndtr((clean_TE - threshold_T1) / deviation)


def sequence_cv_squared(values_TE: Tensor, mask_T: Tensor, num_sequences: int) -> Tensor:
    """:func:`cv_squared` of each sequence's sums, averaged over the sequences that have a real token.

    Args:
        values_TE: What is to be even over experts, float32 ``(T, E)``.
        mask_T: True for real tokens, bool ``(T,)``.
        num_sequences: Sequences that the T tokens are, of equal length, one after the other (B).

    Returns:
        Scalar float32; 0 where each sequence's sums are equal.
    """
    sums_BE = torch.where(mask_T.unsqueeze(1), values_TE, 0.0).unflatten(0, (num_sequences, -1)).sum(dim=1)
    present_B = mask_T.view(num_sequences, -1).any(dim=1)
    return torch.where(present_B, cv_squared(sums_BE), 0.0).sum() / present_B.sum().clamp_min(1)
