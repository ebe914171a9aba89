"""Apply a capacity to choices: who is served first, how much room there is, and what becomes of the rest.

Legend: T tokens, K experts chosen per token, E experts, N = T·K assignments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lifelong_moe.config.routing.capacity import CapacityConfig, Counts, Overflow, Priority, Rounding
from lifelong_moe.ops.capacity import (
    batch_priority_order,
    choice_order,
    expert_capacity,
    token_order,
    within_capacity,
)
from lifelong_moe.routing.base import Causality, RoutingContext


def causality(config: CapacityConfig | None) -> Causality:
    """What tokens may depend on where choices are by token and this is the room."""
    if config is None:
        return Causality.token_local
    return Causality.ordered if config.is_ordered else Causality.leaks_when_full


def apply_capacity(
    config: CapacityConfig,
    expert_ids_TK: Tensor,
    ranks_TE: Tensor,
    scores_TE: Tensor,
    context: RoutingContext,
    *,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """Drop assignments that find no room, or send them to a next choice; padding takes no room.

    Weights are the caller's: see :func:`weighting_experts`.

    Args:
        config: How much room, and for whom first.
        expert_ids_TK: Choices; -1 where there is none.
        ranks_TE: What experts were chosen by: the order of next choices. Its experts share the tokens; one of ``-inf``
            is closed to a token.
        scores_TE: Router scores, by the largest of which batch priority serves.
        context: Sequences, each of which has all of an expert's room, and mask.
        training: Which factor holds; and whether a random order is random.

    Returns:
        The experts that serve, -1 where a choice was dropped; and how many of real tokens' choices were dropped, of how
        many, int64 ``(2,)``.
    """
    (num_tokens, top_k), num_experts = expert_ids_TK.shape, ranks_TE.shape[1]
    # Padding must not take room from real tokens.
    wanted_TK = expert_ids_TK.masked_fill(~context.mask_T.unsqueeze(1), -1)
    # A share of the full context, also of shorter text: else the length of what follows would change what fits.
    capacity = expert_capacity(
        context.full_length or num_tokens // context.num_sequences,
        num_experts,
        top_k if config.counts == Counts.assignments else 1,
        factor=config.factor if training else config.eval_factor,
        round_up=config.rounding == Rounding.up,
        multiple=config.multiple,
        least=config.least,
    )
    order_N = _order(config.priority, scores_TE, top_k, training)
    taken_GE = wanted_TK.new_zeros(context.num_sequences, num_experts)
    kept_TK, taken_GE = within_capacity(wanted_TK, order_N, context.sequence_T, capacity, taken_GE)
    final_TK = wanted_TK.masked_fill(~kept_TK, -1)
    if config.overflow == Overflow.next_choice:
        final_TK = _next_choices(final_TK, wanted_TK, ranks_TE, order_N, context, capacity, taken_GE)
    wanted = (wanted_TK >= 0).sum()
    return final_TK, torch.stack([wanted - (final_TK >= 0).sum(), wanted])


def weighting_experts(kept_TK: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """Experts by whose scores a token weighs: those that serve it, and where nobody does the one that was chosen.

    A dropped choice so keeps its part in the sum that weights are divided by, and what is left weighs no more.
    """
    return torch.where(kept_TK >= 0, kept_TK, expert_ids_TK)


def _order(priority: Priority, scores_TE: Tensor, top_k: int, training: bool) -> Tensor:
    num_tokens, device = len(scores_TE), scores_TE.device
    if priority == Priority.token:
        return token_order(num_tokens, top_k, device)
    if priority == Priority.batch:
        return batch_priority_order(scores_TE.amax(dim=1), top_k)
    at_random = priority == Priority.random and training
    # Drawn on the CPU: the same order on every device.
    if at_random:
        tokens_T = torch.randperm(num_tokens).to(device, non_blocking=True)
    else:
        tokens_T = torch.arange(num_tokens, device=device)
    return choice_order(tokens_T, top_k)


def _next_choices(
    final_TK: Tensor,
    wanted_TK: Tensor,
    ranks_TE: Tensor,
    order_N: Tensor,
    context: RoutingContext,
    capacity: int,
    taken_GE: Tensor,
) -> Tensor:
    """Offer what was dropped to the token's other experts, best first: all second choices, then all third ones, …

    Source:
        No-token-left-behind: Switch (arXiv:2101.03961), appendix B, and ``_ntlb_gating`` in tensorflow/mesh,
        mesh_tensorflow/transformer/moe.py: for one expert a token, and up to its fourth choice; here up to its last.
    """
    ranked_TE = ranks_TE.argsort(dim=1, descending=True, stable=True)
    for candidate_T1 in ranked_TE.split(1, dim=1):
        lacking_TK = (final_TK < 0) & (wanted_TK >= 0)
        # On a GPU the host would wait for the answer, which costs more than rounds without anything to do.
        if lacking_TK.device.type == "cpu" and not bool(lacking_TK.any()):
            break
        # One place a token at a time, so that no token gets an expert twice.
        first_TK = lacking_TK & (lacking_TK.cumsum(dim=1) == 1)
        open_T1 = ~(final_TK == candidate_T1).any(dim=1, keepdim=True) & ranks_TE.gather(1, candidate_T1).isfinite()
        offered_TK = torch.where(first_TK & open_T1, candidate_T1, -1)
        kept_TK, taken_GE = within_capacity(offered_TK, order_N, context.sequence_T, capacity, taken_GE)
        final_TK = torch.where(kept_TK, offered_TK, final_TK)
    return final_TK
