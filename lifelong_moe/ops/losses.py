"""Cross-entropy and distillation over the vocabulary.

Legend: T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_TOKENS = 1024


class _LinearCrossEntropy(torch.autograd.Function):
    """Head and cross-entropy together; gradients are made in the forward pass, a chunk of tokens at a time."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor, chunk: int) -> Tensor:
        device = hidden_TD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TD.dtype
        head = head_VD.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        grad_hidden = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(target_T), chunk):
            part = slice(start, start + chunk)
            hidden, target = hidden_TD[part].to(dtype), target_T[part].unsqueeze(1)
            logits = (hidden @ head.t()).float()
            log_sum = torch.logsumexp(logits, dim=1, keepdim=True)
            total += (log_sum - logits.gather(1, target)).sum()
            # d(mean)/d(logits) = (softmax - onehot) / T
            grad = logits.sub_(log_sum).exp_()
            grad.scatter_add_(1, target, torch.full_like(log_sum, -1.0))
            grad.div_(len(target_T))
            if grad_hidden is not None:
                grad_hidden[part] = (grad.to(dtype) @ head).to(hidden_TD.dtype)
            if grad_head is not None:
                grad_head += (grad.to(dtype).t() @ hidden).float()
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head_VD.dtype))
        return total / len(target_T)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_output.to(grad_hidden.dtype),
            None if grad_head is None else grad_head * grad_output.to(grad_head.dtype),
            None,
            None,
        )


def linear_cross_entropy(hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor, chunk: int = CHUNK_TOKENS) -> Tensor:
    """Mean cross-entropy of ``hidden @ head.T`` against targets, without keeping full logits.

    Equals ``F.cross_entropy(hidden_TD @ head_VD.T, target_T)`` in value and gradients.

    Args:
        hidden_TD: Final hidden states ``(T, D)``.
        head_VD: Output head ``(V, D)``.
        target_T: Next tokens, int64 ``(T,)``; every one counts.
        chunk: Tokens whose logits exist at a time.

    Returns:
        Scalar float32, nats per token.
    """
    return _LinearCrossEntropy.apply(hidden_TD, head_VD, target_T, chunk)


@torch.no_grad()
def token_nats(hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor, chunk: int = CHUNK_TOKENS) -> Tensor:
    """Cross-entropy of each token in nats, float32 ``(T,)``; no gradient."""
    parts = [
        F.cross_entropy((h @ head_VD.t()).float(), t, reduction="none")
        for h, t in zip(hidden_TD.split(chunk), target_T.split(chunk), strict=True)
    ]
    return torch.cat(parts) if parts else hidden_TD.new_zeros(0)


def distillation_loss(student_TV: Tensor, teacher_TV: Tensor, temperature: float) -> Tensor:
    """Per-token ``KL(teacher ‖ student) × temperature²``, summed over the vocabulary, averaged over tokens.

    Args:
        student_TV: Student logits ``(T, V)``.
        teacher_TV: Teacher logits ``(T, V)``; no gradient flows into them.
        temperature: Divides both logits; the factor ``temperature²`` keeps the gradient's scale.

    Returns:
        Scalar float32, nats. Unlike ``F.kl_div(reduction="mean")`` it does not shrink with V.

    Source:
        Hinton et al. 2015 (arXiv:1503.02531), section 2.
    """
    student = F.log_softmax(student_TV.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_TV.detach().float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2 / len(student_TV)
