"""What a model predicted on a text, kept small, and how far another model has moved from it.

Legend: T scored tokens, C of a chunk, K kept tokens of the vocabulary, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lifelong_moe.data.tokens.windows import EvaluationSet
from lifelong_moe.evaluation.loss import forward_windows
from lifelong_moe.model.transformer import LanguageModel

KEPT = 256
"""Most probable next tokens that are kept each by itself."""
CHUNK_TOKENS = 256
"""Tokens whose probabilities over the vocabulary exist at a time."""


@dataclass(frozen=True)
class Predictions:
    """A model's next-token distributions on a text: the most probable tokens, and all others as one.

    All probabilities would take ``4 T V`` bytes, and final hidden states need the head that belongs to them, which a
    stage may train and which is as large. These take ``12 T K`` bytes, whatever the model is.
    """

    ids_TK: Tensor
    """int64."""
    logs_TK: Tensor
    """Logarithms of their probabilities, float32."""
    rest_T: Tensor
    """Probability of all others, float32."""

    @classmethod
    def of(
        cls, model: LanguageModel, windows: EvaluationSet, *, distribution: str | None, batch_tokens: int
    ) -> Predictions:
        """What a model predicts; arguments as for :func:`lifelong_moe.evaluation.loss.evaluate`."""
        # A generation may not predict the tokens that later ones added, so of its own text all kept logs are finite.
        kept = min(KEPT, model.architecture.vocab_size)
        ids, logs, rest = [], [], []
        for logs_CV in _log_probs(model, windows, distribution, batch_tokens):
            top = logs_CV.topk(kept)
            ids.append(top.indices)
            logs.append(top.values)
            rest.append(_log_rest(logs_CV, top.indices).exp())
        return cls(torch.cat(ids).cpu(), torch.cat(logs).cpu(), torch.cat(rest).cpu())

    def divergence(
        self, model: LanguageModel, windows: EvaluationSet, *, distribution: str | None, batch_tokens: int
    ) -> float:
        """``KL(these ‖ the model's)`` in nats, the mean over the scored tokens of the same windows.

        Exact for a vocabulary of ``KEPT`` tokens or less. For a larger one it is a lower bound, since what is lumped
        together cannot be told apart.

        Source:
            arXiv:2509.04259: on the text of a new task, this divergence from the old model predicts forgetting.
        """
        total, first = 0.0, 0
        for logs_CV in _log_probs(model, windows, distribution, batch_tokens):
            rows = slice(first, first + len(logs_CV))
            ids_CK, old_CK, rest_C = (x[rows].to(logs_CV.device) for x in (self.ids_TK, self.logs_TK, self.rest_T))
            kl_C = (old_CK.exp() * (old_CK - logs_CV.gather(1, ids_CK))).sum(dim=1)
            # Where nothing is left over, 0 times minus infinity would be NaN.
            of_rest_C = rest_C * (rest_C.log() - _log_rest(logs_CV, ids_CK))
            total += float((kl_C + of_rest_C.where(rest_C > 0, 0.0)).double().sum())
            first += len(logs_CV)
        return total / first


def _log_rest(logs_CV: Tensor, ids_CK: Tensor) -> Tensor:
    """Logarithm of the probability of all tokens but these."""
    # Not 1 minus their sum, of which rounding would leave nothing where they are nearly all.
    return logs_CV.scatter(1, ids_CK, -torch.inf).logsumexp(dim=1)


@torch.no_grad()
def _log_probs(
    model: LanguageModel, windows: EvaluationSet, distribution: str | None, batch_tokens: int
) -> Iterator[Tensor]:
    """Logarithms of next-token probabilities, float32 ``(C, V)``, of the scored tokens in order."""
    for arrays, output in forward_windows(model, windows, distribution=distribution, batch_tokens=batch_tokens):
        scored = arrays["scored"]
        hidden_T, domains_T = output.hidden_BSD[scored], arrays["domain_ids"][scored]
        for hidden_C, domains_C in zip(hidden_T.split(CHUNK_TOKENS), domains_T.split(CHUNK_TOKENS), strict=True):
            yield model.head.logits(hidden_C, domains_C).float().log_softmax(dim=-1)
