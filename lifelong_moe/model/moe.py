"""The mixture-of-experts layer: route, dispatch, experts, combine, and add shared experts.

Legend: T tokens, D model width, N rows handed to experts, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lifelong_moe.config.parts import Part, Place
from lifelong_moe.model.experts import ExpertBanks
from lifelong_moe.model.feedforward import FeedForward
from lifelong_moe.ops.collectives import parallel_experts
from lifelong_moe.ops.initializers import fan_in_normal_
from lifelong_moe.routing.base import Router, Routing, RoutingContext


class MoELayer(nn.Module):
    """A router over experts, and optionally a shared network that every token uses.

    The layer does not depend on how the router decides. With ``mixes``, routed and shared outputs are weighted by a
    learned softmax per token; otherwise they are added.

    Source:
        Shared experts: DeepSeekMoE (arXiv:2401.06066). Learned mix: DeepSpeed-MoE's residual layer, as in its code; the
        paper (arXiv:2201.05596) adds.
    """

    shared_part = Part.shared
    """The part that the shared network belongs to."""

    def __init__(
        self, router: Router, banks: ExpertBanks, shared: FeedForward | None = None, *, mixes: bool = False
    ) -> None:
        super().__init__()
        self.router = router
        self.banks = banks
        self.shared = shared
        self.mix = nn.Linear(banks.width, 2) if mixes else None
        self.recomputes = False
        """Whether experts are recomputed in the backward pass."""

    def add_experts(self, num: int, rank: int = 0) -> None:
        """Add a generation of experts, with a rank low-rank ones, and their router rows, uninitialized."""
        self.banks.add(num, rank)
        self.router.add_experts(num)

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Fill what a routing mode's authors begin in a way of their own, after all matrices were filled alike."""
        self.router.initialize(generator)
        if self.router.expert_scale is not None:
            for expert in self.banks.matrices():
                for matrix in expert:
                    fan_in_normal_(matrix, self.router.expert_scale, generator)

    def places(self, layer: int) -> dict[nn.Parameter, Place]:
        """The place of each parameter, given the index of this layer."""
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
        """Freeze all experts and router rows except those of one generation; None freezes all."""
        self.banks.freeze(but)
        # The router freezes what its generations share as well, and one generation is released again.
        self.router.freeze()
        for parameter in [] if but is None else self.router.parameters_of(but):
            parameter.requires_grad_(True)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> tuple[Tensor, Routing]:
        """``(T, D)`` to ``(T, D)``, and the router's decision."""
        routing = self.decide(x_TD, context)
        first = 0 if self.banks.placement else self.banks.sorted_from(x_TD)
        # shape: (N, D), sorted by expert
        rows_ND = routing.dispatch(x_TD, first)
        # shape: (N, D)
        out_ND = self._experts(rows_ND, routing.counts_E)
        # shape: (T, D), weighted by gates
        routed_TD = routing.combine(out_ND, first)
        return self._with_shared(x_TD, routed_TD), routing

    def decide(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """The router's decision on ``(T, D)``."""
        routing: Routing = self.router(x_TD, context)
        return routing

    def _experts(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        if (placement := self.banks.placement) is None:
            return self._experts_here(rows_ND, counts_E)
        return parallel_experts(rows_ND, counts_E, placement, self._experts_here, self.banks.sorted_from(rows_ND))

    def _experts_here(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        # The router is not recomputed: it may count tokens or draw noise. Nor do rows travel twice.
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(self.banks, rows_ND, counts_E, use_reentrant=False)
        return self.banks(rows_ND, counts_E)

    def _with_shared(self, x_TD: Tensor, routed_TD: Tensor) -> Tensor:
        """Add the shared network's output, if there is one."""
        if self.shared is None:
            return routed_TD
        shared_TD = self.shared(x_TD)
        if self.mix is None:
            return routed_TD + shared_TD
        # shape: (T, 2), routed and shared
        shares_T2 = self.mix(x_TD).softmax(dim=-1)
        return routed_TD * shares_T2[:, :1] + shared_TD * shares_T2[:, 1:]


class DenseLayer(MoELayer):
    """A layer without routed experts: a feed-forward network only."""

    shared_part = Part.dense

    def forward(self, x_TD: Tensor, context: RoutingContext) -> tuple[Tensor, Routing]:
        """``(T, D)`` to ``(T, D)``, with an empty routing."""
        assert self.shared is not None
        return self.shared(x_TD), self.decide(x_TD, context)

    def decide(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """An empty routing."""
        return no_routing(x_TD)


def no_routing(x_TD: Tensor) -> Routing:
    """The routing of a layer without routed experts."""
    # shape: (T, 0)
    nobody = torch.zeros(len(x_TD), 0, dtype=torch.int64, device=x_TD.device)
    return Routing(nobody, nobody.float(), 0)
