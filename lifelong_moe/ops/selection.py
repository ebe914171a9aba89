"""Which experts may be chosen at all. Pure.

Legend: T tokens, E experts, G groups of experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def within_best_groups(scores_TE: Tensor, num_groups: int, top_groups: int, best: int) -> Tensor:
    """Scores with ``-inf`` outside each token's best groups; a group's score is the sum of its ``best`` largest.

    Args:
        scores_TE: Any scores ``(T, E)``; experts of a group stand side by side.
        num_groups: G, a divisor of E.
        top_groups: How many stay.
        best: How many of a group's scores count; all, if it has fewer.

    Source:
        DeepSeek's own code (deepseek-ai/DeepSeek-V3, inference/model.py, ``Gate``): the two largest where scores have
        a bias (V3), else the largest alone, as in device-limited routing (V2, arXiv:2405.04434, section 2.2.2). V3's
        paper (arXiv:2412.19437, section 2.1.2) and Megatron (megatron/core/transformer/moe/moe_utils.py,
        ``group_limited_topk``) take the ``K / top_groups`` largest, with and without bias: two for V3's 8 experts of
        4 groups, so that all agree on the model that was published.
    """
    # shape: (T, G, E/G)
    scores_TGE = scores_TE.unflatten(1, (num_groups, -1))
    group_TG = scores_TGE.topk(min(best, scores_TGE.shape[2]), dim=2).values.sum(dim=2)
    closed_TG = torch.ones_like(group_TG, dtype=torch.bool)
    closed_TG.scatter_(1, group_TG.topk(top_groups, dim=1).indices, False)
    return scores_TGE.masked_fill(closed_TG.unsqueeze(2), -math.inf).flatten(1)
