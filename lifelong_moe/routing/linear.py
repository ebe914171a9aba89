"""Base class of the trained routers: one row per expert, one Parameter per generation.

Legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import math
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

    def logits(self, x_TD: Tensor, present: frozenset[int] | None = None) -> Tensor:
        """float32 ``(T, E)``, of the experts among which tokens choose.

        Args:
            x_TD: Tokens ``(T, D)``.
            present: As in :class:`RoutingContext`: no token may choose an expert of another generation, whose logits
                need not be computed and are ``-inf``. So the cost does not grow with the number of generations.
        """
        # A token of a generation that is masked chooses among the first's.
        known = present is not None and all(generation < len(self.available) for generation in present)
        return self.products(x_TD, self.rows, present if known else None)

    def products(self, x_TD: Tensor, generations: Iterable[Tensor], present: frozenset[int] | None = None) -> Tensor:
        """Products with each available generation's rows, side by side; ``-inf`` for those that are not present."""

        def of(generation: int, rows_ED: Tensor) -> Tensor:
            # Rows that train have a gradient, if one of zero, which processes that train together rely on.
            trains = rows_ED.requires_grad and torch.is_grad_enabled()
            if present is None or generation in present or trains:
                return F.linear(x_TD.float(), rows_ED.float())
            return torch.full((len(x_TD), len(rows_ED)), -math.inf, device=x_TD.device)

        # A product for each generation: kernels round differently for another number of rows, and a token on the edge
        # between two experts would move when the model grows.
        unmasked = list(generations)[: len(self.available)]
        return torch.cat([of(generation, rows_ED) for generation, rows_ED in enumerate(unmasked)], dim=-1)
