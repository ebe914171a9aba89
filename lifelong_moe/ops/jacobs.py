"""The three losses of adaptive mixtures of local experts, for regression. Pure.

Legend: T cases, E experts, D outputs.

Source:
    Jacobs, Jordan, Nowlan & Hinton 1991, "Adaptive mixtures of local experts", eqs. 1.1 to 1.3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cooperative_loss(gate_logits_TE: Tensor, outputs_TED: Tensor, target_TD: Tensor) -> Tensor:
    """``|d - sum_j p_j o_j|²``, averaged over cases: experts correct each other's errors (eq. 1.1)."""
    mixed_TD = (gate_logits_TE.softmax(dim=1).unsqueeze(2) * outputs_TED).sum(dim=1)
    return (target_TD - mixed_TD).square().sum(dim=1).mean()


def expected_loss(gate_logits_TE: Tensor, outputs_TED: Tensor, target_TD: Tensor) -> Tensor:
    """``sum_j p_j |d - o_j|²``, averaged over cases: each expert is to answer alone (eq. 1.2)."""
    errors_TE = (target_TD.unsqueeze(1) - outputs_TED).square().sum(dim=2)
    return (gate_logits_TE.softmax(dim=1) * errors_TE).sum(dim=1).mean()


def competitive_loss(gate_logits_TE: Tensor, outputs_TED: Tensor, target_TD: Tensor) -> Tensor:
    """``-ln sum_j p_j exp(-|d - o_j|² / 2)``, averaged over cases: the best expert learns most (eq. 1.3).

    Its gradient for an output ``o_j`` is ``-r_j (d - o_j)``, with the posterior ``r_j`` of the expert given the target.
    By log-sum-exp, so that experts far off do not make it infinite.
    """
    errors_TE = (target_TD.unsqueeze(1) - outputs_TED).square().sum(dim=2)
    return -torch.logsumexp(gate_logits_TE.log_softmax(dim=1) - errors_TE / 2, dim=1).mean()
