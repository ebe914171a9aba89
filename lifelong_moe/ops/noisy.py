"""Noisy top-k gating: how likely an expert would be chosen if its noise were drawn again. Pure.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def chosen_again(clean_TE: Tensor, noisy_TE: Tensor, deviation_TE: Tensor, top_k: int) -> Tensor:
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
