"""Expert choice: experts pick tokens. A later token can displace an earlier one, always."""

from __future__ import annotations

import torch
from torch import Tensor

from lifelong_moe.config.routing.routers import ExpertChoiceConfig
from lifelong_moe.routing.base import Causality, Routing, RoutingContext
from lifelong_moe.routing.linear import LinearRouter
from lifelong_moe.routing.losses import z_losses


class ExpertChoiceRouter(LinearRouter):
    """Each expert takes the ``S · top_k / E`` tokens of a sequence of S for which its probability is largest.

    Weights are the probabilities ``softmax(x W^T)`` over experts, not renormalized. A token gets ``top_k`` experts on
    average, perhaps none, perhaps all. Ties go to the earlier token. No loss is needed: loads are equal.

    Source:
        Zhou et al. (arXiv:2202.09368), section 3.2; there over a batch, here within each sequence. Class D: what the
        authors say of decoders holds; evaluation with it says nothing about generation.
    """

    causality = Causality.leaks
    config: ExpertChoiceConfig

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Let experts choose."""
        num, sequences = self.num_available, context.num_sequences
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD)
            probs_TE = logits_TE.softmax(dim=1)
            real_TE = context.mask_T.unsqueeze(1).expand_as(probs_TE)
            # -1 is below every probability: padding is taken last, and then left out.
            wanted_BSE = probs_TE.masked_fill(~real_TE, -1.0).detach().unflatten(0, (sequences, -1))
            length = wanted_BSE.shape[1]
            # At least one token, where a sequence is shorter than experts are many.
            capacity = min(length, max(1, round(length * self.config.top_k / num)))
            order_BSE = wanted_BSE.argsort(dim=1, descending=True, stable=True)[:, :capacity]
            taken_BSE = torch.zeros_like(wanted_BSE, dtype=torch.bool).scatter_(1, order_BSE, True)
            taken_TE = taken_BSE.flatten(0, 1) & real_TE
            ids_TE = torch.where(taken_TE, torch.arange(num, device=x_TD.device), -1)
            losses = z_losses(self.config, logits_TE, context) if self.training else {}
        return Routing(ids_TE, probs_TE, self.num_experts, losses, ragged=True)
