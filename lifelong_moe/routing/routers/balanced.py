"""BASE layers: in training every expert gets equally many tokens; in evaluation a token goes where it likes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lifelong_moe.config.routing.routers import BaseConfig
from lifelong_moe.ops.assignment import balanced_assignment
from lifelong_moe.routing.base import Causality, Routing, RoutingContext
from lifelong_moe.routing.linear import LinearRouter
from lifelong_moe.routing.losses import z_losses

ROW_LENGTH = 0.1
"""Of each row at the beginning."""


class BalancedRouter(LinearRouter):
    """One expert a token, by balanced assignment over the batch in training and by the largest score in evaluation.

    The output is weighted ``sigmoid(score)``, through which alone the rows learn; no loss of its own.

    Source:
        BASE layers (arXiv:2103.16716); facebookresearch/fairseq, fairseq/modules/base_layer.py: rows begin orthogonal,
        of length 0.1. There an expert is a stack of residual sublayers, chosen by what comes before their norms, and
        tokens are shuffled across workers; here it is one feed-forward network, chosen by its own input, and the
        assignment is over the micro-batch. Class C in training, where later tokens compete for places; evaluation is
        class A.
    """

    causality = Causality.leaks_when_full
    config: BaseConfig

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Orthogonal rows: no two experts want the same tokens yet."""
        for rows_ED in self.rows:
            nn.init.orthogonal_(rows_ED, gain=ROW_LENGTH, generator=generator)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Choose one expert for each token."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            ids_T = logits_TE.argmax(dim=1)
            losses = {}
            if self.training:
                # Detached: rows learn through the weight below, not through the assignment.
                ids_T = torch.where(context.mask_T, _assigned(logits_TE.detach(), context.mask_T), ids_T)
                losses = z_losses(self.config, logits_TE, context)
            weights_T1 = logits_TE.gather(1, ids_T.unsqueeze(1)).sigmoid()
        return Routing(ids_T.unsqueeze(1), weights_T1, self.num_experts, losses)


def _assigned(scores_TE: Tensor, mask_T: Tensor) -> Tensor:
    """Balanced experts of the unmasked tokens, int64 ``(T,)``; 0 for the others."""
    # To the CPU, where the assignment is computed, in one piece: a GPU is waited for once.
    *columns, real_T = torch.cat([scores_TE, mask_T.unsqueeze(1).to(scores_TE.dtype)], dim=1).cpu().unbind(dim=1)
    real_T = real_T > 0
    ids_T = torch.zeros(len(scores_TE), dtype=torch.int64)
    ids_T[real_T] = balanced_assignment(torch.stack(columns, dim=1)[real_T])
    return ids_T.to(scores_TE.device, non_blocking=True)
