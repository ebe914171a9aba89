"""The matrix products that text takes through a model, in order, and those of their backward passes. Torch-free.

A product of an input and a matrix is one in the forward pass; backward it is one more for the input's gradient, if
anything before it has one, and one for the matrix's, if that trains. All else, norms included, is left out.

Legend: D model width, F hidden width, V vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lifelong_moe.config.model import Activation, SharedMix
from lifelong_moe.config.parts import Part
from lifelong_moe.config.routing.routers import ClusterConfig, HierarchicalConfig
from lifelong_moe.plan.architecture import Architecture

Trains = Callable[[Part, int | None], bool]
"""Whether a part trains: of a generation, or, with None, of what all generations share."""


def nothing(part: Part, generation: int | None) -> bool:
    """Where there is no backward pass."""
    return False


def everything(part: Part, generation: int | None) -> bool:
    """Where all that there is trains."""
    return True


@dataclass(frozen=True)
class Text:
    """Whose text it is: where generations are kept apart, tokens use one alone."""

    shares: Mapping[int, float]
    """Share of the tokens of each generation's text; they sum to 1."""

    @classmethod
    def of(cls, architecture: Architecture, own: int | None = None, old: float = 0.0) -> Text:
        """Text of one generation, the newest by default, and a share ``old`` of it spread evenly over all others."""
        num = len(architecture.generations)
        own = num - 1 if own is None else own
        others = [g for g in range(num) if g != own]
        return cls({own: 1 - old if others else 1.0, **dict.fromkeys(others, old / max(1, len(others)))})

    @classmethod
    def mixed(cls, architecture: Architecture) -> Text:
        """As much of each generation's."""
        num = len(architecture.generations)
        return cls(dict.fromkeys(range(num), 1 / num))


class TokenProducts:
    """What one token's way through a model takes, on average: multiply-adds, in :attr:`total`.

    Without groups or bundles, tokens are taken to use all experts alike, which is what routers are balanced to.
    """

    def __init__(self, architecture: Architecture, trains: Trains, text: Text, first_block: int = 0) -> None:
        self.architecture, self.config, self.trains, self.text = architecture, architecture.model, trains, text
        self.total = 0.0
        self.flows = trains(Part.embedding, None)
        """Whether what goes on to the next layer has a gradient."""
        if not first_block:
            self._embed()
        for layer in range(first_block, self.config.layers):
            self._attend(layer)
            self._feed_forward(layer)
        below = self.total
        self._head()
        self.of_head = self.total - below
        """Those of them that make logits."""

    def _add(self, size: float, trained: float, flows: bool) -> bool:
        """One more product: of so many multiply-adds, its matrix trained by such a share of the tokens, its input with
        a gradient or without. Returns whether its output has one."""
        self.total += size * (1 + flows + trained)
        return flows or trained > 0

    def _trained(self, part: Part) -> float:
        """Share of the tokens whose matrix of this part has a gradient: its own, or its low-rank change's."""
        if self.trains(part, None):
            return 1.0
        ranks = (generation.delta_rank for generation in self.architecture.generations)
        return sum(self.text.shares[g] for g, rank in enumerate(ranks) if rank and self.trains(part, g))

    def _embed(self) -> None:
        """A look-up, which costs nothing; its low-rank change is one and a product with ``down`` ``(R, D)``."""
        for g, share in self.text.shares.items():
            rank = self.architecture.generations[g].delta_rank
            trained = bool(rank and share and self.trains(Part.embedding, g))
            self.flows |= self._add(share * rank * self.config.width, float(trained), trained)

    def _attend(self, layer: int) -> None:
        config, trained = self.config, self._trained(Part.attention)
        wide, narrow = (heads * config.attention_width for heads in (config.heads, config.kv_heads))
        flows = self.flows or self.trains(Part.norm, None)
        flows = self._add((wide + 2 * narrow) * config.width, trained, flows)
        # Queries by keys, and probabilities by values: of two inputs each. A capped one looks at all and masks half.
        seen = config.context if config.attention_softcap is not None else config.context / 2
        flows = self._add(2 * wide * seen, float(flows), flows)
        flows = self._add(wide * config.width, trained, flows)
        self.flows |= flows or (config.sandwich_norms and self.trains(Part.norm, None))

    def _feed_forward(self, layer: int) -> None:
        config, flows = self.config, self.flows or self.trains(Part.norm, None)
        if layer not in config.moe_layers:
            hidden = config.dense_width or config.expert_width * self.architecture.routing.top_k
            self.flows |= self._network(hidden, config.dense_activation, 1.0, self.trains(Part.dense, None), flows)
            return
        self.flows |= self._route(layer, flows)
        for g, used in self._used(layer).items():
            if used:  # a generation may have grown in other layers alone
                trained = self.trains(Part.expert, g)
                self.flows |= self._network(config.expert_width, config.activation, used, trained, flows)
        if config.shared_experts:
            trained, hidden = self.trains(Part.shared, None), config.shared_experts * config.expert_width
            self.flows |= self._network(hidden, config.activation, 1.0, trained, flows)
            if config.shared_mix == SharedMix.learned:
                self._add(2 * config.width, trained, flows)

    def _network(self, hidden: int, activation: Activation, used: float, trained: bool, flows: bool) -> bool:
        """A feed-forward network that so many tokens use."""
        one = used * self.config.width * hidden
        flows = self._add((2 if activation.is_gated else 1) * one, trained, flows)
        return self._add(one, trained, flows)

    def _route(self, layer: int, flows: bool) -> bool:
        """Products with all generations' rows, whichever of them a token may choose."""
        routing, has_gradient = self.architecture.routing, False
        row = rows_an_expert(self.architecture)
        for g, generation in enumerate(self.architecture.generations):
            if num := generation.experts_in(layer):
                rows = num * row + group_rows(self.architecture, [num])
                trained = self.trains(Part.router, g)
                has_gradient |= self._add(rows * self.config.width, trained, bool(row) and flows)
                if isinstance(routing, ClusterConfig) and not routing.by_document:  # fixed, of a detached input
                    width = self.config.width if routing.clusters_hidden else routing.feature_width
                    self._add(num * width, 0.0, flows=False)
        return has_gradient

    def _used(self, layer: int) -> dict[int, float]:
        """Experts of each generation that a token uses in a layer, on average."""
        architecture = self.architecture
        experts = {g: one.experts_in(layer) for g, one in enumerate(architecture.generations)}
        every = sum(experts.values())
        if architecture.routing.mode == "dense":
            return {g: float(num) for g, num in experts.items()}
        used = min(every, architecture.routing.top_k)
        if architecture.routing.by_generation and all(experts.values()):
            return {g: used * self.text.shares[g] for g in experts}
        return {g: used * num / every for g, num in experts.items()}

    def _head(self) -> None:
        """Logits: one product, or of competing experts one each."""
        config, last = self.config, self.config.layers - 1
        times = self.architecture.experts_in(last) if self.architecture.routing.competitive else 1
        part = Part.embedding if config.tie_embeddings else Part.head
        size = times * self.architecture.vocab_size * config.width
        self._add(size, self._trained(part), self.flows or self.trains(Part.norm, None))


def rows_an_expert(architecture: Architecture) -> int:
    """Rows that a router has for each expert."""
    routing = architecture.routing
    return (2 if routing.mode == "noisy_topk" else 1) if routing.has_rows else 0


def group_rows(architecture: Architecture, experts: Iterable[int]) -> int:
    """Rows that routers have for a generation's groups; of it each layer has so many experts."""
    routing = architecture.routing
    return sum(routing.groups_of(num) for num in experts) if isinstance(routing, HierarchicalConfig) else 0


def pass_products(
    architecture: Architecture, trains: Trains, text: Text, parts: tuple[Part, ...] = (Part.attention, Part.head)
) -> float:
    """Multiply-adds of one pass, however many tokens it has: ``up down`` of each matrix for each bundle that occurs,
    and, where that bundle trains, a product for the gradient of either."""
    config, total = architecture.model, 0.0
    wide, narrow = (heads * config.attention_width for heads in (config.heads, config.kv_heads))
    sizes = {
        Part.attention: config.layers * config.width * 2 * (wide + narrow),
        Part.head: architecture.vocab_size * config.width,
    }
    for g, share in text.shares.items():
        rank = architecture.generations[g].delta_rank if share else 0
        total += sum(rank * sizes[part] * (3 if trains(part, g) else 1) for part in parts)
    return total
