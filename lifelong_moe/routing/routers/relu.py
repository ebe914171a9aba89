"""ReMoE: an expert is used where its gate is positive; an adaptive penalty keeps ``top_k`` of them on average."""

from __future__ import annotations

import torch
from torch import Tensor

from lifelong_moe.config.routing.routers import ReluConfig
from lifelong_moe.ops.collectives import sum_over_ranks
from lifelong_moe.ops.router_losses import relu_sparsity_loss
from lifelong_moe.routing.base import RouterLoss, Routing, RoutingContext
from lifelong_moe.routing.linear import LinearRouter
from lifelong_moe.routing.losses import Choices, balance_losses, z_losses

FIRST_COEFFICIENT = 1e-8
FACTOR = 1.2
"""By which the coefficient rises or falls after each step."""


class ReluRouter(LinearRouter):
    """Gates ``relu(x W^T)``; a token uses as many experts as have a positive gate, perhaps none.

    The penalty's coefficient rises by a fifth after a step in which more than ``top_k / E`` of the gates were positive,
    and falls by as much otherwise. It is a buffer, saved with the stage. Each layer has its own.

    Source:
        ReMoE (arXiv:2412.14711), section 3; there one coefficient serves all layers. Class A.
    """

    config: ReluConfig
    coefficient: Tensor

    def __init__(self, config: ReluConfig, *, width: int, layer: int) -> None:
        super().__init__(config, width=width, layer=layer)
        self.register_buffer("coefficient", torch.tensor(FIRST_COEFFICIENT))
        self.used_and_all: Tensor | None = None
        """Positive gates in the step under way, and all; over all processes."""

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Use the experts whose gates are positive."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            gates_TE = logits_TE.relu()
            experts_E = torch.arange(self.num_available, device=x_TD.device)
            ids_TE = torch.where(gates_TE > 0, experts_E, -1)
            losses = {}
            if self.training:
                made = Choices(logits_TE, logits_TE.softmax(dim=1), ids_TE)
                losses = balance_losses(self.config, self.generations, made, context)
                losses |= z_losses(self.config, logits_TE, context)
                value = relu_sparsity_loss(gates_TE, context.mask_T, self.config.top_k)
                # A copy, for it changes in place before another step; no number, for which a GPU would be waited for.
                losses["sparsity"] = RouterLoss(value, self.coefficient.clone())
                positive = ((gates_TE > 0) & context.mask_T.unsqueeze(1)).sum()
                counts = torch.stack([positive, context.mask_T.sum() * gates_TE.shape[1]])
                # Over all processes, so that each adapts its coefficient alike.
                seen = sum_over_ranks(counts)
                self.used_and_all = seen if self.used_and_all is None else self.used_and_all + seen
        return Routing(ids_TE, gates_TE, self.num_experts, losses, ragged=True)

    def end_step(self, taken: bool) -> None:
        """Adapt the coefficient."""
        seen, self.used_and_all = self.used_and_all, None
        if taken and seen is not None:
            # Products of whole numbers: exact, hence the same on every device.
            too_many = seen[0] * self.num_experts > seen[1] * self.config.top_k
            self.coefficient *= torch.where(too_many, FACTOR, 1 / FACTOR).to(self.coefficient.dtype)
