"""Capacity: how many assignments an expert takes from a group of tokens, and whose. Pure; a fast and a readable way.

Legend: T tokens, K experts chosen per token, E experts, N = T·K assignments, token-major.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expert_capacity(
    num_tokens: int, num_experts: int, per_token: int, *, factor: float, round_up: bool, multiple: int, least: int
) -> int:
    """Assignments that an expert takes from a group: ``num_tokens * per_token * factor / num_experts``, rounded.

    Args:
        num_tokens: Tokens of the group.
        num_experts: E.
        per_token: K where assignments are counted (DeepSpeed, V-MoE, MegaBlocks); 1 where tokens are (Mesh, Lingvo).
        factor: Capacity factor; 1 is just enough if experts are used evenly.
        round_up: To the next whole number (DeepSpeed), not down (Mesh, Lingvo).
        multiple: Then up to a multiple of this (4 in Lingvo and V-MoE).
        least: At least so many (4 in Mesh and DeepSpeed).

    Returns:
        At most ``num_tokens``: experts chosen by one token are distinct.
    """
    exact = num_tokens * per_token * factor / num_experts
    # 1e-9: float error must not push a product that is whole on paper to the next number.
    whole = math.ceil(exact - 1e-9) if round_up else math.floor(exact + 1e-9)
    return min(num_tokens, -(-max(whole, least) // multiple) * multiple)


def within_capacity(
    expert_ids_TK: Tensor, order_N: Tensor, group_T: Tensor, capacity: int, taken_GE: Tensor
) -> tuple[Tensor, Tensor]:
    """Which assignments find room, when they are served in a given order and each group has experts of its own.

    Args:
        expert_ids_TK: Experts, int64 ``(T, K)``; below 0 where there is no assignment.
        order_N: Assignments (``token * K + choice``) in the order in which they are served, a permutation.
        group_T: Group of each token, int64 ``(T,)``, below G.
        capacity: Assignments per expert and group.
        taken_GE: Assignments that experts have already, int64 ``(G, E)``.

    Returns:
        bool ``(T, K)``, and ``taken_GE`` with those that found room.
    """
    num_groups, num_experts = taken_GE.shape
    experts_N = expert_ids_TK.flatten()[order_N]
    groups_N = group_T.repeat_interleave(expert_ids_TK.shape[1])[order_N]
    # Where there is no assignment the bucket is one of its own behind all others.
    bucket_N = torch.where(experts_N >= 0, groups_N * num_experts + experts_N, num_groups * num_experts)
    # Stable: within a bucket the order of service stays.
    sorted_N = torch.argsort(bucket_N, stable=True)
    size_B = _sizes(bucket_N, torch.ones_like(bucket_N), num_groups * num_experts + 1)
    starts_B = size_B.cumsum(0) - size_B
    place_N = torch.empty_like(bucket_N)
    place_N[sorted_N] = torch.arange(len(bucket_N), device=bucket_N.device) - starts_B[bucket_N[sorted_N]]
    # The bucket of choices that are none counts as full from the start.
    before_B = torch.cat([taken_GE.flatten(), taken_GE.new_full((1,), capacity)])
    fits_N = place_N + before_B[bucket_N] < capacity
    kept_N = torch.empty_like(fits_N)
    kept_N[order_N] = fits_N
    added_B = _sizes(bucket_N, fits_N.long(), num_groups * num_experts + 1)[:-1]
    return kept_N.view_as(expert_ids_TK), taken_GE + added_B.view_as(taken_GE)


def _sizes(bucket_N: Tensor, counted_N: Tensor, num: int) -> Tensor:
    """How often each bucket is counted, int64 ``(num,)``."""
    # Not bincount, by which the host would wait for a GPU.
    return bucket_N.new_zeros(num).scatter_add(0, bucket_N, counted_N)


def within_capacity_readable(
    expert_ids_TK: Tensor, order_N: Tensor, group_T: Tensor, capacity: int, taken_GE: Tensor
) -> tuple[Tensor, Tensor]:
    """What :func:`within_capacity` computes, one assignment after the other; its oracle."""
    kept_TK, taken = torch.zeros_like(expert_ids_TK, dtype=torch.bool), taken_GE.clone()
    for assignment in order_N.tolist():
        token, choice = divmod(assignment, expert_ids_TK.shape[1])
        expert, group = int(expert_ids_TK[token, choice]), int(group_T[token])
        if expert >= 0 and taken[group, expert] < capacity:
            kept_TK[token, choice] = True
            taken[group, expert] += 1
    return kept_TK, taken


def token_order(num_tokens: int, top_k: int, device: torch.device | None = None) -> Tensor:
    """Token by token, each with all its choices: ``(N,)``. Earlier tokens never lose to later ones."""
    return torch.arange(num_tokens * top_k, device=device)


def choice_order(tokens_T: Tensor, top_k: int) -> Tensor:
    """Every token's first choice, then every token's second (GShard): ``(N,)``.

    Args:
        tokens_T: Tokens in the order in which each round serves them, a permutation.
        top_k: K.
    """
    return (tokens_T * top_k + torch.arange(top_k, device=tokens_T.device).unsqueeze(1)).flatten()


def batch_priority_order(gate_T: Tensor, top_k: int) -> Tensor:
    """As :func:`choice_order`, tokens with the largest first gate first: ``(N,)``; ties to the earlier token.

    Source:
        Batch-priority routing: V-MoE (arXiv:2106.05974), section 4.1.
    """
    return choice_order(torch.argsort(gate_T, descending=True, stable=True), top_k)
