"""The language model: Mixtral's decoder over our mixture-of-experts layer.

Legend: B batch, S sequence, T = B·S tokens, D model width, V vocabulary, F token-feature width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.parts import Part, Place
from lifelong_moe.config.routing.routers import ClusterConfig
from lifelong_moe.data.tokens.shards import TokenShard
from lifelong_moe.model.attention import AttentionContext, position_tables
from lifelong_moe.model.block import Block
from lifelong_moe.model.cache import KeyValueCache
from lifelong_moe.model.deltas import DeltaEmbedding, DeltaLinear, GenerationSlices, LowRank
from lifelong_moe.model.domains import CorpusDomains, build_document_clusters, shard_domain_ids
from lifelong_moe.model.experts import LowRankExperts, WholeExperts
from lifelong_moe.model.head import LinearHead
from lifelong_moe.model.mixture import CompetingBlock, MixtureHead
from lifelong_moe.model.moe import MoELayer
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.ops.document_attention import Documents
from lifelong_moe.ops.window import window_mask
from lifelong_moe.plan.architecture import Architecture, Generation
from lifelong_moe.routing.base import Routing, RoutingContext
from lifelong_moe.routing.buckets import add_missing_tables, table_names


@dataclass
class ModelOutput:
    """The result of a forward pass."""

    hidden_BSD: Tensor
    """Final hidden states after the last norm, in the form that ``model.head.logits`` reads."""
    routings: list[Routing]
    """Each layer's routing decision."""
    below_BSD: Tensor | None = None
    """Input of the block at which the pass was split; see ``LanguageModel.forward``."""


class LanguageModel(nn.Module):
    """A decoder-only transformer whose experts come in generations.

    Parameters are uninitialized until :func:`initialize` or a checkpoint fills them. Old experts, router rows
    and deltas are frozen by :meth:`freeze_generations`.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        config, routing = architecture.model, architecture.routing
        self.architecture = architecture
        self.separates_documents = config.document_mask
        """Whether tokens attend within their own document only; set for pairs whatever ``model.document_mask`` is."""
        self.tokenizer_size = architecture.vocab_size
        """Tokens of the tokenizer. A checkpoint's embedding may have more rows: they stand for no text, and are never
        sampled."""
        self.embedding = DeltaEmbedding(architecture.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(architecture, layer) for layer in range(config.layers - 1))
        self.blocks.append((CompetingBlock if routing.competitive else Block)(architecture, config.layers - 1))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = (MixtureHead if routing.competitive else LinearHead)(config.width, architecture.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.document_clusters = build_document_clusters(architecture)
        self.token_features: Tensor | None
        table = None
        if isinstance(routing, ClusterConfig) and routing.clusters_embedding:
            table = torch.zeros(architecture.vocab_size, routing.feature_width)
        self.register_buffer("token_features", table)
        numbers = [architecture.experts_in(layer) for layer in range(config.layers)] if routing.has_table else []
        self.table_names = table_names(numbers)
        for name in self.table_names.values():
            self.register_buffer(name, torch.zeros(architecture.vocab_size, dtype=torch.int64))
        self.register_state_dict_post_hook(self._leave_out_tied_head)
        # Found once: generations add no matrices, but more and more modules to look through.
        self._matrices = [one for one in self.modules() if isinstance(one, DeltaLinear | DeltaEmbedding)]
        for i, generation in enumerate(architecture.generations):
            self._add_modules(generation)
            if i + 1 == architecture.frozen:
                self.freeze_generations(architecture.continued)

    def recompute(self, on: bool) -> None:
        """Recompute attention and experts in the backward pass instead of storing their activations, or stop doing so.

        Routers are never recomputed: some count tokens or draw noise.
        """
        for block in self.blocks:
            block.recomputes = block.moe.recomputes = on  # type: ignore[assignment, union-attr]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        add_missing_tables(state_dict, self.table_names)
        for name, other in self._tied_names.items():
            if f"{prefix}{name}" in state_dict:
                state_dict[f"{prefix}{other}"] = state_dict[f"{prefix}{name}"]
        super()._load_from_state_dict(state_dict, prefix, *args)

    @staticmethod
    def _leave_out_tied_head(
        model: LanguageModel, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any]
    ) -> None:
        for name in model._tied_names.values():
            del state_dict[f"{prefix}{name}"]

    @property
    def _is_tied(self) -> bool:
        """Whether the head is the embedding's own matrix, which is stored once, as the embedding."""
        return self.architecture.model.tie_embeddings

    @property
    def _tied_names(self) -> dict[str, str]:
        """The head's names of the embedding's tensors that are its own as well, by the embedding's."""
        names = ("weight", *(f"added.{generation}" for generation in self.embedding.added)) if self._is_tied else ()
        return {f"embedding.{name}": f"head.{name}" for name in names}

    def stored_names(self, *, trained: bool) -> set[str]:
        """Names in the state dictionary of the parameters that train, or of those that are frozen; no buffers."""
        buffers = {name for name, _ in self.named_buffers()}
        with torch.enable_grad():  # without, an expert's view of its generation's Parameter would look frozen
            stored = self.state_dict(keep_vars=True)
        # What a low-rank expert changes is a buffer, too, of another name than stored: a whole number.
        parameters = {name: one for name, one in stored.items() if name not in buffers and one.is_floating_point()}
        return {name for name, tensor in parameters.items() if tensor.requires_grad == trained}

    def moe_layers(self) -> Iterator[MoELayer]:
        """The mixture-of-experts layers, bottom to top; a dense one has no routed experts."""
        for block in self.blocks:
            yield block.moe  # type: ignore[misc]

    def add_generation(self, generation: Generation) -> None:
        """Add a generation's experts and deltas, uninitialized; the caller updates ``architecture``."""
        self._add_modules(generation)
        # Modules are made on the CPU; a model that grows may be elsewhere. It walks through all that is there, so that
        # a model of many generations, which are made where it is, does without.
        if (device := self.embedding.weight.device).type != "cpu":
            self.to(device)

    def _add_modules(self, generation: Generation) -> None:
        for i, layer in enumerate(self.moe_layers()):
            layer.add_experts(generation.experts_in(i), generation.rank)
        if self.document_clusters is not None:
            self.document_clusters.add(generation.experts)
        number = self.embedding.deltas.num_generations
        for matrix in self.delta_matrices():
            matrix.add_generation(generation.delta_rank)
        for table in (self.embedding, self.head) if generation.tokens else ():
            table.added.add_generation(number, generation.tokens, self.architecture.model.width)
        if self._is_tied and generation.tokens:
            self.head.added[str(number)] = self.embedding.added[str(number)]

    def delta_matrices(self) -> Sequence[DeltaLinear | DeltaEmbedding]:
        """The matrices of the trunk that may have deltas: embedding, attention, head."""
        return self._matrices

    def freeze_generations(self, but: int | None = None) -> None:
        """Freeze all experts, router rows and deltas except those of one generation; None freezes all."""
        for layer in self.moe_layers():
            layer.freeze(but)
        for matrix in self.delta_matrices():
            for generation, delta in matrix.deltas.items():
                delta.requires_grad_(generation == str(but))
        for table in (self.embedding, self.head):
            for generation, rows in table.added.items():
                rows.requires_grad_(generation == str(but))

    def places(self) -> dict[str, Place]:
        """The place of each parameter by name, as reported by the module that owns it."""
        found = dict.fromkeys(self.head.parameters(), Place(Part.head))
        found |= dict.fromkeys(self.embedding.parameters(), Place(Part.embedding))  # the head's too if they are tied
        found |= dict.fromkeys(self.norm.parameters(), Place(Part.norm))
        for i, block in enumerate(self.blocks):
            found |= block.places(i)  # type: ignore[operator]
        for matrix in self.delta_matrices():
            for generation, delta in matrix.deltas.items():
                found |= {p: replace(found[p], generation=int(generation)) for p in delta.parameters()}
        for table in (self.head, self.embedding):  # the embedding last, whose rows are the head's too if they are tied
            found |= {rows: replace(found[rows], generation=int(born)) for born, rows in table.added.items()}
        return {name: found[parameter] for name, parameter in self.named_parameters()}

    def parameters_of(self, part: Part | None = None, generation: int | None = None) -> dict[str, nn.Parameter]:
        """Parameters by name: of a part, of a generation (its experts, router rows and deltas), or of both at once.

        Args:
            part: None is every part.
            generation: Counted from 0. None is every generation, and what they share.

        Returns:
            No empty parameters, such as the router rows of a generation without experts in a layer.
        """
        found = {
            name: self.get_parameter(name) for name, place in self.places().items() if place.is_in(part, generation)
        }
        return {name: parameter for name, parameter in found.items() if parameter.numel()}

    def trunk_parameters(self) -> dict[str, nn.Parameter]:
        """The shared parts by name: everything but experts, routers and deltas."""
        return {name: self.get_parameter(name) for name, place in self.places().items() if place.is_trunk}

    def domain_ids(self, shard: TokenShard, distribution: str | None) -> NDArray[np.integer] | None:
        """Domain of each token of a shard; see :func:`lifelong_moe.model.domains.shard_domain_ids`."""
        return shard_domain_ids(self.architecture, self.document_clusters, shard, distribution)

    def corpus_domains(self) -> CorpusDomains:
        """The same for whole corpora, kept beside their tokens; valid until centroids change."""
        return CorpusDomains(self.architecture, self.document_clusters)

    def forward(
        self,
        batch: TokenBatch,
        *,
        cache: KeyValueCache | None = None,
        split: int = 0,
        below_BSD: Tensor | None = None,
    ) -> ModelOutput:
        """Hidden states of every token.

        Args:
            batch: Tokens and their documents, domains and masks.
            cache: Keys and values of earlier positions, extended by these. Fill it with a prompt, then one token at a
                time.
            split: The input of this block is returned as ``below_BSD``.
            below_BSD: ``(B, S, D)``, from another model's call with the same ``split``: blocks below it are skipped. A
                teacher starts where it begins to differ from its student.

        Raises:
            ValueError: If tokens have domains, and the batch does not say which.
        """
        self._require_domains(batch)
        attention = self._attention_context(batch, cache)
        routing = self._routing_context(batch, attention.generations)
        caches = [None] * len(self.blocks) if cache is None else cache.layers
        routings: list[Routing] = []
        # shape: (B, S, D)
        x_BSD, first = (self._embed(batch, attention.generations), 0) if below_BSD is None else (below_BSD, split)
        for i, block in enumerate(list(self.blocks)[first:], first):
            if i == split:
                below_BSD = x_BSD
            # shape: (B, S, D), or (B, S, E, D) after a competing block, which is the last
            x_BSD, decided = block(x_BSD, attention, routing, caches[i])
            routings.append(decided)
        hidden_BSD = self.norm(x_BSD)
        if self.architecture.model.logit_scale != 1:  # logits are linear in what the head reads
            hidden_BSD = hidden_BSD * self.architecture.model.logit_scale
        return ModelOutput(self.head.read(hidden_BSD, routings[-1]), routings, below_BSD)

    def by_block(self, batch: TokenBatch) -> Iterator[Routing]:
        """:meth:`forward` without the head: run a block, yield its routing, and wait until the next block is asked for.

        What many batches need of one layer can then be had before any goes on to the next. Of the last block, whose
        output nobody reads, experts are not computed.
        """
        self._require_domains(batch)
        attention = self._attention_context(batch, None)
        routing, x_BSD = self._routing_context(batch, attention.generations), self._embed(batch, attention.generations)
        for block in list(self.blocks)[:-1]:
            x_BSD, decided = block(x_BSD, attention, routing, None)
            yield decided
        top: Any = self.blocks[-1]
        yield top.decide(x_BSD, attention, routing)

    def _require_domains(self, batch: TokenBatch) -> None:
        architecture, clusters = self.architecture, self.document_clusters
        # Without generations that tokens belong to, clusters of text may still choose the experts.
        num = 1 if clusters is None else clusters.num_domains()
        if architecture.routing.by_generation or architecture.has_deltas:
            num = len(architecture.generations)
        if batch.domain_ids_BS is None and num > 1:
            raise ValueError(
                f"a token of this model belongs to one of {num} domains, which decides its experts and changes, and "
                f"the batch does not say which: give domain_ids_BS, as LanguageModel.domain_ids finds them, or read "
                f"texts with the model that lifelong_moe.load(run) returns."
            )

    def _embed(self, batch: TokenBatch, generations: GenerationSlices | None) -> Tensor:
        x_BSD, scale = self.embedding(batch.ids_BS, generations), self.architecture.model.embedding_scale
        return x_BSD if scale == 1 else x_BSD * scale

    def _attention_context(self, batch: TokenBatch, cache: KeyValueCache | None) -> AttentionContext:
        config, device, length = self.architecture.model, batch.ids_BS.device, batch.ids_BS.shape[1]
        if cache is not None and cache.length and length > 1:
            raise ValueError("a cache that is not empty takes one token at a time")
        mask: Tensor | Documents | None = None
        if self.separates_documents and batch.document_ids_BS is not None:
            if cache is None:
                mask = Documents.of(batch.document_ids_BS, batch.document_starts)
            else:
                mask = cache.within_documents(batch.document_ids_BS)
        positions = length if cache is None else cache.length + length
        if config.window is not None and positions > config.window:
            seen, within = window_mask(length, positions, config.window, device), mask
            within = within.mask if isinstance(within, Documents) else within
            mask = seen if within is None else seen & within
        # Sorted once, for all layers.
        generations = self.embedding.slices(batch.domain_ids_BS, batch.domain_counts)
        if cache is None:
            return AttentionContext(position_tables(config, length, device), mask, generations)
        if cache.rotary is None:  # computed once for all positions, not at every step
            cache.rotary = position_tables(config, cache.room, device)
        cos, sin = (table[cache.length : cache.length + length] for table in cache.rotary)
        return AttentionContext((cos, sin), mask, generations)

    def _routing_context(self, batch: TokenBatch, generations: GenerationSlices | None) -> RoutingContext:
        token_ids_T, mask_BS, domains_BS = batch.ids_BS.flatten(), batch.mask_BS, batch.domain_ids_BS
        return RoutingContext(
            token_ids_T=token_ids_T,
            mask_T=torch.ones_like(token_ids_T, dtype=torch.bool) if mask_BS is None else mask_BS.flatten(),
            domain_ids_T=torch.zeros_like(token_ids_T) if domains_BS is None else domains_BS.flatten(),
            present=None if generations is None else generations.present,
            old_text_T=None if batch.old_text_BS is None else batch.old_text_BS.flatten(),
            features_TF=None if self.token_features is None else self.token_features[token_ids_T],
            buckets_of={num: getattr(self, name)[token_ids_T] for num, name in self.table_names.items()},
            num_sequences=len(batch.ids_BS),
            full_length=self.architecture.model.context,
        )


@torch.no_grad()
def initialize(model: LanguageModel, seed: int) -> None:
    """Initialize all parameters; a pure function of the architecture and the seed.

    ==============================  ==========================================================
    norms                           1
    biases of attention             0
    ``up`` of a delta               0, so that it changes nothing yet
    ``down`` of a delta             normal, deviation ``1 / sqrt(columns)``
    factors of low-rank experts     the same: ``b`` is 0, ``a`` random
    a noisy router's noise          0, as the router made it
    rows and experts of ``switch``  truncated normal, deviation ``sqrt(0.1 / inputs)``
    rows of ``base``                orthogonal, of length 0.1
    rows of ``vmoe``                truncated normal, deviation ``sqrt(1 / inputs)`` once cut
    every other matrix              normal, mean 0, deviation ``init_std``
    attention output, expert down   the same, divided by ``sqrt(2 * layers)`` (GPT-2), so that
                                    the stream's variance does not grow with depth
    ==============================  ==========================================================
    """
    # On the CPU, so that the numbers do not depend on the device.
    generator = torch.Generator().manual_seed(seed)
    deltas = {delta.down: delta for delta in model.modules() if isinstance(delta, LowRank)}
    as_made = {p for layer in model.moe_layers() for p in layer.router.preset_parameters()}
    as_made |= {delta.up for delta in deltas.values()}
    biases = {one.bias for one in model.modules() if isinstance(one, DeltaLinear) and one.bias is not None}
    residual = {weight for block in model.blocks for weight in block.residual_weights()}  # type: ignore[operator]
    banks = [layer.banks for layer in model.moe_layers()]
    drawn_by_turns = {g.into: g.down for one in banks for g in one.born if isinstance(g, WholeExperts)}
    as_made |= {*drawn_by_turns.values()}
    low_rank = {g.changes[0].a_EPI: g for one in banks for g in one.born if isinstance(g, LowRankExperts)}
    as_made |= {p for g in low_rank.values() for p in g.parameters()}
    for parameter in model.parameters():
        if parameter in deltas:
            deltas[parameter].begin(generator)
        elif parameter in low_rank:
            low_rank[parameter].begin(generator)
        elif parameter in drawn_by_turns:
            # Expert by expert, both matrices in turn: the order of draws when each expert was a module of its own.
            for matrices in zip(parameter, drawn_by_turns[parameter], strict=True):
                for i, matrix in enumerate(matrices):
                    std = initial_std(model.architecture.model, residual=i == 1)
                    nn.init.normal_(matrix, std=std, generator=generator)
        elif parameter in biases:
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)
        elif parameter not in as_made:
            std = initial_std(model.architecture.model, residual=parameter in residual)
            nn.init.normal_(parameter, std=std, generator=generator)
    for layer in model.moe_layers():
        layer.initialize(generator)


def initial_std(config: ModelConfig, *, residual: bool) -> float:
    """Deviation that a matrix begins with; smaller where it writes into the residual stream."""
    return config.init_std / (2 * config.layers) ** 0.5 if residual else config.init_std
