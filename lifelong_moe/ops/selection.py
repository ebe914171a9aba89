"""Which experts may be chosen at all. Pure.

Legend: T tokens, E experts, G groups of experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def within_best_groups(scores_TE: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """Scores with ``-inf`` outside each token's best groups; a group's score is the sum of its two largest.

    Args:
        scores_TE: Any scores ``(T, E)``; experts of a group stand side by side.
        num_groups: G, a divisor of E.
        top_groups: How many stay.

    Source:
        Node-limited routing: DeepSeek-V3 (arXiv:2412.19437), section 2.1.2. There a group's score is the sum of its
        ``K / top_groups`` largest, which is two for the model's 8 experts of 4 groups; their code has two always.
    """
    scores_TGE = scores_TE.unflatten(1, (num_groups, -1))
    group_TG = scores_TGE.topk(min(2, scores_TGE.shape[2]), dim=2).values.sum(dim=2)
    closed_TG = torch.ones_like(group_TG, dtype=torch.bool)
    closed_TG.scatter_(1, group_TG.topk(top_groups, dim=1).indices, False)
    return scores_TGE.masked_fill(closed_TG.unsqueeze(2), -math.inf).flatten(1)
