"""Mixtral's router: softmax over trained rows, top-k, dropless."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_moe.ops.router_losses import load_balancing_loss, old_experts_loss, router_z_loss
from lifelong_moe.routing.base import Router, RouterLoss, Routing, RoutingContext
from lifelong_moe.routing.config import BalanceOver, Bundles, RoutingConfig


class LearnedRouter(Router):
    """``p = softmax(x W^T)``; the k largest, their weights divided by their sum if ``renormalize``.

    The rows of each generation are a Parameter of their own, so that frozen ones have no gradient, no moments and
    no decay. Logits and softmax are float32 under autocast too.

    With ``bundles`` a token's group is a bundle, and only that generation's experts are in the softmax: a later stage
    changes nothing for the tokens of an earlier one, and old experts, which no longer learn, take nothing from new
    text.

    Source:
        Mixtral (arXiv:2401.04088), section 2.1; losses from Switch (arXiv:2101.03961) and ST-MoE
        (arXiv:2202.08906). Class A: a token's routing depends on that token alone.
    """

    def __init__(self, config: RoutingConfig, *, width: int, layer: int) -> None:
        super().__init__(config, width=width, layer=layer)
        self.rows = nn.ParameterList()

    def add_experts(self, num: int) -> None:
        """Add ``num`` rows, uninitialized; the model's or growth's initialization fills them."""
        device = self.rows[0].device if self.generations else None
        self.rows.append(nn.Parameter(torch.zeros(num, self.width, device=device)))
        self.generations.append(num)

    def row_generations(self) -> list[Tensor]:
        """Each generation's rows."""
        return list(self.rows)

    def set_rows(self, rows_ED: Tensor) -> None:
        """Begin the newest generation's rows with ``(num, D)``."""
        with torch.no_grad():
            self.rows[-1].copy_(rows_ED)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Choose the k most probable experts for each token; losses come along in training mode."""
        allowed_TE = self.allowed(context)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self._hold(self._logits(x_TD.float()))
            if allowed_TE is not None:
                logits_TE = logits_TE.masked_fill(~allowed_TE, -math.inf)
            probs_TE = logits_TE.softmax(dim=-1)
            # By logit: where probabilities underflow, a tie at 0 must not admit an expert that is not allowed.
            chosen_TK, expert_ids_TK = logits_TE.topk(self.config.top_k, dim=-1)
            # Renormalized, this is the softmax over the chosen alone, and no bit of it depends on all others.
            weights_TK = chosen_TK.softmax(dim=-1) if self.config.renormalize else probs_TE.gather(1, expert_ids_TK)
            losses = {}
            if self.training:
                losses = self._losses(logits_TE, probs_TE, expert_ids_TK, context, allowed_TE)
        return Routing(expert_ids_TK, weights_TK, self.num_experts, losses)

    def _logits(self, x_TD: Tensor) -> Tensor:
        rows = [rows.float() for rows in self.rows]
        if self.config.bundles == Bundles.none:
            return F.linear(x_TD, torch.cat(rows))
        # A product each, so that no bit of the old rows' logits depends on how many rows came later.
        return torch.cat([F.linear(x_TD, rows_ED) for rows_ED in rows], dim=-1)

    def _losses(
        self,
        logits_TE: Tensor,
        probs_TE: Tensor,
        expert_ids_TK: Tensor,
        context: RoutingContext,
        allowed_TE: Tensor | None,
    ) -> dict[str, RouterLoss]:
        config, losses, mask_T = self.config, {}, context.mask_T
        if context.old_text_T is not None:  # a review: earlier text belongs to earlier experts, balanced or not
            num_old = self.num_experts - self.generations[-1]
            losses["old"] = RouterLoss(old_experts_loss(logits_TE, num_old, context.old_text_T & mask_T), 1.0)
        elif config.balance_loss:
            active_only = config.balance_over == BalanceOver.active
            first = self.num_experts - self.generations[-1] if active_only else 0
            value = load_balancing_loss(probs_TE, expert_ids_TK, mask_T, first, allowed_TE)
            losses["balance"] = RouterLoss(value, config.balance_loss)
        if config.z_loss:
            losses["z"] = RouterLoss(router_z_loss(logits_TE, mask_T), config.z_loss)
        return losses
