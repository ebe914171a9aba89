"""What a model predicted on a text, kept small, and how far another model has moved from it.

Legend: T scored tokens, C of a chunk, K kept tokens of the vocabulary, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lifelong_moe.data.tokens.windows import EvaluationSet
from lifelong_moe.evaluation.reading import read_windows
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
        tokens, ids, logs, rest = [], [], [], []
        for tokens_C, logs_CV in _log_probs(model, windows, distribution, batch_tokens):
            top = logs_CV.topk(kept)
            tokens.append(tokens_C)
            ids.append(top.indices)
            logs.append(top.values)
            rest.append(_log_rest(logs_CV, top.indices).exp())
        # In the order of the text: which windows a model reads first depends on its generations.
        order = torch.from_numpy(np.argsort(np.concatenate(tokens)))
        return cls(*(torch.cat(one).cpu()[order] for one in (ids, logs, rest)))

    def divergence(
        self, model: LanguageModel, windows: EvaluationSet, *, distribution: str | None, batch_tokens: int
    ) -> float:
        """``KL(these ‖ the model's)`` in nats, the mean over the scored tokens of the same windows.

        Exact for a vocabulary of ``KEPT`` tokens or less. For a larger one it is a lower bound, since what is lumped
        together cannot be told apart.

        Source:
            arXiv:2509.04259: on the text of a new task, this divergence from the old model predicts forgetting.
        """
        total, scored_T = 0.0, np.flatnonzero(windows.counted)
        for tokens_C, logs_CV in _log_probs(model, windows, distribution, batch_tokens):
            rows = torch.from_numpy(np.searchsorted(scored_T, tokens_C))
            ids_CK, old_CK, rest_C = (x[rows].to(logs_CV.device) for x in (self.ids_TK, self.logs_TK, self.rest_T))
            kl_C = (old_CK.exp() * (old_CK - logs_CV.gather(1, ids_CK))).sum(dim=1)
            # Where nothing is left over, 0 times minus infinity would be NaN.
            of_rest_C = rest_C * (rest_C.log() - _log_rest(logs_CV, ids_CK))
            total += float((kl_C + of_rest_C.where(rest_C > 0, 0.0)).double().sum())
        return total / len(scored_T)


def _log_rest(logs_CV: Tensor, ids_CK: Tensor) -> Tensor:
    """Logarithm of the probability of all tokens but these."""
    # Not 1 minus their sum, of which rounding would leave nothing where they are nearly all.
    return logs_CV.scatter(1, ids_CK, -torch.inf).logsumexp(dim=1)


@torch.no_grad()
def _log_probs(
    model: LanguageModel, windows: EvaluationSet, distribution: str | None, batch_tokens: int
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Tokens ``(C,)`` and logarithms of the probabilities of what follows them, float32 ``(C, V)``."""
    for batch in read_windows(model, windows, distribution=distribution, batch_tokens=batch_tokens):
        tokens_T = batch.tokens(windows)
        for part_C in torch.arange(len(tokens_T), device=batch.nats_T.device).split(CHUNK_TOKENS):
            yield tokens_T[part_C.cpu().numpy()], batch.log_probabilities(model, part_C)
