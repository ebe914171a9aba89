"""Which auxiliary losses a trained router has, from its config; the formulas are in ``ops/router_losses.py``.

Legend: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lifelong_moe.config.routing.base import BalanceCounts, BalanceOver, BalanceScope
from lifelong_moe.config.routing.shared import BalancedConfig, ZLossConfig
from lifelong_moe.ops.router_losses import (
    load_balancing_loss,
    old_experts_loss,
    router_z_loss,
    sequence_balancing_loss,
)
from lifelong_moe.routing.base import LayersLoss, RouterLoss, RoutingContext


@dataclass(frozen=True)
class Choices:
    """What a router thought of experts, and what it chose."""

    logits_TE: Tensor
    """Router logits, float32."""
    probs_TE: Tensor
    """Probabilities; rows sum to 1."""
    expert_ids_TK: Tensor
    """Choices that balance is about, before any is dropped."""
    allowed_TE: Tensor | None = None
    """Experts that each token has; None means all."""
    earlier_E: Tensor | None = None
    """With ``balance_scope=global_batch``: such choices in the step's earlier micro-batches."""


def balanced_choices(config: BalancedConfig, expert_ids_TK: Tensor) -> Tensor:
    """All choices or the first ones, as ``balance_counts`` says: ``(T, K)`` or ``(T, 1)``."""
    return expert_ids_TK[:, :1] if config.balance_counts == BalanceCounts.first else expert_ids_TK


def balance_losses(
    config: BalancedConfig, generations: list[int], made: Choices, context: RoutingContext
) -> dict[str, RouterLoss | LayersLoss]:
    """Balance; in a review, what sends old text to old experts in its place.

    Args:
        config: Coefficient and scopes.
        generations: Experts of each generation.
        made: By the router, of this batch.
        context: Mask and sequences.
    """
    old_experts = sum(generations[:-1])
    if context.old_text_T is not None:  # a review: earlier text belongs to earlier experts, balanced or not
        value = old_experts_loss(made.logits_TE, old_experts, context.old_text_T & context.mask_T)
        return {"old": RouterLoss(value, 1.0)}
    if not config.balance_loss:
        return {}
    first = old_experts if config.balance_over == BalanceOver.active else 0
    choices = made.probs_TE, balanced_choices(config, made.expert_ids_TK), context.mask_T
    if config.effective_balance_scope == BalanceScope.sequence:
        # Counted where an expert's room is counted.
        value = sequence_balancing_loss(*choices, context.num_sequences, first, made.allowed_TE)
    elif made.earlier_E is None and _waits(made.probs_TE):
        shared = context.mask_T, first, made.allowed_TE
        return {"balance": LayersLoss(load_balancing_loss, choices[:2], shared, (*generations,), config.balance_loss)}
    else:
        value = load_balancing_loss(*choices, first, made.allowed_TE, made.earlier_E)
    return {"balance": RouterLoss(value, config.balance_loss)}


def z_losses(config: ZLossConfig, logits_TE: Tensor, context: RoutingContext) -> dict[str, RouterLoss | LayersLoss]:
    """The z-loss, if there is one."""
    if not config.z_loss:
        return {}
    if _waits(logits_TE):
        return {"z": LayersLoss(router_z_loss, (logits_TE,), (context.mask_T,), None, config.z_loss)}
    return {"z": RouterLoss(router_z_loss(logits_TE, context.mask_T), config.z_loss)}


def _waits(values: Tensor) -> bool:
    """Whether a loss is computed once for all layers that are alike."""
    return values.device.type != "cpu"
