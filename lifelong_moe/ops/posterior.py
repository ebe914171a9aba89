"""Weights of a mixture's members, from what each said about the text so far; a member far behind is left out for good.

Legend: T steps, G members of the mixture.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def next_log_weights(score_G: Tensor, alive_G: Tensor, drop: float) -> tuple[Tensor, Tensor]:
    """Log weights of the members at one step: the reference of :func:`log_weights`.

    Args:
        score_G: How well each member explains what precedes the step, float64 nats ``(..., G)``; entries of members
            that are out are not read.
        alive_G: Members that are left, bool ``(..., G)``; at least one.
        drop: A member whose weight is under this share of the largest one is left out, now and at all later steps.

    Returns:
        Log weights, float64 ``(..., G)``: minus infinity without weight, and exactly 0 for the last one that is left.
        The members that are left.
    """
    score_G = score_G.masked_fill(~alive_G, -math.inf)
    best_1 = score_G.max(dim=-1, keepdim=True).values
    alive_G = alive_G & (score_G >= best_1 + _log(drop))
    score_G = score_G.masked_fill(~alive_G, -math.inf)
    return score_G - score_G.logsumexp(dim=-1, keepdim=True), alive_G


def log_weights(score_TG: Tensor, alive_G: Tensor, drop: float) -> tuple[Tensor, Tensor]:
    """Log weights at consecutive steps.

    Args:
        score_TG: As for :func:`next_log_weights`, of each step, ``(T, G)``.
        alive_G: Members that are left before the first of them.
        drop: As there.

    Returns:
        Log weights ``(T, G)``, and the members that are left after the last step. No row depends on a later one.
    """
    log_weights_TG, alive_G = torch.full_like(score_TG, -math.inf), alive_G.clone()
    first = 0
    # Between two steps that leave somebody out, weights are those of a mixture without end: at most G rounds.
    while first < len(score_TG):
        members = alive_G.nonzero().squeeze(1)
        score_TM = score_TG[first:, members]
        fallen_TM = score_TM < score_TM.max(dim=1, keepdim=True).values + _log(drop)
        rows = fallen_TM.any(dim=1).nonzero()
        until = int(rows[0]) if len(rows) else len(score_TM)
        kept_TM = score_TM[:until]
        log_weights_TG[first : first + until, members] = kept_TM - kept_TM.logsumexp(dim=1, keepdim=True)
        if until < len(score_TM):
            alive_G[members[fallen_TM[until]]] = False
        first += until
    return log_weights_TG, alive_G


def _log(drop: float) -> float:
    return math.log(drop) if drop else -math.inf
