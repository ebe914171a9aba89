"""The mixture-of-experts layer: route, dispatch, experts, combine."""

from __future__ import annotations

from torch import Tensor, nn

from lifelong_moe.model.experts import ExpertBanks
from lifelong_moe.routing.base import Router, Routing, RoutingContext


class MoELayer(nn.Module):
    """Any router over two banks of experts. It knows nothing of how the router decides."""

    def __init__(self, router: Router, banks: ExpertBanks) -> None:
        super().__init__()
        self.router = router
        self.banks = banks

    def add_experts(self, num: int) -> None:
        """Add experts and their router rows, uninitialized, to the active bank."""
        self.banks.add(num)
        self.router.add_experts(num)

    def freeze(self, but: int | None = None) -> None:
        """Freeze every expert and router row there is, but those of one generation, which alone trains."""
        births = [g for g, num in enumerate(self.router.generations) for _ in range(num)]
        self.banks.freeze([i for i, birth in enumerate(births) if birth == but])
        self.router.freeze()
        if but is not None and self.router.row_generations():
            self.router.row_generations()[but].requires_grad_(True)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> tuple[Tensor, Routing]:
        """``(T, D)`` to ``(T, D)``, with what the router decided."""
        routing = self.router(x_TD, context)
        rows_ND = self.banks(routing.dispatch(x_TD), routing.counts_E)
        return routing.combine(rows_ND), routing
