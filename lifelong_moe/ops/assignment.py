"""Balanced assignment: each expert gets as many tokens as any other, and the scores' sum is as large as it can be.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 2000


@torch.no_grad()
def balanced_assignment(scores_TE: Tensor, *, step: float | None = None, rounds: int = ROUNDS) -> Tensor:
    """Assign tokens to experts by an auction; experts' numbers of tokens differ by at most one.

    A token without a place bids for the expert that is worth most to it at present prices: so much more than its
    price that another expert would then be worth ``step`` more. A full expert gives up its lowest bidder, whose bid is
    its price from then on. At the end the total is within ``T * step`` of the optimum.

    Args:
        scores_TE: What a token is worth at each expert, finite ``(T, E)``.
        step: Least rise of a bid; by default 1/50 of the scores' range, at least 1e-4.
        rounds: After so many rounds the tokens still without a place take what is left, in order.

    Returns:
        Expert of each token, int64 ``(T,)``. The first ``T mod E`` experts have one token more.

    Source:
        Auction algorithm for similar objects: Bertsekas & Castañon 1989. BASE layers (arXiv:2103.16716), section 3.2,
        use the auction too, with step ``max(1e-4, range / 50)`` and a quicker finish after 100 rounds.
    """
    num_tokens, num_experts = scores_TE.shape
    # On the CPU: every step below asks for numbers. In float64: bids rise by far less than scores differ.
    scores = scores_TE.double().cpu()
    room_E = torch.full((num_experts,), num_tokens // num_experts)
    room_E[: num_tokens % num_experts] += 1
    if step is None:
        step = max(1e-4, float(scores.max() - scores.min()) / 50) if num_tokens else 1.0
    if num_experts == 1:
        return torch.zeros(num_tokens, dtype=torch.int64, device=scores_TE.device)
    place_T, bid_T = torch.full((num_tokens,), -1), torch.zeros(num_tokens, dtype=torch.float64)
    price_E = torch.zeros(num_experts, dtype=torch.float64)
    # With fewer tokens than experts some have no room; at this price nobody bids for them.
    price_E[room_E == 0] = torch.inf
    for _ in range(rounds):
        waiting = (place_T < 0).nonzero().squeeze(1)
        if not len(waiting):
            break
        value_NE = scores[waiting] - price_E
        best, wanted = value_NE.topk(2, dim=1)
        # The second best may be an expert without room, worth -inf: there is nobody to outbid.
        gap_N = (best[:, 0] - best[:, 1]).nan_to_num(posinf=0.0).clamp_min(0.0)
        place_T[waiting] = wanted[:, 0]
        bid_T[waiting] = price_E[wanted[:, 0]] + gap_N + step
        for expert in wanted[:, 0].unique().tolist():
            bidders = (place_T == expert).nonzero().squeeze(1)
            room = int(room_E[expert])
            if len(bidders) > room:
                # Stable: of equal bids the earlier token keeps its place.
                ranked = bidders[bid_T[bidders].argsort(descending=True, stable=True)]
                place_T[ranked[room:]] = -1
                bidders = ranked[:room]
            if len(bidders) == room:
                price_E[expert] = bid_T[bidders].min()
    waiting = (place_T < 0).nonzero().squeeze(1)
    if len(waiting):
        # Out of rounds: equal loads are the promise, the last bit of score is not.
        free_E = room_E - torch.bincount(place_T[place_T >= 0], minlength=num_experts)
        place_T[waiting] = torch.arange(num_experts).repeat_interleave(free_E)
    return place_T.to(scores_TE.device)
