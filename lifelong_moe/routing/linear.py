"""What all trained routers share: a row an expert, in one Parameter a generation.

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
        """Where the rows are; None before there are any."""
        return self.rows[0].device if len(self.rows) else None

    def row_generations(self) -> list[Tensor]:
        """Each generation's rows."""
        return list(self.rows)

    def set_rows(self, rows_ED: Tensor) -> None:
        """Begin the newest generation's rows with ``(num, D)``."""
        with torch.no_grad():
            self.rows[-1].copy_(rows_ED)

    def logits(self, x_TD: Tensor) -> Tensor:
        """float32 ``(T, E)``, of the experts among which tokens choose."""
        return self.products(x_TD, self.rows)

    def products(self, x_TD: Tensor, generations: Iterable[Tensor]) -> Tensor:
        """Products with each generation's rows, side by side, but for a generation that is held down.

        Each is a product of its own, so that no bit of it depends on how many generations came later: kernels round
        otherwise for another number of rows, and one token on the edge between two experts would go elsewhere.
        """
        choosable = list(generations)[: len(self.choosable)]
        return torch.cat([F.linear(x_TD.float(), rows_ED.float()) for rows_ED in choosable], dim=-1)
