"""Losses on a router's choices. Pure; float32; padding has no effect.

Legend: T tokens, E experts, K experts chosen per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def load_balancing_loss(probs_TE: Tensor, expert_ids_TK: Tensor, mask_T: Tensor, first_expert: int = 0) -> Tensor:
    """Penalize routers that send most tokens to a few experts.

    ``E / K * sum_e f_e * p_e``: ``f_e`` is how often expert ``e`` is chosen per token, ``p_e`` its
    mean probability. Perfect balance gives 1 for any E and K, so stages of different size compare.
    With ``first_expert`` the experts before it are left out: ``f`` is then the share of the remaining
    assignments (times K), ``p`` the share of the remaining probability, and E their number.

    Args:
        probs_TE: Router probabilities, float32 ``(T, E)``; rows sum to 1.
        expert_ids_TK: Chosen experts, int64 ``(T, K)``, distinct within a row.
        mask_T: True for real tokens, bool ``(T,)``. Padding has no effect.
        first_expert: Balance experts from this index on.

    Returns:
        Scalar float32, unweighted. Only ``p_e`` carries gradient. 0 if no assignment is left to balance.

    Raises:
        ValueError: If no token is unmasked; the mean is then undefined.

    Source:
        Switch Transformer (arXiv:2101.03961), eqs. 4–6, there for K = 1 and all experts.
    """
    if not bool(mask_T.any()):
        raise ValueError("load_balancing_loss needs at least one unmasked token")
    num_experts = probs_TE.shape[1]
    counts_E = torch.bincount(expert_ids_TK[mask_T].reshape(-1), minlength=num_experts)[first_expert:].float()
    mass_E = probs_TE[mask_T].mean(dim=0)[first_expert:]
    if first_expert:
        mass_E = mass_E / mass_E.sum().clamp_min(1e-9)
    share_E = counts_E / counts_E.sum().clamp_min(1.0)
    return counts_E.numel() * (share_E * mass_E).sum()


def router_z_loss(logits_TE: Tensor, mask_T: Tensor) -> Tensor:
    """Keep router logits small: the mean squared logsumexp over real tokens.

    Args:
        logits_TE: Router logits, float32 ``(T, E)``.
        mask_T: True for real tokens, bool ``(T,)``.

    Returns:
        Scalar float32, unweighted; ``(ln E)²`` at zero logits.

    Raises:
        ValueError: If no token is unmasked.

    Source:
        ST-MoE (arXiv:2202.08906), eq. 5.
    """
    if not bool(mask_T.any()):
        raise ValueError("router_z_loss needs at least one unmasked token")
    return torch.logsumexp(logits_TE[mask_T], dim=-1).square().mean()
