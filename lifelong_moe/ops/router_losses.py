"""Losses on a router's choices. Float32; padding has no effect. None of them asks the device for a number.

Where a loss is not a mean over tokens, it is one of the tokens of all processes that take a step together, so that
their number does not change what is minimized.

Legend: T tokens, E experts, K experts chosen per token. Where "…" stands before them, layers may stand: one call then
answers for all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lifelong_moe.ops.collectives import sums_over_ranks


def load_balancing_loss(
    probs_TE: Tensor,
    expert_ids_TK: Tensor,
    mask_T: Tensor,
    first_expert: int = 0,
    allowed_TE: Tensor | None = None,
    earlier_E: Tensor | None = None,
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
        probs_TE: Router probabilities, float32 ``(…, T, E)``; rows sum to 1.
        expert_ids_TK: Chosen experts, int64 ``(…, T, K)``, distinct within a row.
        mask_T: True for real tokens, bool ``(T,)``. Padding has no effect.
        first_expert: Balance experts from this index on.
        allowed_TE: Experts that each token may use, bool ``(T, E)``; all others have probability 0. None means all.
        earlier_E: Choices in earlier parts of the batch, on all processes, that ``f`` is to count as well, ``(E,)``.

    Returns:
        Float32 ``(…)``, unweighted. Only ``p_e`` carries gradient. 0 if no assignment is left to balance.

    Raises:
        ValueError: If no token is unmasked; the mean is then undefined. On a CPU only: a device is not asked.

    Source:
        Switch Transformer (arXiv:2101.03961), eqs. 4–6, there for K = 1 and all experts. ``f`` over more than the
        batch at hand: Qwen's global-batch balance (arXiv:2501.11873), where ``p`` stays local too.
    """
    _require_tokens(mask_T, "load_balancing_loss")
    counts_E = choice_counts(expert_ids_TK, mask_T, probs_TE.shape[-1]).to(probs_TE.dtype)
    sums = [counts_E, masked_sum(probs_TE, mask_T), mask_T.sum().to(probs_TE.dtype)]
    if allowed_TE is not None:
        allowed = allowed_TE.to(probs_TE.dtype)
        sums.append(masked_sum(allowed / allowed.sum(dim=1, keepdim=True), mask_T))
    # One message for all sums; gradients flow through the probabilities alone.
    counts_E, probs_E, num_tokens, *evens = sums_over_ranks(*sums)
    counts_E = (counts_E if earlier_E is None else counts_E + earlier_E)[..., first_expert:]
    mass_E = _mean_shares(probs_E, num_tokens, first_expert)
    share_E = counts_E / counts_E.sum(dim=-1, keepdim=True).clamp_min(1.0)
    if not evens:
        return counts_E.shape[-1] * (share_E * mass_E).sum(dim=-1)
    even_E = _mean_shares(evens[0], num_tokens, first_expert)
    # An expert that no token may use has neither mass nor even share: 0 / 1e-9 adds nothing.
    return (share_E * mass_E / even_E.clamp_min(1e-9)).sum(dim=-1)


def choice_counts(expert_ids_TK: Tensor, mask_T: Tensor, num_experts: int) -> Tensor:
    """How often real tokens chose each expert, int64 ``(…, E)``, of ``(…, T, K)``; choices below 0 are none."""
    # scatter_add below and not bincount, which would wait for a CUDA device.
    counts = (mask_T.unsqueeze(1) & (expert_ids_TK >= 0)).long()
    zeros = counts.new_zeros(*counts.shape[:-2], num_experts)
    return zeros.scatter_add(-1, expert_ids_TK.clamp_min(0).flatten(-2), counts.flatten(-2))


def _require_tokens(mask_T: Tensor, name: str) -> None:
    """Refuse a batch of padding alone; on the CPU only, where asking costs nothing."""
    if mask_T.device.type == "cpu" and not bool(mask_T.any()):
        raise ValueError(f"{name} needs at least one unmasked token")


def sequence_balancing_loss(
    probs_TE: Tensor,
    expert_ids_TK: Tensor,
    mask_T: Tensor,
    num_sequences: int,
    first_expert: int = 0,
    allowed_TE: Tensor | None = None,
) -> Tensor:
    """:func:`load_balancing_loss` within each sequence, averaged over the sequences that have a real token.

    Args:
        probs_TE: Router scores, float32 ``(T, E)``; rows sum to 1.
        expert_ids_TK: Chosen experts, int64 ``(T, K)``; below 0 where a token has fewer.
        mask_T: True for real tokens, bool ``(T,)``.
        num_sequences: Sequences that the T tokens are, of equal length, one after the other (B).
        first_expert: Balance experts from this index on.
        allowed_TE: Experts that each token may use, bool ``(T, E)``; None means all.

    Returns:
        Scalar float32, unweighted; 1 where each sequence is balanced.

    Raises:
        ValueError: If no token is unmasked; on a CPU only.

    Source:
        DeepSeek-V3 (arXiv:2412.19437), eqs. 17–20. Switch and GShard count so in each group of tokens that shares
        experts' room (Mesh TensorFlow, transformer/moe.py; Lingvo, gshard_layers.py), which is a sequence here. Mesh
        TensorFlow divides by the group's size, padding included; Lingvo, without ``legacy_mtf_behavior``, by its real
        tokens, as here.
    """
    _require_tokens(mask_T, "sequence_balancing_loss")
    num_experts = probs_TE.shape[1]
    present_BS = mask_T.view(num_sequences, -1)
    ids_BN = expert_ids_TK.reshape(num_sequences, -1)
    counted_BN = present_BS.repeat_interleave(expert_ids_TK.shape[1], dim=1) & (ids_BN >= 0)
    counts_BE = probs_TE.new_zeros(num_sequences, num_experts).scatter_add(
        1, ids_BN.clamp_min(0), counted_BN.to(probs_TE.dtype)
    )[:, first_expert:]

    def shares(values_TE: Tensor) -> Tensor:
        masked_TE = torch.where(mask_T.unsqueeze(1), values_TE, 0.0)
        sums_BE = masked_TE.view(num_sequences, -1, num_experts).sum(dim=1)[:, first_expert:]
        return sums_BE / sums_BE.sum(dim=1, keepdim=True).clamp_min(1e-9)

    share_BE = counts_BE / counts_BE.sum(dim=1, keepdim=True).clamp_min(1.0)
    products_BE = share_BE * shares(probs_TE)
    if allowed_TE is None:
        value_B = counts_BE.shape[1] * products_BE.sum(dim=1)
    else:
        even_TE = allowed_TE.to(probs_TE.dtype)
        even_BE = shares(even_TE / even_TE.sum(dim=1, keepdim=True))
        value_B = (products_BE / even_BE.clamp_min(1e-9)).sum(dim=1)
    return value_B.sum() / present_BS.any(dim=1).sum()


def cv_squared(values_E: Tensor) -> Tensor:
    """Squared coefficient of variation over the last dimension, with the population variance; 0 if all are equal.

    Source:
        Sparsely-gated mixture of experts (arXiv:1701.06538), eq. 7; 1e-10 in the denominator as in its code.
    """
    values_E = values_E.float()
    return values_E.var(dim=-1, unbiased=False) / (values_E.mean(dim=-1).square() + 1e-10)


def relu_sparsity_loss(gates_TE: Tensor, mask_T: Tensor, top_k: int) -> Tensor:
    """L1 norm of ReLU gates, each expert's weighted by its load: ``mean over tokens of sum_e f_e * g_te``.

    ``f_e = E / (top_k * T)`` times the number of tokens that use expert ``e``, without gradient: 1 where ``top_k``
    experts a token are used evenly.

    Source:
        ReMoE (arXiv:2412.14711), eqs. 9–10.
    """
    used_E, gates_E = masked_sum(gates_TE.gt(0).to(gates_TE.dtype), mask_T), masked_sum(gates_TE, mask_T)
    used_E, gates_E, num_tokens = sums_over_ranks(used_E, gates_E, mask_T.sum().to(gates_TE.dtype))
    num_tokens = num_tokens.clamp_min(1.0)
    # Detached: load is a factor, and only gates are pushed down.
    return (gates_E / num_tokens * (used_E / num_tokens).detach()).sum() * gates_TE.shape[1] / top_k


def masked_sum(values: Tensor, mask_T: Tensor) -> Tensor:
    """Sum over unmasked tokens of ``(T,)`` or ``(…, T, E)``."""
    mask = mask_T if values.dim() == 1 else mask_T.unsqueeze(1)
    # `where` and not a product: padding may hold infinities, and 0 · inf is NaN.
    return torch.where(mask, values, 0.0).sum(dim=-mask.dim())


def _mean(values: Tensor, mask_T: Tensor) -> Tensor:
    """Mean over unmasked tokens of ``(T,)`` or ``(T, E)``; 0 if there are none."""
    return masked_sum(values, mask_T) / mask_T.sum().clamp_min(1)


def _mean_shares(sum_E: Tensor, num_tokens: Tensor, first_expert: int) -> Tensor:
    """Mean over tokens of rows that sum to 1, from ``first_expert`` on and relative to what is left there."""
    mean_E = sum_E[..., first_expert:] / num_tokens.clamp_min(1.0)
    return mean_E / mean_E.sum(dim=-1, keepdim=True).clamp_min(1e-9) if first_expert else mean_E


def router_z_loss(logits_TE: Tensor, mask_T: Tensor) -> Tensor:
    """Keep router logits small: the mean squared logsumexp over real tokens.

    Args:
        logits_TE: Router logits, float32 ``(…, T, E)``.
        mask_T: True for real tokens, bool ``(T,)``.

    Returns:
        Float32 ``(…)``, unweighted; ``(ln E)²`` at zero logits.

    Raises:
        ValueError: If no token is unmasked; on a CPU only.

    Source:
        ST-MoE (arXiv:2202.08906), eq. 5.
    """
    _require_tokens(mask_T, "router_z_loss")
    squares_T = torch.logsumexp(logits_TE, dim=-1).square()
    return torch.where(mask_T, squares_T, 0.0).sum(dim=-1) / mask_T.sum().clamp_min(1)


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
        scores with expert 0, the only frozen one. For ``num_old = 1`` this is that. Their code gives the cross-entropy
        probabilities in place of logits; here it is the paper's. Layers are averaged there and here.
    """
    num_experts = logits_TE.shape[1]
    if not 1 <= num_old <= num_experts:
        raise ValueError(f"num_old={num_old} must lie in [1, {num_experts}]")
    return _mean(torch.logsumexp(logits_TE, dim=-1) - torch.logsumexp(logits_TE[:, :num_old], dim=-1), mask_T)
