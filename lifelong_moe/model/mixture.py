"""Competing experts: each makes its own prediction, and the model predicts their mixture.

The last layer returns each expert's output separately, and the head mixes their predictions.

Legend: B batch, S sequence, T = B·S tokens, E experts, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong_moe.model.attention import AttentionContext
from lifelong_moe.model.block import Block
from lifelong_moe.model.cache import LayerCache
from lifelong_moe.model.head import LinearHead
from lifelong_moe.model.moe import MoELayer
from lifelong_moe.ops.few_rows import as_rows
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.routing.base import Routing, RoutingContext


class CompetingLayer(MoELayer):
    """All experts process every token, and their outputs are not summed."""

    def forward(self, x_TD: Tensor, context: RoutingContext) -> tuple[Tensor, Routing]:
        """``(T, D)`` to each expert's output, ``(T, E, D)``, and the router's weights."""
        routing = self.router(x_TD, context)
        return torch.stack([expert(x_TD) for expert in self.banks.networks()], dim=1), routing


class CompetingBlock(Block):
    """The last block of a model with competing experts: from there on each expert has its own residual stream."""

    def __init__(self, architecture: Architecture, layer: int) -> None:
        super().__init__(architecture, layer)
        self.moe = CompetingLayer(self.moe.router, self.moe.banks)

    def forward(
        self, x_BSD: Tensor, attention: AttentionContext, routing: RoutingContext, cache: LayerCache | None = None
    ) -> tuple[Tensor, Routing]:
        """``(B, S, D)`` to each expert's stream, ``(B, S, E, D)``."""
        x_BSD = self.attend(x_BSD, attention, cache)
        answers_TED, decided = self.moe(self.moe_norm(x_BSD).flatten(0, 1), routing)
        return x_BSD.unsqueeze(2) + answers_TED.unflatten(0, x_BSD.shape[:2]), decided


class MixtureHead(LinearHead):
    """``p(v) = sum_j p_j P_j(v)``: the last layer's gates mix the softmax of each expert's stream.

    Source:
        Jacobs et al. 1991, eq. 1.3, with the experts' probability of the token for their Gaussian density: ours, as
        the paper is about regression.
    """

    @property
    def is_one_matrix(self) -> bool:
        """A mixture of softmaxes is not one linear map."""
        return False

    def read(self, hidden_BSED: Tensor, routing: Routing) -> Tensor:
        """Each expert's hidden state, and its gate, in a row ``(B, S, E * D + E)``."""
        # Logarithms: a gate that underflows still has a finite logarithm, and a gradient.
        assert routing.log_weights_TK is not None
        return pack(hidden_BSED, routing.log_weights_TK.unflatten(0, hidden_BSED.shape[:2]))

    def logits(
        self, hidden: Tensor, domain_ids: Tensor | None = None, domain_counts: Sequence[int] | None = None
    ) -> Tensor:
        """Logarithms of probabilities, float32 ``(..., V)``; their exponentials sum to 1."""
        # shape: (..., E, D) and (..., E)
        hidden, log_gates = unpack(hidden, self.in_features)
        # shape: (..., E, V)
        log_probs = F.linear(hidden, as_rows(self.weight, hidden)).float().log_softmax(dim=-1)
        return torch.logsumexp(log_gates.float().unsqueeze(-1) + log_probs, dim=-2)

    def cross_entropy(
        self,
        hidden_TD: Tensor,
        target_T: Tensor,
        domain_ids_T: Tensor | None = None,
        domain_counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Mean next-token loss in nats, scalar float32."""
        return self._nats(hidden_TD, target_T).mean()

    @torch.no_grad()
    def token_nats(self, hidden_TD: Tensor, target_T: Tensor, domain_ids_T: Tensor | None = None) -> Tensor:
        """Next-token loss of each token in nats, float32 ``(T,)``; no gradient."""
        return self._nats(hidden_TD, target_T)

    def _nats(self, packed_TM: Tensor, target_T: Tensor) -> Tensor:
        """``-ln sum_j p_j P_j(target)`` of each token, float32 ``(T,)``."""
        hidden_TED, log_gates_TE = unpack(packed_TM, self.in_features)
        of_experts = []
        for hidden_TD in hidden_TED.unbind(dim=1):  # one expert's logits at a time
            logits_TV = F.linear(hidden_TD, as_rows(self.weight, hidden_TD)).float()
            of_experts.append(-F.cross_entropy(logits_TV, target_T, reduction="none"))
        return -torch.logsumexp(log_gates_TE.float() + torch.stack(of_experts, dim=1), dim=1)


def pack(hidden: Tensor, log_gates: Tensor) -> Tensor:
    """Each expert's hidden state ``(..., E, D)`` and the logarithm of its gate ``(..., E)`` as one row a token."""
    return torch.cat([hidden.flatten(-2), log_gates.to(hidden.dtype)], dim=-1)


def unpack(packed: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`pack`: ``(..., E, D)`` and ``(..., E)``."""
    num_experts = packed.shape[-1] // (width + 1)
    return packed[..., :-num_experts].unflatten(-1, (num_experts, width)), packed[..., -num_experts:]
