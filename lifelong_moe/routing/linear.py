"""Base class of the trained routers: one row per expert, one Parameter per generation.

Legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_moe.config.routing.base import RoutingConfig
from lifelong_moe.routing.base import Router


class LinearRouter(Router):
    """Logits ``x W^T``. The rows of each generation are a Parameter of their own, so that frozen ones have no
    gradient, no moments and no decay. Logits are float32 under autocast too."""

    def __init__(self, config: RoutingConfig, *, width: int, layer: int) -> None:
        super().__init__(config, width=width, layer=layer)
        self.rows = nn.ParameterList()

    def add_experts(self, num: int) -> None:
        """Add ``num`` rows, uninitialized; the model's or growth's initialization fills them."""
        self.rows.append(nn.Parameter(torch.zeros(num, self.width, device=self.device)))
        self.generations.append(num)

    @property
    def device(self) -> torch.device | None:
        """Device of the rows; None before there are any."""
        return self.rows[0].device if len(self.rows) else None

    def row_generations(self) -> list[Tensor]:
        """Each generation's rows."""
        return list(self.rows)

    def set_rows(self, rows_ED: Tensor) -> None:
        """Initialize the newest generation's rows with ``(num, D)``."""
        with torch.no_grad():
            self.rows[-1].copy_(rows_ED)

    def logits(self, x_TD: Tensor) -> Tensor:
        """float32 ``(T, E)``, of the experts among which tokens choose."""
        return self.products(x_TD, self.rows)

    def products(self, x_TD: Tensor, generations: Iterable[Tensor]) -> Tensor:
        """Products with each available generation's rows, side by side."""
        # A product for each generation: kernels round differently for another number of rows, and a token on the edge
        # between two experts would move when the model grows.
        unmasked = list(generations)[: len(self.available)]
        return torch.cat([F.linear(x_TD.float(), rows_ED.float()) for rows_ED in unmasked], dim=-1)
