"""A gate of gates: first groups of experts, then experts within each.

Legend: T tokens, E experts, G groups, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lifelong_moe.config.routing.routers import HierarchicalConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.routing.base import Routing, RoutingContext
from lifelong_moe.routing.linear import LinearRouter
from lifelong_moe.routing.losses import Choices, balance_losses


class HierarchicalRouter(LinearRouter):
    """``top_groups`` groups by an outer gate, ``top_k / top_groups`` experts in each by the group's own inner gate.

    Both gates are softmaxes over what they chose; a weight is the product of two, so that a token's weights sum to 1.
    A gate that chose one would weigh it 1 whatever it says, and learn nothing from the task: a run has two of each at
    least. Each generation is groups of its own: growth adds rows to the outer gate, and with them groups.

    Source:
        Sparsely-gated mixture of experts (arXiv:1701.06538), appendix B, and C.1: two groups and two experts in each,
        four a token. There with noise and two balance losses, here with the balance loss on the product of the full
        softmaxes. Mesh (mesh_tensorflow/transformer/moe.py, ``transformer_moe_layer_v2``) takes two groups too, and
        two experts of the first group, one of the second. Class A.
    """

    config: HierarchicalConfig

    def __init__(self, config: HierarchicalConfig, *, width: int, layer: int) -> None:
        super().__init__(config, width=width, layer=layer)
        self.group_rows = nn.ParameterList()

    def add_experts(self, num: int) -> None:
        """Add a generation's groups: their outer rows, begun at zero, and inner rows."""
        groups = self.config.groups_of(num)
        too_few = num > 0 and groups < (1 if any(self.generations) else self.config.expert_groups)
        if too_few or num % max(1, groups):
            raise ConfigError(
                f"routing.expert_groups={self.config.expert_groups} must divide the number of experts ({num}) into "
                f"groups of at least {self.config.experts_per_group} (routing.top_k / routing.top_groups)."
            )
        self.group_rows.append(nn.Parameter(torch.zeros(groups, self.width, device=self.device)))
        super().add_experts(num)

    def set_rows(self, rows_ED: Tensor) -> None:
        """Begin the newest inner rows; a group's outer row is their mean."""
        super().set_rows(rows_ED)
        with torch.no_grad():
            self.group_rows[-1].copy_(rows_ED.unflatten(0, (len(self.group_rows[-1]), -1)).mean(dim=1))

    def group_of_experts(self) -> Tensor:
        """Group of each expert among which tokens choose, int64 ``(E,)``."""
        numbers = [(num, self.config.groups_of(num)) for num in self.available]
        sizes = [num // groups for num, groups in numbers for _ in range(groups)]
        return self.owners(sizes, self.rows[0].device)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Choose groups, then experts."""
        config, group_E = self.config, self.group_of_experts()
        with torch.autocast(x_TD.device.type, enabled=False):
            inner_TE, outer_TG = self.logits(x_TD), self.products(x_TD, self.group_rows)
            chosen_TG, groups_TG = outer_TG.topk(config.top_groups, dim=1)
            outer_weights_TG = chosen_TG.softmax(dim=1)
            in_group_TGE = group_E == groups_TG.unsqueeze(2)
            candidates_TGE = inner_TE.unsqueeze(1).masked_fill(~in_group_TGE, float("-inf"))
            inner_TGK, ids_TGK = candidates_TGE.topk(self.config.experts_per_group, dim=2)
            weights_TK = (outer_weights_TG.unsqueeze(2) * inner_TGK.softmax(dim=2)).flatten(1)
            losses = {}
            if self.training:
                logits_TE = self._log_product(outer_TG, inner_TE, group_E)
                made = Choices(logits_TE, logits_TE.exp(), ids_TGK.flatten(1))
                # Balance on the product of both softmaxes over all, not over what was chosen.
                losses = balance_losses(config, self.generations, made, context)
        return Routing(ids_TGK.flatten(1), weights_TK, self.num_experts, losses)

    def _log_product(self, outer_TG: Tensor, inner_TE: Tensor, group_E: Tensor) -> Tensor:
        """Logarithm of group probability times probability within the group, ``(T, E)``; its exponentials sum to 1."""
        index_TE = group_E.expand_as(inner_TE)
        # Each group by its own maximum: by that of all, a group whose logits are far below would sum to 0.
        largest_TG = torch.full_like(outer_TG, -torch.inf).scatter_reduce(1, index_TE, inner_TE.detach(), "amax")
        shifted_TE = inner_TE - largest_TG.gather(1, index_TE)
        sums_TG = torch.zeros_like(outer_TG).index_add(1, group_E, shifted_TE.exp())  # at least 1
        return outer_TG.log_softmax(dim=1)[:, group_E] + shifted_TE - sums_TG.log()[:, group_E]
