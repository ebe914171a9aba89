"""Cross-entropy and distillation over the vocabulary.

Legend: T tokens, N tokens that a teacher is asked about, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong_moe.ops.few_rows import as_rows

CHUNK_TOKENS, CHUNK_LOGITS = 1024, 1 << 24
"""Most tokens whose logits are there at once, and most numbers that these are: 64 MB in float32."""


def chunk_tokens(vocabulary: int) -> int:
    """Tokens whose logits are there at once."""
    return max(1, min(CHUNK_TOKENS, CHUNK_LOGITS // vocabulary))


@dataclass(frozen=True)
class TeacherTargets:
    """What a teacher makes of some of the tokens, not yet as logits."""

    tokens_N: Tensor
    """Which tokens, int64 ``(N,)``, distinct."""
    hidden_ND: Tensor
    """The teacher's final hidden states of them; its width may differ from the student's."""
    head_VD: Tensor
    """The teacher's output head."""
    temperature: float
    """Divides both logits."""
    weight: float
    """Factor on the mean KL."""


def _softmax(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, and the logarithm of what the exponentials sum to ``(T, 1)``.

    The sum is read off the largest probability, which is at least ``1 / V``: a second pass of exponentials is saved,
    and nothing underflows.
    """
    probs_TV = logits_TV.softmax(dim=1)
    return probs_TV, logits_TV.amax(dim=1, keepdim=True) - probs_TV.amax(dim=1, keepdim=True).log()


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@dataclass
class _Changes:
    """Low-rank changes ``low up^T`` of the logits, and their gradients, a chunk of tokens at a time."""

    lows_TR: list[Tensor]
    ups_VR: list[Tensor]
    grad_lows: list[Tensor | None]
    grad_ups: list[Tensor | None]

    @classmethod
    def of(
        cls, factors: Sequence[Tensor], needed: Sequence[bool], dtype: torch.dtype, order_T: Tensor | None
    ) -> _Changes:
        """Of ``low_TR`` and ``up_VR`` in turn, the first in the order of tokens in which chunks are taken."""
        lows, ups = factors[::2], factors[1::2]
        rows = [(low if order_T is None else low.index_select(0, order_T)).to(dtype) for low in lows]
        return cls(
            rows,
            [up.to(dtype) for up in ups],
            [torch.empty_like(low) if need else None for low, need in zip(rows, needed[::2], strict=True)],
            # Summed over chunks in float32, as the head's.
            [
                torch.zeros_like(up, dtype=_wide(up).dtype) if need else None
                for up, need in zip(ups, needed[1::2], strict=True)
            ],
        )

    def added(self, logits_cV: Tensor, part: slice) -> Tensor:
        """Logits of a chunk with the changes, in place."""
        for low_TR, up_VR in zip(self.lows_TR, self.ups_VR, strict=True):
            logits_cV.addmm_(low_TR[part], up_VR.t())
        return logits_cV

    def backward(self, grad_cV: Tensor, part: slice) -> None:
        """Add what a chunk's gradient of logits gives."""
        each = zip(self.lows_TR, self.ups_VR, self.grad_lows, self.grad_ups, strict=True)
        for low_TR, up_VR, grad_low, grad_up in each:
            if grad_low is not None:
                grad_low[part] = grad_cV @ up_VR
            if grad_up is not None:
                _accumulate(grad_up, grad_cV, low_TR[part])

    def gradients(self, factors: Sequence[Tensor], order_T: Tensor | None) -> list[Tensor | None]:
        """Of the factors in turn, each in its type and the order of tokens that came."""
        found: list[Tensor | None] = []
        for low, up in zip(self.grad_lows, self.grad_ups, strict=True):
            if low is not None and order_T is not None:
                low = torch.empty_like(low).index_copy_(0, order_T, low)
            found += [low, up]
        return [None if one is None else one.to(like.dtype) for one, like in zip(found, factors, strict=True)]


class _LinearLoss(torch.autograd.Function):
    """Head, cross-entropy and KL together; gradients are made in the forward pass, a chunk of tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        head_VD: Tensor,
        target_T: Tensor,
        teacher: TeacherTargets | None,
        chunk: int,
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device, num_tokens, num_distilled = hidden_TD.device.type, len(target_T), 0
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TD.dtype
        head = head_VD.to(dtype)
        order_T = None
        if teacher is not None:
            num_distilled = len(teacher.tokens_N)
            is_plain_T = torch.ones(num_tokens, dtype=torch.bool, device=hidden_TD.device)
            is_plain_T[teacher.tokens_N] = False
            # Distilled tokens first, in the teacher's order; how many plain ones there are is known without asking
            # the device.
            plain_T = torch.argsort(is_plain_T, stable=True)[num_distilled:]
            order_T = torch.cat([teacher.tokens_N, plain_T])
            hidden_TD, target_T = hidden_TD.index_select(0, order_T), target_T.index_select(0, order_T)
        changes = _Changes.of(factors, ctx.needs_input_grad[5:], dtype, order_T)
        nats, kl = (torch.zeros((), dtype=_wide(hidden_TD).dtype, device=hidden_TD.device) for _ in range(2))
        grad_hidden = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        # Summed over chunks in float32, where bfloat16 would lose small terms.
        grad_head = torch.zeros_like(head_VD, dtype=_wide(head_VD).dtype) if ctx.needs_input_grad[1] else None
        for part in _chunks(num_distilled, num_tokens, chunk):
            hidden, target = hidden_TD[part].to(dtype), target_T[part].unsqueeze(1)
            # shape: (chunk, V), in float32: the only tensors as wide as the vocabulary
            logits = _wide(changes.added(hidden @ head.t(), part))
            probs, log_sum = _softmax(logits)
            nats += (log_sum - logits.gather(1, target)).sum()
            # d(sum of nats) / d(logits) = softmax - onehot
            # At temperature 1 the KL reads the probabilities too; else they become the gradient in place.
            grad = probs.clone() if part.start < num_distilled and teacher.temperature == 1 else probs  # type: ignore[union-attr]
            grad.scatter_add_(1, target, torch.full_like(log_sum, -1.0))
            if part.start < num_distilled:
                assert teacher is not None
                own = (probs, log_sum) if teacher.temperature == 1 else None
                kl += _add_distillation(teacher, part, logits, own, grad, num_tokens / num_distilled)
            if grad_hidden is not None:
                grad_hidden[part] = (grad.to(dtype) @ head).to(hidden_TD.dtype)
            if grad_head is not None:
                _accumulate(grad_head, grad.to(dtype), hidden)
            changes.backward(grad.to(dtype), part)
        if grad_hidden is not None and order_T is not None:
            grad_hidden = torch.empty_like(grad_hidden).index_copy_(0, order_T, grad_hidden)
        ctx.save_for_backward(
            grad_hidden,
            None if grad_head is None else grad_head.to(head_VD.dtype),
            *changes.gradients(factors, order_T),
        )
        ctx.num_tokens = num_tokens
        nats, kl = nats / num_tokens, kl / max(1, num_distilled)
        # For reports: the objective alone carries gradients.
        ctx.mark_non_differentiable(nats, kl)
        return nats + (teacher.weight * kl if teacher is not None else 0.0), nats, kl

    @staticmethod
    def backward(ctx: Any, grad_objective: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # The forward pass made gradients of a sum; this makes them those of the mean.
        factor = grad_objective / ctx.num_tokens
        grads = [None if grad is None else grad * factor.to(grad.dtype) for grad in ctx.saved_tensors]
        return (*grads[:2], None, None, None, *grads[2:])


def _chunks(num_distilled: int, num_tokens: int, chunk: int) -> list[slice]:
    """Slices of tokens of one kind each."""
    return [
        slice(start, min(start + chunk, end))
        for begin, end in ((0, num_distilled), (num_distilled, num_tokens))
        for start in range(begin, end, chunk)
    ]


def _add_distillation(
    teacher: TeacherTargets, part: slice, logits: Tensor, own: tuple[Tensor, Tensor] | None, grad: Tensor, share: float
) -> Tensor:
    """The KL's sum over a chunk; its gradient is added to the cross-entropy's, of which ``share`` makes a mean again.

    Per token, before the weight: ``temperature * (softmax(student / temperature) - softmax(teacher / temperature))``.
    """
    temperature = teacher.temperature
    hidden, head = teacher.hidden_ND[part].to(teacher.head_VD.dtype), teacher.head_VD
    teacher_logits = _wide(hidden @ head.t()).to(logits.dtype)
    if temperature != 1:
        # In place: nothing reads the plain logits from here on.
        logits, teacher_logits = logits.div_(temperature), teacher_logits.div_(temperature)
    probs, log_sum = _softmax(logits) if own is None else own
    teacher_probs, teacher_log_sum = _softmax(teacher_logits)
    scale = teacher.weight * temperature * share
    grad.add_(probs, alpha=scale).sub_(teacher_probs, alpha=scale)
    # sum of p_t (log p_t - log p_s)
    difference = teacher_logits.sub_(logits).mul_(teacher_probs).sum(dim=1, keepdim=True)
    return (difference - teacher_log_sum + log_sum).sum() * temperature**2


def _accumulate(grad_VD: Tensor, grad_cV: Tensor, hidden_cD: Tensor) -> None:
    if grad_VD.dtype == grad_cV.dtype:
        grad_VD.addmm_(grad_cV.t(), hidden_cD)
    else:
        grad_VD += (grad_cV.t() @ hidden_cD).to(grad_VD.dtype)


def linear_losses(
    hidden_TD: Tensor,
    head_VD: Tensor,
    target_T: Tensor,
    teacher: TeacherTargets | None = None,
    chunk: int | None = None,
    changes: Sequence[tuple[Tensor, Tensor]] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of ``hidden @ head.T`` and KL to a teacher, in one pass over the vocabulary, without full logits.

    Equals ``F.cross_entropy`` over all tokens, and :func:`distillation_loss` over those of the teacher, in values and
    gradients.

    Args:
        hidden_TD: Final hidden states ``(T, D)``.
        head_VD: Output head ``(V, D)``.
        target_T: Next tokens, int64 ``(T,)``; every one counts.
        teacher: What the teacher says, if it says anything; no gradient flows into it.
        chunk: Tokens whose logits exist at a time; by default :func:`chunk_tokens` of the vocabulary.
        changes: ``low_TR`` and ``up_VR`` of low-rank changes, whose products are added to the logits.

    Returns:
        Three scalars in float32 (float64 for float64): ``nats + weight * kl``, which alone carries gradients; the
        mean cross-entropy in nats a token; the mean KL times ``temperature²``, 0 without a teacher.
    """
    if not torch.is_grad_enabled():  # a function of autograd's does not see that, and would make gradients
        hidden_TD, head_VD = hidden_TD.detach(), head_VD.detach()
        changes = [(low_TR.detach(), up_VR.detach()) for low_TR, up_VR in changes]
    chunk = chunk or chunk_tokens(len(head_VD))
    return _LinearLoss.apply(hidden_TD, head_VD, target_T, teacher, chunk, *chain.from_iterable(changes))


def linear_cross_entropy(hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor, chunk: int | None = None) -> Tensor:
    """Mean cross-entropy of :func:`linear_losses` alone: a scalar in float32, nats per token."""
    return linear_losses(hidden_TD, head_VD, target_T, chunk=chunk)[0]


@torch.no_grad()
def token_nats(hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor, chunk: int | None = None) -> Tensor:
    """Cross-entropy of each token in nats, float32 ``(T,)``; no gradient."""
    chunk, head_VD = chunk or chunk_tokens(len(head_VD)), as_rows(head_VD, hidden_TD)
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
    student = F.log_softmax(_wide(student_TV) / temperature, dim=-1)
    teacher = F.log_softmax(_wide(teacher_TV.detach()) / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2 / len(student_TV)
