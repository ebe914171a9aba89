"""Losses on a router's choices. Pure; float32; padding has no effect.

Legend: T tokens, E experts, K experts chosen per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def load_balancing_loss(
    probs_TE: Tensor,
    expert_ids_TK: Tensor,
    mask_T: Tensor,
    first_expert: int = 0,
    allowed_TE: Tensor | None = None,
) -> Tensor:
    """Penalize routers that send most tokens to a few experts.

    ``E / K * sum_e f_e * p_e``: ``f_e`` is how often expert ``e`` is chosen per token, ``p_e`` its
    mean probability. Perfect balance gives 1 for any E and K, so stages of different size compare.
    With ``first_expert`` the experts before it are left out: ``f`` is then the share of the remaining
    assignments (times K), ``p`` the share of the remaining probability, and E their number.

    With ``allowed_TE`` a token has some of the experts only, and the even share to hold ``f`` and ``p`` against is no
    longer ``1 / E`` but ``q_e``, what expert ``e`` gets if each token spreads evenly over its own:
    ``sum_e f_e * p_e / (K * q_e)``. If all tokens have all experts, this is the same; it is 1 where ``f / K = p = q``.

    Args:
        probs_TE: Router probabilities, float32 ``(T, E)``; rows sum to 1.
        expert_ids_TK: Chosen experts, int64 ``(T, K)``, distinct within a row.
        mask_T: True for real tokens, bool ``(T,)``. Padding has no effect.
        first_expert: Balance experts from this index on.
        allowed_TE: Experts that each token may use, bool ``(T, E)``; all others have probability 0. None means all.

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
    mass_E = _mean_shares(probs_TE[mask_T], first_expert)
    share_E = counts_E / counts_E.sum().clamp_min(1.0)
    if allowed_TE is None:
        return counts_E.numel() * (share_E * mass_E).sum()
    allowed = allowed_TE[mask_T].float()
    even_E = _mean_shares(allowed / allowed.sum(dim=1, keepdim=True), first_expert)
    return (share_E * mass_E / even_E.clamp_min(1e-9)).sum()


def _mean_shares(shares_TE: Tensor, first_expert: int) -> Tensor:
    """Mean over tokens of rows that sum to 1, from ``first_expert`` on and relative to what is left there."""
    mean_E = shares_TE.mean(dim=0)[first_expert:]
    return mean_E / mean_E.sum().clamp_min(1e-9) if first_expert else mean_E


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


def old_experts_loss(logits_TE: Tensor, num_old: int, mask_T: Tensor) -> Tensor:
    """Send old text to old experts: ``-mean over tokens of ln(sum of the old experts' probabilities)``.

    Which of the old experts takes a token is left to the router. The probabilities are the full softmax's, before
    top-k and renormalization.

    Args:
        logits_TE: Router logits, float32 ``(T, E)``, old experts first.
        num_old: How many experts are old, 1 to E.
        mask_T: True for real tokens of old text, bool ``(T,)``. Others have no effect.

    Returns:
        Scalar float32, nats, unweighted; ``ln(E / num_old)`` at equal logits, and 0 with a zero gradient if no token
        is unmasked, since a micro-batch may well have no old text.

    Raises:
        ValueError: If ``num_old`` is not in [1, E].

    Source:
        MoE-LPR (arXiv:2408.11396), the review stage's LPR loss: cross-entropy of original-language tokens' router
        scores with expert 0, the only frozen one. For ``num_old = 1`` this is that.
    """
    num_experts = logits_TE.shape[1]
    if not 1 <= num_old <= num_experts:
        raise ValueError(f"num_old={num_old} must lie in [1, {num_experts}]")
    old_TE = logits_TE[mask_T]
    surprise_T = torch.logsumexp(old_TE, dim=-1) - torch.logsumexp(old_TE[:, :num_old], dim=-1)
    return surprise_T.sum() / max(1, len(surprise_T))
