"""The language model: Mixtral's decoder over our mixture-of-experts layer.

Legend: B batch, S sequence, T = B·S tokens, D model width, V vocabulary, F token-feature width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifelong_moe.model.architecture import Architecture
from lifelong_moe.model.attention import Attention, KeyValue, rotary_tables
from lifelong_moe.model.config import ModelConfig
from lifelong_moe.model.experts import ExpertBanks
from lifelong_moe.model.groups import DocumentClusters
from lifelong_moe.model.moe import MoELayer
from lifelong_moe.routing.base import Routing, RoutingContext
from lifelong_moe.routing.config import Features, Level
from lifelong_moe.routing.registry import build_router


@dataclass
class ModelOutput:
    """What a forward pass gives."""

    hidden_BSD: Tensor
    """Final hidden states after the last norm; ``model.logits`` turns them into logits."""
    routings: list[Routing]
    """What each layer's router decided."""
    cache: list[KeyValue]
    """Keys and values of each layer, for the next call."""


class Block(nn.Module):
    """Norm, attention, norm, mixture of experts, each added to the stream."""

    def __init__(self, architecture: Architecture, layer: int) -> None:
        super().__init__()
        config = architecture.model
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        router = build_router(architecture.routing, width=config.width, layer=layer)
        self.moe = MoELayer(router, ExpertBanks(config.width, config.expert_width))

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past: KeyValue | None,
        context: RoutingContext,
    ) -> tuple[Tensor, Routing, KeyValue]:
        """One layer."""
        mixed, key_value = self.attention(self.attention_norm(x_BSD), *rotary, mask, past)
        x_BSD = x_BSD + mixed
        out_TD, routing = self.moe(self.moe_norm(x_BSD).flatten(0, 1), context)
        return x_BSD + out_TD.view_as(x_BSD), routing, key_value


class LanguageModel(nn.Module):
    """A decoder-only transformer whose experts come in generations.

    Parameters are uninitialized until :func:`initialize` or a checkpoint fills them.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        config, routing = architecture.model, architecture.routing
        self.architecture = architecture
        self.embedding = nn.Embedding(architecture.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(architecture, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, architecture.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        clustered = routing.mode == "cluster"
        self.document_clusters: DocumentClusters | None = None
        self.token_features: Tensor | None
        if clustered and routing.level == Level.document:
            self.document_clusters = DocumentClusters(architecture)
        uses_features = clustered and routing.level == Level.token and routing.features == Features.embedding
        table = torch.zeros(architecture.vocab_size, routing.feature_width) if uses_features else None
        self.register_buffer("token_features", table)
        for i, generation in enumerate(architecture.generations):
            self.add_experts(generation.experts)
            if i + 1 == architecture.frozen:
                self.freeze_experts()

    def moe_layers(self) -> Iterator[MoELayer]:
        """The mixture-of-experts layers, bottom to top."""
        for block in self.blocks:
            yield block.moe  # type: ignore[misc]

    def add_experts(self, num: int) -> None:
        """Add ``num`` experts, uninitialized, to every layer; the architecture is the caller's to change."""
        for layer in self.moe_layers():
            layer.add_experts(num)
        if self.document_clusters is not None:
            self.document_clusters.add(next(self.moe_layers()).router.groups_of(num))  # type: ignore[operator]

    def freeze_experts(self) -> None:
        """Freeze all experts and router rows there are."""
        for layer in self.moe_layers():
            layer.freeze()

    def trunk_parameters(self) -> dict[str, nn.Parameter]:
        """The shared parts by name: everything but experts and routers."""
        return {n: p for n, p in self.named_parameters() if ".moe.banks." not in n and ".moe.router." not in n}

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``(..., V)`` of hidden states ``(..., D)``."""
        return F.linear(hidden, self.head.weight)

    def forward(
        self,
        token_ids_BS: Tensor,
        *,
        document_ids_BS: Tensor | None = None,
        group_ids_BS: Tensor | None = None,
        mask_BS: Tensor | None = None,
        past: list[KeyValue] | None = None,
    ) -> ModelOutput:
        """Hidden states of every token.

        Args:
            token_ids_BS: int64 ``(B, S)``.
            document_ids_BS: Document of each token, int64; needed with ``model.document_mask`` only.
            group_ids_BS: Document cluster or label of each token, int64; zeros by default.
            mask_BS: True for real tokens; all by default. Padding must stand at the right.
            past: The cache of the positions before these, from an earlier call.
        """
        config = self.architecture.model
        length, offset = token_ids_BS.shape[1], 0 if past is None else past[0][0].shape[2]
        rotary = self._rotary(offset, length, token_ids_BS.device)
        context = self._context(token_ids_BS, group_ids_BS, mask_BS)
        use_documents = config.document_mask and document_ids_BS is not None and past is None
        mask = document_attention_mask(document_ids_BS) if use_documents else None  # type: ignore[arg-type]
        x_BSD = self.embedding(token_ids_BS)
        if past is not None and length > 1:
            raise ValueError("with a cache, tokens come one at a time")
        routings, cache = [], []
        for i, block in enumerate(self.blocks):
            x_BSD, routing, key_value = block(x_BSD, rotary, mask, past[i] if past else None, context)
            routings.append(routing)
            cache.append(key_value)
        return ModelOutput(self.norm(x_BSD), routings, cache)

    def _rotary(self, offset: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        config = self.architecture.model
        cos, sin = rotary_tables(offset + length, config.width // config.heads, config.rope_base, device)
        return cos[offset:], sin[offset:]

    def _context(self, token_ids_BS: Tensor, group_ids_BS: Tensor | None, mask_BS: Tensor | None) -> RoutingContext:
        token_ids_T = token_ids_BS.flatten()
        mask_T = torch.ones_like(token_ids_T, dtype=torch.bool) if mask_BS is None else mask_BS.flatten()
        group_ids_T = torch.zeros_like(token_ids_T) if group_ids_BS is None else group_ids_BS.flatten()
        features_TF = None if self.token_features is None else self.token_features[token_ids_T]
        return RoutingContext(token_ids_T, mask_T, group_ids_T, features_TF)


def document_attention_mask(document_ids_BS: Tensor) -> Tensor:
    """Causal attention within a document only: bool ``(B, 1, S, S)``, True where a query may look."""
    same_BSS = document_ids_BS.unsqueeze(2) == document_ids_BS.unsqueeze(1)
    return same_BSS.tril().unsqueeze(1)


def initialize(model: LanguageModel, seed: int) -> None:
    """Fill all parameters; a pure function of the architecture and the seed.

    ==============================  ==========================================================
    norms                           1
    every other matrix              normal, mean 0, deviation ``init_std``
    attention output, expert down   the same, divided by ``sqrt(2 * layers)`` (GPT-2), so that
                                    the stream's variance does not grow with depth
    ==============================  ==========================================================
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=initial_std(name, model.architecture.model), generator=generator)


def initial_std(name: str, config: ModelConfig) -> float:
    """Deviation that a matrix begins with; smaller where it writes into the residual stream."""
    residual = name.endswith(("attention.output.weight", ".down"))
    return config.init_std / (2 * config.layers) ** 0.5 if residual else config.init_std
