"""GShard's router: two experts, the second one perhaps."""

from __future__ import annotations

import torch
from torch import Tensor

from lifelong_moe.config.routing.base import SecondExpert
from lifelong_moe.config.routing.topk import GShardConfig
from lifelong_moe.routing.routers.learned import LearnedRouter

THRESHOLD = 0.2
"""Share of both gates below which ``second=threshold`` leaves the second expert out (Mesh TensorFlow)."""


class GShardRouter(LearnedRouter):
    """The two largest of a full softmax, their gates divided by their sum before anything is left out or dropped.

    In training the second expert is used with probability ``min(1, 2 g2)``, or where ``g2`` exceeds a threshold; what
    is left keeps its weight, so that a lone first expert has less than 1. In evaluation both are used.

    Source:
        GShard (arXiv:2006.16668), algorithm 1. There a group is served choice by choice, which lets a later token's
        first choice evict an earlier token's second: ``capacity.priority=choice`` (class C). The default here serves
        token by token (class B).
    """

    config: GShardConfig

    def used(self, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """-1 where the second expert is left out."""
        if not self.training or self.config.second == SecondExpert.all:
            return expert_ids_TK
        # Detached: the decision teaches nothing, the weight of a used expert does.
        gate_T = weights_TK[:, 1].detach() / weights_TK.detach().sum(dim=1).clamp_min(1e-9)
        # Uniform in [0, 1/2): exceeded with probability min(1, 2 g2).
        limit_T = torch.rand_like(gate_T) / 2 if self.config.second == SecondExpert.random else THRESHOLD
        used_T = gate_T > limit_T
        return torch.stack([expert_ids_TK[:, 0], torch.where(used_T, expert_ids_TK[:, 1], -1)], dim=1)
