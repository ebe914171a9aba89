"""V-MoE's router: a little noise before the softmax, and losses on importance and on expected load.

Legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lifelong_moe.config.routing.routers import VMoEConfig
from lifelong_moe.ops.initializers import fan_in_normal_
from lifelong_moe.ops.noisy import prob_above_threshold, sequence_cv_squared
from lifelong_moe.routing.base import LayersLoss, RouterLoss, Routing, RoutingContext
from lifelong_moe.routing.capacity import apply_capacity, causality, weighting_experts
from lifelong_moe.routing.linear import LinearRouter
from lifelong_moe.routing.losses import Choices, balance_losses, z_losses

CUT_DEVIATION = 0.8796
"""Of a normal of deviation 1 that is drawn again beyond 2."""


class VMoERouter(LinearRouter):
    """``g = softmax(x W^T + ε)``, ε normal of deviation 1/E; the k largest gates as they are, so that k = 1 learns too.

    In training ``CV²`` of the experts' summed gates without noise (importance) and of their expected loads are losses,
    in each sequence, which is also what has an expert's room. No noise and no loss in evaluation.

    Source:
        V-MoE (arXiv:2106.05974), sections 2 and 4, appendix A; google-research/vmoe, vmoe/nn/routing.py and
        vmoe/moe.py. There a group of 8 images has the room, here a sequence. ``capacity.priority=batch`` is its
        batch-priority routing, ``choice`` what it calls vanilla; both are class C.
    """

    config: VMoEConfig

    def __init__(self, config: VMoEConfig, *, width: int, layer: int) -> None:
        super().__init__(config, width=width, layer=layer)
        self.causality = causality(config.capacity)

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Rows that make logits of about 1 (LeCun's normal, flax's default), far above the noise."""
        for rows_ED in self.rows:
            fan_in_normal_(rows_ED, 1 / CUT_DEVIATION**2, generator)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Choose k experts for each token."""
        config = self.config
        with torch.autocast(x_TD.device.type, enabled=False):
            noisy_TE = clean_TE = self.logits(x_TD)
            if self.training:
                # Of deviation 1 / E, which is fixed: nothing learns how much noise there is.
                noisy_TE = clean_TE + torch.randn_like(clean_TE) / self.num_available
            gates_TE = noisy_TE.softmax(dim=1)
            ids_TK = noisy_TE.topk(min(config.top_k, self.num_available), dim=1).indices
            losses = self._losses(clean_TE, noisy_TE, ids_TK, context) if self.training else {}
            if config.capacity is None:
                return Routing(ids_TK, gates_TE.gather(1, ids_TK), self.num_experts, losses)
            kept_TK, dropped = apply_capacity(
                config.capacity, ids_TK, noisy_TE, gates_TE, context, training=self.training
            )
            weights_TK = gates_TE.gather(1, weighting_experts(kept_TK, ids_TK))
        return Routing(kept_TK, weights_TK, self.num_experts, losses, ragged=True, dropped=dropped)

    def _losses(
        self, clean_TE: Tensor, noisy_TE: Tensor, ids_TK: Tensor, context: RoutingContext
    ) -> dict[str, RouterLoss | LayersLoss]:
        config, mask_T, sequences = self.config, context.mask_T, context.num_sequences
        made = Choices(clean_TE, noisy_TE.softmax(dim=1), ids_TK)
        losses = balance_losses(config, self.generations, made, context) | z_losses(config, clean_TE, context)
        if context.old_text_T is not None:  # a review: earlier text belongs to earlier experts, balanced or not
            return losses
        if config.importance_loss:
            # Of the gates without noise: importance is what the router means.
            value = sequence_cv_squared(clean_TE.softmax(dim=1), mask_T, sequences)
            losses["importance"] = RouterLoss(value, config.importance_loss)
        if config.load_loss:
            load_TE = prob_above_threshold(clean_TE, noisy_TE, 1 / self.num_available, ids_TK.shape[1])
            losses["load"] = RouterLoss(sequence_cv_squared(load_TE, mask_T, sequences), config.load_loss)
        return losses
