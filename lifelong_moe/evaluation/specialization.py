"""Measures of expert specialization, pure functions of one layer's routing.

Layers may differ in their number of experts, so callers keep a list with an entry per layer.

Legend: T tokens, K experts chosen per token, E experts, J labels (token ids or distributions), N inputs, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Information:
    """Mutual information, and its values by chance for the same counts."""

    nats: float
    """Measured, in nats. Few tokens bias it upward, so compare it with the null."""
    null_mean: float
    """Mean over shuffles of the labels, in nats."""
    null_95: float
    """95th percentile over shuffles, in nats."""


@dataclass(frozen=True)
class TopToken:
    """A token that an expert gets with more than its average frequency."""

    token_id: int
    count: int
    """Times that the expert was chosen for it."""
    lift: float
    """``p(token | expert) / p(token)``: 1 is no preference; ``1 / (K p(expert))``, the most there can be, is that of
    a token that the expert always gets."""


def joint_counts(expert_ids_TK: Ints, labels_T: Ints, num_experts: int) -> tuple[NDArray[np.int64], Ints]:
    """Count how often each expert is chosen for each label.

    Args:
        expert_ids_TK: Chosen experts ``(T, K)``; below 0 where a token has fewer.
        labels_T: Label of each token ``(T,)``, any integers.
        num_experts: E.

    Returns:
        Assignments ``(E, J)``, and the J labels that occur, ascending.

    Raises:
        ValueError: If there is no token.
    """
    if not len(labels_T):
        raise ValueError("there are no tokens to count")
    labels_J, label_T = np.unique(labels_T, return_inverse=True)
    ids_TK = np.asarray(expert_ids_TK, dtype=np.int64)
    # One flat cell per (expert, label), so that a single bincount makes the table. shape: (T, K)
    cells_TK = ids_TK * len(labels_J) + label_T[:, None]
    counts = np.bincount(cells_TK[ids_TK >= 0], minlength=num_experts * len(labels_J))
    return counts.reshape(num_experts, len(labels_J)), labels_J


def mutual_information(counts_EJ: Ints) -> float:
    """``sum p(e, j) ln(p(e, j) / (p(e) p(j)))`` in nats.

    Args:
        counts_EJ: Joint counts, any non-negative integers ``(E, J)``.

    Returns:
        0 for independence, ``ln n`` for a one-to-one mapping of n equally frequent values; never negative.

    Raises:
        ValueError: If all counts are 0.
    """
    total = counts_EJ.sum()
    if total <= 0:
        raise ValueError("mutual information needs at least one count")
    p_EJ = counts_EJ / total
    independent_EJ = p_EJ.sum(axis=1, keepdims=True) * p_EJ.sum(axis=0, keepdims=True)
    seen = p_EJ > 0  # 0 log 0 counts as 0
    # Rounding can make an exact 0 slightly negative.
    return max(0.0, float((p_EJ[seen] * np.log(p_EJ[seen] / independent_EJ[seen])).sum()))


def information(
    expert_ids_TK: Ints, labels_T: Ints, num_experts: int, *, shuffles: int = 20, seed: int = 0
) -> Information:
    """Mutual information between the expert of an assignment and the label of its token, with a shuffled null.

    The null permutes the labels over the tokens, which keeps both marginals. Tokens of a document are not independent,
    so for distributions this null is easy to beat.

    Args:
        expert_ids_TK: Chosen experts ``(T, K)``; each of a token's K choices counts as one assignment.
        labels_T: Token ids or distributions ``(T,)``.
        num_experts: E.
        shuffles: How many shuffles the null is made of.
        seed: Of the shuffles.
    """
    rng = np.random.default_rng(seed)
    measured = mutual_information(joint_counts(expert_ids_TK, labels_T, num_experts)[0])
    # Labels move, choices stay: experts of one token remain distinct.
    null = [
        mutual_information(joint_counts(expert_ids_TK, rng.permutation(labels_T), num_experts)[0])
        for _ in range(shuffles)
    ]
    return Information(measured, float(np.mean(null)), float(np.percentile(null, 95)))


def top_tokens(
    expert_ids_TK: Ints, token_ids_T: Ints, num_experts: int, *, most: int = 8, min_count: int = 4
) -> list[list[TopToken]]:
    """The tokens that each expert prefers, by lift.

    Args:
        expert_ids_TK: Chosen experts ``(T, K)``.
        token_ids_T: Token ids ``(T,)``.
        num_experts: E.
        most: At most so many tokens an expert.
        min_count: Least count of a token for the expert; rare tokens have the most extreme lifts.

    Returns:
        For each expert its tokens; equal lifts stand by falling count, then by token id. Tokens without any
        preference for the expert (lift of 1 or less) are left out.
    """
    counts_EJ, tokens_J = joint_counts(expert_ids_TK, token_ids_T, num_experts)
    of_token_J, of_expert_E, total = counts_EJ.sum(axis=0), counts_EJ.sum(axis=1), counts_EJ.sum()
    found = []
    for counts_J, of_expert in zip(counts_EJ, of_expert_E, strict=True):
        # Rounded once: computing lifts first would break ties between equal shares.
        share_J = counts_J / of_token_J
        order = np.lexsort((tokens_J, -counts_J, -share_J))
        kept = [j for j in order if counts_J[j] >= min_count and share_J[j] * total > of_expert][:most]
        lift = total / max(1, of_expert)
        found.append([TopToken(int(tokens_J[j]), int(counts_J[j]), float(share_J[j] * lift)) for j in kept])
    return found


def coactivation(expert_ids_TK: Ints, num_experts: int) -> Floats:
    """Share of the tokens of expert i (row) that expert j (column) was chosen for as well, for all pairs.

    Where every token has K, every row sums to K − 1, so an even spread gives ``(K − 1) / (E − 1)`` in each cell.

    Args:
        expert_ids_TK: Chosen experts ``(T, K)``, distinct within a row; below 0 where a token has fewer.
        num_experts: E.

    Returns:
        float64 ``(E, E)``; NaN on the diagonal and in rows of experts that were never chosen.

    Source:
        OLMoE (arXiv:2409.02060), section 5.2, "expert co-activation".
    """
    ids_TK = np.asarray(expert_ids_TK, dtype=np.int64)
    # shape: (T, K, K)
    pairs_TKK = ids_TK[:, :, None] * num_experts + ids_TK[:, None, :]
    both_TKK = (ids_TK[:, :, None] >= 0) & (ids_TK[:, None, :] >= 0)
    counts_EE = np.bincount(pairs_TKK[both_TKK], minlength=num_experts**2).reshape(num_experts, num_experts)
    # Experts are distinct within a row, so an expert meets itself once per token that chose it.
    chosen_E = counts_EE.diagonal().astype(np.float64)
    chosen_E[chosen_E == 0] = np.nan
    shares_EE = counts_EE / chosen_E[:, None]
    np.fill_diagonal(shares_EE, np.nan)
    return shares_EE


def agreement(first_TK: Ints, second_TL: Ints) -> float:
    """Share of the second model's chosen experts that the first chose as well: ``|intersection| / K`` over all tokens.

    With the last model as second argument this is the router saturation of the first.

    Args:
        first_TK: One model's choices ``(T, K)``, distinct within a row; below 0 where a token has fewer.
        second_TL: The other's choices for the same tokens ``(T, L)``.

    Returns:
        1 for the same sets in any order, 0 for disjoint ones.

    Raises:
        ValueError: If the numbers of tokens differ, or the second model chose nothing.

    Source:
        OLMoE (arXiv:2409.02060), section 5.1, "router saturation".
    """
    chosen = int((second_TL >= 0).sum())
    if len(first_TK) != len(second_TL) or not chosen:
        raise ValueError(f"{first_TK.shape} and {second_TL.shape} are not of the same tokens, or all of them -1")
    # shape: (T, K, L)
    same_TKL = (first_TK[:, :, None] == second_TL[:, None, :]) & (second_TL[:, None, :] >= 0)
    return float(same_TKL.sum() / chosen)


def output_similarity(outputs_END: Floats) -> Floats:
    """Mean cosine between the outputs of each pair of experts on the same inputs.

    Args:
        outputs_END: Each expert's output for each input ``(E, N, D)``, N at least 1.

    Returns:
        float64 ``(E, E)``, symmetric, within −1 … 1. An output of length 0 has no direction and counts as 0.
    """
    outputs = np.asarray(outputs_END, dtype=np.float64)
    lengths = np.linalg.norm(outputs, axis=2, keepdims=True)
    unit_END = np.divide(outputs, lengths, out=np.zeros_like(outputs), where=lengths > 0)
    # Unit vectors, so the product sums N cosines. shape: (E, N * D)
    flat = unit_END.reshape(len(outputs), -1)
    return flat @ flat.T / outputs.shape[1]


def derangement(num: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A random permutation of ``0 … num - 1`` in one cycle: no number stays, unless there is only one."""
    # Each number moves to its successor in a random order: a single cycle has no fixed point.
    order = rng.permutation(num)
    moved = np.empty(num, dtype=np.int64)
    moved[order] = np.roll(order, -1)
    return moved
