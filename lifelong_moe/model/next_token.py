"""The next tokens of texts in progress, with a key-value cache: by selected generations, or by a mixture of all.

Legend: B texts, N tokens of each so far, V vocabulary, G generations, R rows that the model reads, S of their tokens, D
model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lifelong_moe.config.routing.mixture import MixtureConfig
from lifelong_moe.model.cache import KeyValueCache
from lifelong_moe.model.domains import label_domain
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.ops.posterior import log_weights, next_log_weights


@dataclass(frozen=True)
class Prompts:
    """Texts to continue together."""

    ids: Sequence[Sequence[int]]
    """Tokens of each, BOS first; all of one length."""
    distribution: str | None = None
    """Where routing goes by label: whose experts to use."""
    unread: int = 0
    """So many of the first tokens are not read by the model; they only help to choose domains."""


def texts_of(model: LanguageModel, prompts: Prompts, longest: int) -> SelectedTexts | MixedTexts:
    """Texts that begin with prompts and grow to a length, as the model predicts them."""
    mixture = model.architecture.mixture
    return SelectedTexts(model, prompts, longest) if mixture is None else MixedTexts(model, prompts, longest, mixture)


class _Reading:
    """Texts of equal length in progress, up to a length: what a model has read of them, and its key-value cache."""

    def __init__(self, model: LanguageModel, prompts: Prompts, longest: int) -> None:
        context = model.architecture.model.context
        self.model, self.unread = model, prompts.unread
        # A context may be far longer than any text.
        self.room = min(longest - prompts.unread, context)
        self.cache: KeyValueCache | None = None

    def columns(self, length: int) -> list[int]:
        """Tokens of texts of a length that are to be read next; the cache has room for them."""
        context = self.model.architecture.model.context
        if self.cache is not None and self.cache.length < context:
            return [length - 1]
        self.cache = KeyValueCache(len(self.model.blocks), self.room)
        kept = [*range(self.unread, length)]
        # BOS and the newest half, so that most of a context of new tokens fits.
        return kept if len(kept) <= context else [self.unread, *kept[-(context // 2) :]]

    def read(self, ids_RS: NDArray[np.int64], domains_RS: NDArray[np.int64]) -> Tensor:
        """Final hidden states of tokens, ``(R, S, D)``."""
        device = self.model.embedding.weight.device
        ids, domains = torch.from_numpy(ids_RS.copy()).to(device), torch.from_numpy(domains_RS.copy()).to(device)
        return self.model(TokenBatch(ids, domain_ids_BS=domains), cache=self.cache).hidden_BSD

    def keep(self, kept_R: Tensor) -> None:
        """Forget what was read of all rows but these, bool ``(R,)``."""
        if self.cache is not None and not bool(kept_R.all()):
            self.cache.keep(kept_R.nonzero().squeeze(1))

    def logits(self, hidden_RSD: Tensor, domains_RS: NDArray[np.int64]) -> Tensor:
        """Logits of the tokens that may come next, ``(R, S, V)``."""
        logits_RSV = self.model.head.logits(hidden_RSD, torch.from_numpy(domains_RS.copy()).to(hidden_RSD.device))
        # Rows without a token; those of tokens that stages add come after them.
        logits_RSV[..., self.model.tokenizer_size : self.model.architecture.vocab_size] = float("-inf")
        return logits_RSV


class SelectedTexts:
    """Texts whose next tokens are predicted by the generation, or other domain, that is selected for them."""

    def __init__(self, model: LanguageModel, prompts: Prompts, longest: int) -> None:
        self.model, self.reading = model, _Reading(model, prompts, longest)
        self.label_domain = label_domain(model.architecture, prompts.distribution)
        self.domains_BN = np.empty((0, 0), dtype=np.int64)

    def next_logits(self, ids_BN: NDArray[np.int64]) -> Tensor:
        """Logits ``(B, V)`` of the tokens after these, of which all but the last were read before, if any were."""
        columns = self.reading.columns(ids_BN.shape[1])
        begins_chunk = (ids_BN.shape[1] - 1) % self.model.architecture.routing.chunk_tokens == 0
        if len(columns) > 1 or not self.domains_BN.size or (self.model.document_clusters and begins_chunk):
            self.domains_BN = self._domains(ids_BN)
        domains_BS = self.domains_BN[:, columns if len(columns) > 1 else [-1]]
        hidden_BSD = self.reading.read(ids_BN[:, columns], domains_BS)
        return self.reading.logits(hidden_BSD[:, -1:], domains_BS[:, -1:])[:, 0]

    def _domains(self, ids_BN: NDArray[np.int64]) -> NDArray[np.int64]:
        if self.model.document_clusters is None:
            return np.full_like(ids_BN, self.label_domain)
        return np.concatenate([*self.model.document_clusters.domain_id_batches(ids_BN)]).reshape(ids_BN.shape)


class MixedTexts:
    """Texts whose next tokens are predicted by a mixture of the generations.

    Each generation reads a text as long as it has a weight: a row of the cache for each pair of the two.
    """

    def __init__(self, model: LanguageModel, prompts: Prompts, longest: int, mixture: MixtureConfig) -> None:
        self.model, self.mixture, self.reading = model, mixture, _Reading(model, prompts, longest)
        shape = len(prompts.ids), len(model.architecture.generations)
        self.left_BG = torch.ones(shape, dtype=torch.bool)
        self.logs_BG = torch.zeros(shape, dtype=torch.float64)
        """Log weights of the generations."""
        self.nats_BG = torch.zeros(shape, dtype=torch.float64)
        """What the text so far cost each generation; those that are out, only as far as they read it."""
        self.next_RV: Tensor | None = None
        """Log probabilities of the next token under each pair that is left, text by text."""

    def next_logits(self, ids_BN: NDArray[np.int64]) -> Tensor:
        """As for :class:`SelectedTexts`; logits, or log probabilities where several generations have a weight."""
        pairs_R2, columns = self.left_BG.nonzero(), [-1]
        if self.next_RV is None:
            columns = self.reading.columns(ids_BN.shape[1])
            hidden_RSD = self._read(ids_BN, pairs_R2, columns)
            kept_R = self._hear_prompt(ids_BN, pairs_R2, columns, hidden_RSD)
            hidden_RSD = hidden_RSD[kept_R]
            self.reading.keep(kept_R)
        else:
            newest_R = torch.from_numpy(ids_BN[:, -1])[pairs_R2[:, 0]].to(self.next_RV.device)
            nats_R = -self.next_RV.gather(1, newest_R.unsqueeze(1)).squeeze(1)
            self.nats_BG[self.left_BG] += nats_R.double().cpu()
            score_BG = -self.mixture.likelihood * self.nats_BG
            self.logs_BG, self.left_BG = next_log_weights(score_BG, self.left_BG, self.mixture.drop)
            self.reading.keep(self.left_BG[pairs_R2[:, 0], pairs_R2[:, 1]])
            columns = self.reading.columns(ids_BN.shape[1])
            hidden_RSD = self._read(ids_BN, self.left_BG.nonzero(), columns)
        pairs_R2 = self.left_BG.nonzero()
        logits_RV = self.reading.logits(hidden_RSD[:, -1:], pairs_R2[:, 1:].numpy())[:, 0]
        self.next_RV = logits_RV.float().log_softmax(dim=-1)
        return self._mix(logits_RV, pairs_R2)

    def _read(self, ids_BN: NDArray[np.int64], pairs_R2: Tensor, columns: list[int]) -> Tensor:
        texts_R, generations_R = pairs_R2.numpy().T
        domains_RS = np.repeat(generations_R[:, None], len(columns), axis=1)
        return self.reading.read(ids_BN[texts_R][:, columns], domains_RS)

    def _hear_prompt(
        self, ids_BN: NDArray[np.int64], pairs_R2: Tensor, columns: list[int], hidden_RSD: Tensor
    ) -> Tensor:
        """Weigh the generations by a prompt that all of them read; returns which pairs are left, bool ``(R,)``."""
        targets_RS = torch.from_numpy(ids_BN[:, columns[1:]])[pairs_R2[:, 0]].to(hidden_RSD.device)
        domains_RS = pairs_R2[:, 1:].to(hidden_RSD.device).expand_as(targets_RS)
        nats_RS = self.model.head.token_nats(
            hidden_RSD[:, :-1].flatten(0, 1), targets_RS.flatten(), domains_RS.flatten()
        ).view_as(targets_RS)
        # What each prediction is weighed by: the targets before it. shape: (B, S, G)
        paid_RS = F.pad(nats_RS.double().cpu().cumsum(dim=1), (1, 0))
        paid_BSG = paid_RS.view(*self.left_BG.shape, -1).transpose(1, 2)
        self.nats_BG = paid_BSG[:, -1].clone()
        for text, paid_SG in enumerate(paid_BSG):
            score_SG = -self.mixture.likelihood * paid_SG
            logs_SG, self.left_BG[text] = log_weights(score_SG, self.left_BG[text], self.mixture.drop)
            self.logs_BG[text] = logs_SG[-1]
        return self.left_BG[pairs_R2[:, 0], pairs_R2[:, 1]]

    def _mix(self, logits_RV: Tensor, pairs_R2: Tensor) -> Tensor:
        assert self.next_RV is not None
        mixed_BV = self.next_RV.new_full((len(self.left_BG), self.next_RV.shape[1]), float("-inf"))
        for generation in range(self.left_BG.shape[1]):
            rows = (pairs_R2[:, 1] == generation).nonzero().squeeze(1)
            texts = pairs_R2[rows, 0]
            logs_R1 = self.logs_BG[texts, generation].float().unsqueeze(1).to(mixed_BV.device)
            mixed_BV[texts] = torch.logaddexp(mixed_BV[texts], self.next_RV[rows] + logs_R1)
        # Where one generation is left, its own logits, bit for bit.
        alone_R = (self.left_BG.sum(dim=1) == 1)[pairs_R2[:, 0]]
        mixed_BV[pairs_R2[alone_R, 0]] = logits_RV[alone_R].float()
        return mixed_BV
