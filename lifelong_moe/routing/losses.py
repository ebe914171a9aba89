"""Which auxiliary losses a trained router has, from its config; the formulas are in ``ops/router_losses.py``.

Legend: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from torch import Tensor

from lifelong_moe.ops.router_losses import (
    load_balancing_loss,
    old_experts_loss,
    router_z_loss,
    sequence_balancing_loss,
)
from lifelong_moe.routing.base import RouterLoss, RoutingContext
from lifelong_moe.routing.config import BalanceCounts, BalanceOver, BalanceScope, RoutingConfig


def balanced_choices(config: RoutingConfig, expert_ids_TK: Tensor) -> Tensor:
    """All choices or the first ones, as ``balance_counts`` says: ``(T, K)`` or ``(T, 1)``."""
    return expert_ids_TK[:, :1] if config.balance_counts == BalanceCounts.first else expert_ids_TK


def auxiliary_losses(
    config: RoutingConfig,
    generations: list[int],
    logits_TE: Tensor,
    probs_TE: Tensor,
    expert_ids_TK: Tensor,
    context: RoutingContext,
    *,
    allowed_TE: Tensor | None = None,
    earlier_E: Tensor | None = None,
) -> dict[str, RouterLoss]:
    """Balance and z-loss; in a review, what sends old text to old experts in place of balance.

    Args:
        config: Coefficients and scopes.
        generations: Experts of each generation.
        logits_TE: Router logits, float32.
        probs_TE: Probabilities; rows sum to 1.
        expert_ids_TK: Choices that balance is about, before any is dropped.
        context: Mask and sequences.
        allowed_TE: Experts that each token has; None means all.
        earlier_E: With ``balance_scope=global_batch``: such choices in the step's earlier micro-batches.
    """
    losses, mask_T, num_experts = {}, context.mask_T, sum(generations)
    if context.old_text_T is not None:  # a review: earlier text belongs to earlier experts, balanced or not
        value = old_experts_loss(logits_TE, num_experts - generations[-1], context.old_text_T & mask_T)
        losses["old"] = RouterLoss(value, 1.0)
    elif config.balance_loss:
        first = num_experts - generations[-1] if config.balance_over == BalanceOver.active else 0
        counted_TK = balanced_choices(config, expert_ids_TK)
        if config.counts_balance_in == BalanceScope.sequence:
            value = sequence_balancing_loss(probs_TE, counted_TK, mask_T, context.num_sequences, first, allowed_TE)
        else:
            value = load_balancing_loss(probs_TE, counted_TK, mask_T, first, allowed_TE, earlier_E)
        losses["balance"] = RouterLoss(value, config.balance_loss)
    if config.z_loss:
        losses["z"] = RouterLoss(router_z_loss(logits_TE, mask_T), config.z_loss)
    return losses
