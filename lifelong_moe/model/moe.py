"""The mixture-of-experts layer: route, dispatch, experts, combine; and what stands beside the routed experts.

Legend: T tokens, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lifelong_moe.config.parts import Part, Place
from lifelong_moe.model.experts import ExpertBanks
from lifelong_moe.model.feedforward import FeedForward
from lifelong_moe.ops.initializers import fan_in_normal_
from lifelong_moe.routing.base import Router, Routing, RoutingContext


class MoELayer(nn.Module):
    """Any router over two banks of experts, and perhaps a network that every token uses.

    It knows nothing of how the router decides. With ``mixes`` routed and shared outputs are weighted by a learned
    softmax of the token, else added.

    Source:
        Shared experts: DeepSeekMoE (arXiv:2401.06066). Learned mix: DeepSpeed-MoE's residual layer, as in its code; the
        paper (arXiv:2201.05596) adds.
    """

    shared_part = Part.shared
    """What the network that every token uses is."""

    def __init__(
        self, router: Router, banks: ExpertBanks, shared: FeedForward | None = None, *, mixes: bool = False
    ) -> None:
        super().__init__()
        self.router = router
        self.banks = banks
        self.shared = shared
        self.mix = nn.Linear(banks.width, 2) if mixes else None
        self.recomputes = False
        """Whether experts are computed again in the backward pass."""

    def add_experts(self, num: int) -> None:
        """Add experts and their router rows, uninitialized, to the active bank."""
        self.banks.add(num)
        self.router.add_experts(num)

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Fill what a routing mode's authors begin in a way of their own, after all matrices were filled alike."""
        self.router.initialize(generator)
        if self.router.expert_scale is not None:
            for expert in self.banks.matrices():
                for matrix in expert:
                    fan_in_normal_(matrix, self.router.expert_scale, generator)

    def places(self, layer: int) -> dict[nn.Parameter, Place]:
        """What each parameter is, for the layer of this index."""
        found = dict.fromkeys(self.router.parameters(), Place(Part.router, layer))
        for generation in range(len(self.router.generations)):
            found |= dict.fromkeys(self.router.parameters_of(generation), Place(Part.router, layer, generation))
        for birth, experts in enumerate(self.banks.generations):
            found |= dict.fromkeys(experts.parameters(), Place(Part.expert, layer, birth))
        for module in (self.shared, self.mix):
            if module is not None:
                found |= dict.fromkeys(module.parameters(), Place(self.shared_part, layer))
        return found

    def freeze(self, but: int | None = None) -> None:
        """Freeze every expert and router row there is, but those of one generation, which alone trains."""
        self.banks.freeze(but)
        self.router.freeze()
        for parameter in [] if but is None else self.router.parameters_of(but):
            parameter.requires_grad_(True)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> tuple[Tensor, Routing]:
        """``(T, D)`` to ``(T, D)``, with what the router decided."""
        routing = self.router(x_TD, context)
        first = self.banks.sorted_from(x_TD)
        rows_ND = self._experts(routing.dispatch(x_TD, first), routing.counts_E)
        return self._with_shared(x_TD, routing.combine(rows_ND, first)), routing

    def _experts(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(self.banks, rows_ND, counts_E, use_reentrant=False)
        return self.banks(rows_ND, counts_E)

    def _with_shared(self, x_TD: Tensor, routed_TD: Tensor) -> Tensor:
        """Routed experts' output and the shared network's, where there is one."""
        if self.shared is None:
            return routed_TD
        shared_TD = self.shared(x_TD)
        if self.mix is None:
            return routed_TD + shared_TD
        shares_T2 = self.mix(x_TD).softmax(dim=-1)
        return routed_TD * shares_T2[:, :1] + shared_TD * shares_T2[:, 1:]


class DenseLayer(MoELayer):
    """A layer without routed experts: the shared network is all there is."""

    shared_part = Part.dense

    def forward(self, x_TD: Tensor, context: RoutingContext) -> tuple[Tensor, Routing]:
        """``(T, D)`` to ``(T, D)``, with the answer of a router that has nobody to choose."""
        assert self.shared is not None
        return self.shared(x_TD), no_routing(x_TD)


def no_routing(x_TD: Tensor) -> Routing:
    """The answer of a layer without routed experts."""
    nobody = torch.zeros(len(x_TD), 0, dtype=torch.int64, device=x_TD.device)
    return Routing(nobody, nobody.float(), 0)
