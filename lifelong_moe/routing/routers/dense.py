"""The mixture of 1991: every expert answers every token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong_moe.config.routing.routers import DenseConfig
from lifelong_moe.routing.base import Routing, RoutingContext
from lifelong_moe.routing.linear import LinearRouter
from lifelong_moe.routing.losses import z_losses

NOTHING = -1e4
"""Logarithm of no weight: finite, in half precision too."""


class DenseRouter(LinearRouter):
    """All experts, weighted ``softmax(x W^T)``; cost grows with their number.

    Source:
        Jacobs, Jordan, Nowlan & Hinton 1991, eq. 1.1's mixture; their losses are in ``ops/jacobs.py``. Class A.
    """

    config: DenseConfig

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Weigh all experts."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            # One that is held down answers too, and weighs nothing.
            absent = (0, self.num_experts - self.num_available)
            probs_TE = F.pad(logits_TE.softmax(dim=1), absent)
            log_probs_TE = (
                F.pad(logits_TE.log_softmax(dim=1), absent, value=NOTHING) if self.config.competitive else None
            )
            ids_TE = torch.arange(self.num_experts, device=x_TD.device).expand_as(probs_TE)
            losses = z_losses(self.config, logits_TE, context) if self.training else {}
        return Routing(ids_TE, probs_TE, self.num_experts, losses, log_weights_TK=log_probs_TE)
