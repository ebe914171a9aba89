"""A committed stage as a model of texts: what it writes, what a text costs, who predicts it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lifelong_moe.config.routing.own import require_allowed
from lifelong_moe.config.routing.topk import CustomRouterConfig
from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.tokens.shards import TokenShard, tokenize_documents
from lifelong_moe.data.tokens.tokenizer import Tokenizer
from lifelong_moe.data.tokens.windows import evaluation_windows
from lifelong_moe.errors import ConfigError
from lifelong_moe.evaluation.loss import evaluate
from lifelong_moe.evaluation.probing import Observation, observe_text
from lifelong_moe.evaluation.reading import read_windows
from lifelong_moe.model.sampling import sample
from lifelong_moe.serving.prompts import prompt_ids, require_label
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.training.loop.device import on_configured_device
from lifelong_moe.training.restore import load_model

TOKENS_AT_ONCE = 8192
"""Tokens a forward pass: bounds the memory, whatever a text's length."""


@dataclass(frozen=True)
class TextLoss:
    """What a text costs a model."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int


class StageModel:
    """The model of a committed stage, which reads texts as ``evaluate`` and ``generate`` do, by the same mixture.

    ``label`` is the domain of a text, for models that route by label; others take none.

    Args:
        store: Has the stage.
        stage: Its model goes to the first GPU, where there is one.

    Raises:
        ConfigError: If the stage needs a router of somebody's own that nobody has named.
        CorruptError: If it is damaged.
    """

    def __init__(self, store: StageStore, stage: CommittedStage) -> None:
        if isinstance(stage.architecture.routing, CustomRouterConfig):
            require_allowed(stage.architecture.routing.mode)
        self.stage = stage
        self._tokenizers = store.tokenizers(stage)
        model = load_model(store, stage).requires_grad_(False).eval()
        self.model = on_configured_device(model, TrainerConfig())

    def __repr__(self) -> str:
        architecture = self.stage.architecture
        births = ", ".join(generation.stage for generation in architecture.generations)
        numbers = f"{sum(p.numel() for p in self.model.parameters()):,} parameters"
        return f"StageModel({self.stage.name}, {numbers}, generations: {births})"

    def tokenizer(self, label: str | None = None) -> Tokenizer:
        """That of a text, which its label decides where stages added tokens.

        Raises:
            ConfigError: If the routing ignores labels, or does not know this one.
        """
        require_label(self.stage, label, "label")
        return self._tokenizers[self.stage.architecture.vocabulary_of(label)]

    def generate(
        self,
        text: str,
        *,
        label: str | None = None,
        max_new_tokens: int = 100,
        temperature: float = 0.8,
        top_p: float = 0.95,
        seed: int = 0,
    ) -> str:
        """Continue a text until the model ends it, or answer it if the stage was fine-tuned.

        Args:
            text: May be empty.
            label: See the class.
            max_new_tokens: At most so many.
            temperature: 0 takes the most probable token.
            top_p: Sample from the smallest set of tokens with at least this probability.
            seed: Of the sampling.
        """
        tokenizer = self.tokenizer(label)
        ids = prompt_ids(self.stage, tokenizer, text)
        tokens = sample(
            self.model,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            distribution=label,
        )
        return tokenizer.decode([*tokens])

    def loss(self, text: str, *, label: str | None = None) -> TextLoss:
        """What a text costs, each token predicted from those before it.

        Raises:
            ConfigError: If it is empty.
        """
        if not text:
            raise ConfigError("a text without a character has no loss.")
        shard = tokenize_documents([Document(text, "")], self.tokenizer(label))
        windows = evaluation_windows(shard, self.model.architecture.model.context, sys.maxsize)
        found = evaluate(self.model, windows, distribution=label, batch_tokens=TOKENS_AT_ONCE)
        return TextLoss(found.nats_per_token, found.bits_per_byte, found.tokens, found.bytes)

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int], *, label: str | None = None) -> Tensor:
        """Logits of each next token of a text, float32 ``(N + 1, V)``: row ``n`` is read off the first ``n`` of N ids.

        They are log probabilities, since a mixture's members are averaged as probabilities.

        Args:
            token_ids: Of :meth:`tokenizer`, without BOS, which is put before them.
            label: See the class.

        Raises:
            ConfigError: If the model has no such token.
        """
        require_label(self.stage, label, "label")
        most = self.model.architecture.num_tokens
        if wrong := [token for token in token_ids if not 0 <= token < most]:
            raise ConfigError(f"token {wrong[0]}: the model has tokens 0 to {most - 1:,}.")
        bos = self.model.architecture.bos_id
        # A closing BOS gives the last token a target; no row depends on its own target.
        document = np.array([bos, *token_ids, bos], dtype=np.int64)
        shard = TokenShard(document, np.array([0, len(document)]), np.zeros(1, dtype=np.int64))
        windows = evaluation_windows(shard, self.model.architecture.model.context, sys.maxsize)
        found = torch.empty(len(document) - 1, self.model.architecture.num_tokens)
        for batch in read_windows(self.model, windows, distribution=label, batch_tokens=TOKENS_AT_ONCE):
            every = torch.arange(len(batch.nats_T), device=batch.nats_T.device)
            found[torch.from_numpy(batch.tokens(windows))] = batch.log_probabilities(self.model, every).float().cpu()
        return found

    def experts(self, text: str, *, label: str | None = None) -> Observation:
        """Which experts each token of a text uses, and in a mixture which generations predict what follows it.

        Raises:
            ConfigError: If the text is empty.
        """
        if not text:
            raise ConfigError("a text without a character uses no expert.")
        ids = self.tokenizer(label).encode(text)
        return observe_text(self.model, ids, distribution=label)
