"""Base class of the trained routers: one row per expert, one Parameter per generation.

Legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby

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
        if present is None or any(generation >= len(self.available) for generation in present):
            return self.products(x_TD, self.rows)
        needed = {*present}
        if torch.is_grad_enabled():
            # Rows that train have a gradient, if one of zero, which processes that train together rely on.
            needed |= {generation for generation, rows_ED in enumerate(self.rows) if rows_ED.requires_grad}
        columns = []
        for is_needed, group in groupby(range(len(self.available)), needed.__contains__):
            members = [*group]
            if is_needed:
                columns.append(self.products(x_TD, [self.rows[generation] for generation in members]))
            else:
                width = sum(self.available[generation] for generation in members)
                columns.append(torch.full((len(x_TD), width), -math.inf, device=x_TD.device))
        return torch.cat(columns, dim=-1)

    def products(self, x_TD: Tensor, generations: Iterable[Tensor]) -> Tensor:
        """Products with each available generation's rows, side by side."""
        # A product for each generation: kernels round differently for another number of rows, and a token on the edge
        # between two experts would move when the model grows.
        unmasked = list(generations)[: len(self.available)]
        return torch.cat([F.linear(x_TD.float(), rows_ED.float()) for rows_ED in unmasked], dim=-1)
