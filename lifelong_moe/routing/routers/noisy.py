"""The sparsely-gated router of 2017: noise before the choice, balance of importance and of expected load."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_moe.config.routing.routers import NoisyConfig
from lifelong_moe.ops.noisy import prob_in_top_k
from lifelong_moe.ops.router_losses import cv_squared, masked_sum
from lifelong_moe.routing.base import LayersLoss, RouterLoss, Routing, RoutingContext
from lifelong_moe.routing.linear import LinearRouter
from lifelong_moe.routing.losses import Choices, balance_losses, z_losses

LEAST_DEVIATION = 1e-2
"""Added to the noise's deviation, as in the authors' code."""


class NoisyRouter(LinearRouter):
    """The k largest of ``H = x W^T + ε · softplus(x N^T)``, weighted by the softmax over those k. No noise in
    evaluation.

    In training ``CV²`` of the experts' summed gate weights (importance) and of their expected loads are losses. Where
    all experts are chosen the load is their plain count, without gradient.

    Source:
        Shazeer et al. 2017 (arXiv:1701.06538), section 2.1 and appendix A. There both matrices begin at zero; here
        the noise's alone does. Class A.
    """

    config: NoisyConfig

    def __init__(self, config: NoisyConfig, *, width: int, layer: int) -> None:
        super().__init__(config, width=width, layer=layer)
        self.noise_rows = nn.ParameterList()

    def add_experts(self, num: int) -> None:
        """Add rows, and rows of zeros for the noise."""
        self.noise_rows.append(nn.Parameter(torch.zeros(num, self.width, device=self.device)))
        super().add_experts(num)

    def preset_parameters(self) -> list[nn.Parameter]:
        """The noise's rows, at zero."""
        return list(self.noise_rows)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Choose k experts for each token."""
        config = self.config
        with torch.autocast(x_TD.device.type, enabled=False):
            clean_TE = self.logits(x_TD)
            noisy_TE = clean_TE
            if self.training:
                raw_TE = self.products(x_TD, self.noise_rows)
                # softplus keeps it positive, the constant away from 0, by which the load divides.
                deviation_TE = F.softplus(raw_TE) + LEAST_DEVIATION
                noisy_TE = clean_TE + torch.randn_like(clean_TE) * deviation_TE
            chosen_TK, ids_TK = noisy_TE.topk(config.top_k, dim=1)
            weights_TK = chosen_TK.softmax(dim=1)
            losses: dict[str, RouterLoss | LayersLoss] = {}
            if self.training:
                made = Choices(clean_TE, clean_TE.softmax(dim=1), ids_TK)
                losses |= balance_losses(config, self.generations, made, context)
                losses |= z_losses(config, clean_TE, context)
                mask_T = context.mask_T
                gates_TE = torch.zeros_like(clean_TE).scatter(1, ids_TK, weights_TK)
                if config.importance_loss:
                    losses["importance"] = RouterLoss(cv_squared(masked_sum(gates_TE, mask_T)), config.importance_loss)
                if config.load_loss:
                    if config.top_k < self.num_experts:
                        load_TE = prob_in_top_k(clean_TE, noisy_TE, deviation_TE, config.top_k)
                    else:
                        # Every expert is chosen, whatever the noise: the load is a plain count.
                        load_TE = torch.ones_like(clean_TE)
                    losses["load"] = RouterLoss(cv_squared(masked_sum(load_TE, mask_T)), config.load_loss)
        return Routing(ids_TK, weights_TK, self.num_experts, losses)
