"""Soft MoE: experts work on slots, each a mixture of all of a sequence's tokens. For encoders only.

Legend: B sequences, S tokens of each, T = B·S, D model width, E experts, P slots of each, N = B·E·P rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_moe.config.routing.routers import SoftConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.routing.base import Causality, Routing, RoutingContext
from lifelong_moe.routing.linear import LinearRouter


@dataclass
class SoftRouting(Routing):
    """Nobody is chosen: ``expert_ids_TK`` is empty, and experts get slots."""

    logits_BSEP: Tensor | None = None
    """Of each token and slot ``(B, S, E, P)``."""

    def __post_init__(self) -> None:
        assert self.logits_BSEP is not None
        batch, _, experts, slots = self.logits_BSEP.shape
        self.shape = (batch, experts, slots)
        # Over tokens: a slot's input is a mean of the sequence.
        self.dispatch_BSM = self.logits_BSEP.flatten(2).softmax(dim=1)
        # Over slots: a token's output is a mean of all slots' outputs.
        self.combine_BSM = self.logits_BSEP.flatten(2).softmax(dim=2)

    @property
    def counts_E(self) -> Tensor:  # noqa: N802
        """Slots of each expert, int64 ``(E,)``."""
        batch, experts, slots = self.shape
        return torch.full((experts,), batch * slots, device=self.combine_BSM.device)

    def dispatch(self, x_TD: Tensor, first_expert: int = 0) -> Tensor:
        """Slots ``(N, D)``, sorted by expert; there is one generation, so they begin with expert 0."""
        batch, experts, slots = self.shape
        x_BSD = x_TD.view(batch, -1, x_TD.shape[1])
        mixed_BMD = self.dispatch_BSM.transpose(1, 2).to(x_TD.dtype) @ x_BSD
        return mixed_BMD.unflatten(1, (experts, slots)).transpose(0, 1).reshape(-1, x_TD.shape[1])

    def combine(self, rows_ND: Tensor, first_expert: int = 0) -> Tensor:
        """Each token's mixture of all slots' outputs, ``(T, D)``."""
        batch, experts, slots = self.shape
        rows_BMD = rows_ND.view(experts, batch, slots, -1).transpose(0, 1).flatten(1, 2)
        return (self.combine_BSM.to(rows_ND.dtype) @ rows_BMD).flatten(0, 1)


class SoftRouter(LinearRouter):
    """Logits ``scale · x̂ · φ̂`` of unit tokens and unit slot vectors; softmax over tokens mixes what a slot gets,
    softmax over slots what a token gets back. Nothing is dropped, and no loss is needed.

    Source:
        Puigcerver et al. (arXiv:2308.00951), section 2 and, for the normalization, 2.3. Class D.
    """

    causality = Causality.leaks
    config: SoftConfig

    def __init__(self, config: SoftConfig, *, width: int, layer: int) -> None:
        super().__init__(config, width=width, layer=layer)
        self.scale = nn.Parameter(torch.ones(1))

    def add_experts(self, num: int) -> None:
        """Make slot vectors for the first experts."""
        if self.generations:
            raise ConfigError("routing.mode=soft cannot grow: every token uses every slot, so new ones change all.")
        self.rows.append(nn.Parameter(torch.randn(num * self.config.slots, self.width) / math.sqrt(self.width)))
        self.generations.append(num)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Mix."""
        with torch.autocast(x_TD.device.type, enabled=False):
            rows_MD = F.normalize(self.rows[0].float(), dim=1)
            logits_TM = self.scale * (F.normalize(x_TD.float(), dim=1) @ rows_MD.t())
        shape: Any = (context.num_sequences, -1, self.num_experts, self.config.slots)
        nobody = torch.zeros(len(x_TD), 0, dtype=torch.int64, device=x_TD.device)
        return SoftRouting(nobody, nobody.float(), self.num_experts, logits_BSEP=logits_TM.view(shape))
