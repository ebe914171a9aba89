"""Experts that compete: each predicts by itself, and the prediction is their mixture.

Legend: T tokens, E experts, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(hidden_TED: Tensor, log_gates_TE: Tensor) -> Tensor:
    """Each expert's hidden state and the logarithm of its gate as one row a token, ``(T, E * D + E)``."""
    return torch.cat([hidden_TED.flatten(1), log_gates_TE.to(hidden_TED.dtype)], dim=1)


def unpack(packed: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`pack`: ``(..., E, D)`` and ``(..., E)``."""
    num_experts = packed.shape[-1] // (width + 1)
    return packed[..., :-num_experts].unflatten(-1, (num_experts, width)), packed[..., -num_experts:]


def mixture_log_probs(packed: Tensor, head_VD: Tensor) -> Tensor:
    """``ln sum_j p_j P_j(v)`` of every token ``v``, float32 ``(..., V)``; its exponentials sum to 1."""
    hidden, log_gates = unpack(packed, head_VD.shape[1])
    log_probs = F.linear(hidden, head_VD).float().log_softmax(dim=-1)
    return torch.logsumexp(log_gates.float().unsqueeze(-1) + log_probs, dim=-2)


def mixture_nats(packed_TM: Tensor, head_VD: Tensor, target_T: Tensor) -> Tensor:
    """``-ln sum_j p_j P_j(target)`` of each token, float32 ``(T,)``.

    Source:
        Jacobs et al. 1991, eq. 1.3, with the experts' probability of the token for their Gaussian density: ours, as
        the paper is about regression.
    """
    hidden_TED, log_gates_TE = unpack(packed_TM, head_VD.shape[1])
    of_experts = []
    for hidden_TD in hidden_TED.unbind(dim=1):  # one expert's logits at a time
        of_experts.append(-F.cross_entropy(F.linear(hidden_TD, head_VD).float(), target_T, reduction="none"))
    return -torch.logsumexp(log_gates_TE.float() + torch.stack(of_experts, dim=1), dim=1)
