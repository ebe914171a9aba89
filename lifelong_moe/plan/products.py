"""Matrix products of a model's forward and backward passes, in order. Torch-free.

A product of an input and a matrix is one in the forward pass. The backward pass adds one for the input's gradient, if
anything before it is trainable, and one for the matrix's, if it is trainable. All else, norms included, is left out.

Legend: D model width, F hidden width, V vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lifelong_moe.config.model import Activation, SharedMix
from lifelong_moe.config.parts import Part
from lifelong_moe.config.routing.routers import ClusterConfig, HierarchicalConfig
from lifelong_moe.plan.architecture import Architecture

IsTrainable = Callable[[Part, int | None], bool]
"""Whether a part is trainable: of a generation, or, with None, of what all generations share."""


def nothing(part: Part, generation: int | None) -> bool:
    """Predicate for no trainable part: there is no backward pass."""
    return False


def everything(part: Part, generation: int | None) -> bool:
    """Predicate for a model that is trainable as a whole."""
    return True


@dataclass(frozen=True)
class Text:
    """A mix of text by generation, for models whose tokens use one generation alone."""

    shares: Mapping[int, float]
    """Share of the tokens of each generation; they sum to 1."""

    @classmethod
    def of(cls, architecture: Architecture, own: int | None = None, old: float = 0.0) -> Text:
        """Text of one generation, the newest by default, with a share ``old`` spread evenly over all others."""
        num = len(architecture.generations)
        own = num - 1 if own is None else own
        others = [g for g in range(num) if g != own]
        return cls({own: 1 - old if others else 1.0, **dict.fromkeys(others, old / max(1, len(others)))})

    @classmethod
    def mixed(cls, architecture: Architecture) -> Text:
        """Text with the same share of each generation."""
        num = len(architecture.generations)
        return cls(dict.fromkeys(range(num), 1 / num))


class TokenProducts:
    """Multiply-adds of one token's passes through a model, on average, in :attr:`total`.

    Without groups or bundles, tokens are taken to use all experts alike, which is what routers are balanced to.
    """

    def __init__(self, architecture: Architecture, trains: IsTrainable, text: Text, first_block: int = 0) -> None:
        self.architecture, self.config, self.trains, self.text = architecture, architecture.model, trains, text
        self.total = 0.0
        self.flows = trains(Part.embedding, None)
        """Whether the input of the next layer has a gradient."""
        if not first_block:
            self._embed()
        for layer in range(first_block, self.config.layers):
            self._attend(layer)
            self._feed_forward(layer)
        below = self.total
        self._head()
        self.of_head = self.total - below
        """Those of the logits."""

    def _add(self, size: float, trained: float, flows: bool) -> bool:
        """Add one product, and return whether its output has a gradient.

        Args:
            size: Multiply-adds.
            trained: Share of the tokens for which its matrix has a gradient.
            flows: Whether its input has a gradient.
        """
        self.total += size * (1 + flows + trained)
        return flows or trained > 0

    def _trained(self, part: Part) -> float:
        """Share of the tokens for which a matrix of this part, or its low-rank change, has a gradient."""
        # A low-rank change is added to its matrix before the product, so its gradient needs the whole matrix's; rows of
        # tokens of a generation's own are joined to it.
        if self.trains(part, None):
            return 1.0
        owns = [bool(one.delta_rank or (part == Part.head and one.tokens)) for one in self.architecture.generations]
        return sum(self.text.shares[g] for g, is_own in enumerate(owns) if is_own and self.trains(part, g))

    def _embed(self) -> None:
        """The embedding's low-rank changes, and its rows for tokens of a generation's own."""
        # A look-up costs nothing; a low-rank change is a look-up in (V, R) and a product with (R, D).
        for g, share in self.text.shares.items():
            rank, tokens = self.architecture.generations[g].delta_rank, self.architecture.generations[g].tokens
            trained = bool((rank or tokens) and share and self.trains(Part.embedding, g))
            self.flows |= self._add(share * rank * self.config.width, float(trained), trained)

    def _attend(self, layer: int) -> None:
        config, trained = self.config, self._trained(Part.attention)
        wide, narrow = (heads * config.attention_width for heads in (config.heads, config.kv_heads))
        flows = self.flows or self.trains(Part.norm, None)
        flows = self._add((wide + 2 * narrow) * config.width, trained, flows)
        # Queries by keys, and probabilities by values: products of two inputs, without a matrix. A causal token sees
        # half a context on average; with a softcap the kernel computes all scores and masks half.
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
            # A generation may have grown in other layers alone.
            if used:
                trained, rank = self.trains(Part.expert, g), self.architecture.generations[g].rank
                if rank:
                    self.flows |= self._changed_network(rank, used, trained, flows)
                else:
                    self.flows |= self._network(config.expert_width, config.activation, used, trained, flows)
        if config.shared_experts:
            trained, hidden = self.trains(Part.shared, None), config.shared_experts * config.expert_width
            self.flows |= self._network(hidden, config.activation, 1.0, trained, flows)
            if config.shared_mix == SharedMix.learned:
                self._add(2 * config.width, trained, flows)

    def _network(self, hidden: int, activation: Activation, used: float, trained: bool, flows: bool) -> bool:
        """A feed-forward network that a token uses ``used`` times on average."""
        one = used * self.config.width * hidden
        flows = self._add((2 if activation.is_gated else 1) * one, trained, flows)
        return self._add(one, trained, flows)

    def _changed_network(self, rank: int, used: float, trained: bool, flows: bool) -> bool:
        """Low-rank experts: the frozen network that they change, and both factors of each of its matrices."""
        width, hidden = self.config.width, self.config.expert_width
        parts = 2 if self.config.activation.is_gated else 1
        for inputs, outputs, num in ((width, hidden, parts), (hidden, width, 1)):
            self._add(used * num * inputs * outputs, 0.0, flows)
            low = self._add(used * num * rank * inputs, trained, flows)
            flows = self._add(used * num * rank * outputs, trained, low)
        return flows

    def _route(self, layer: int, flows: bool) -> bool:
        """Products with the router rows of all generations."""
        # Also of generations that the token may not choose: they are masked after the product.
        routing, has_gradient = self.architecture.routing, False
        row = rows_an_expert(self.architecture)
        for g, generation in enumerate(self.architecture.generations):
            if num := generation.experts_in(layer):
                rows = num * row + group_rows(self.architecture, [num])
                trained = self.trains(Part.router, g)
                has_gradient |= self._add(rows * self.config.width, trained, bool(row) and flows)
                if isinstance(routing, ClusterConfig) and not routing.by_document:  # fixed centroids, detached input
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
        """Logits: one product, or one for each competing expert."""
        config, last = self.config, self.config.layers - 1
        times = self.architecture.experts_in(last) if self.architecture.routing.competitive else 1
        vocab_size = self.architecture.vocab_size
        added = sum(share * (self.architecture.tokens_of(g) - vocab_size) for g, share in self.text.shares.items())
        size = times * (vocab_size + added) * config.width
        # A tied matrix is the embedding's, but the head's low-rank changes of it are the head's own.
        is_whole = config.tie_embeddings and self.trains(Part.embedding, None)
        trained = 1.0 if is_whole else self._trained(Part.head)
        self._add(size, trained, self.flows or self.trains(Part.norm, None))


def rows_an_expert(architecture: Architecture) -> int:
    """Router rows per expert; noisy top-k has one more for the noise."""
    routing = architecture.routing
    return (2 if routing.mode == "noisy_topk" else 1) if routing.has_rows else 0


def group_rows(architecture: Architecture, experts: Iterable[int]) -> int:
    """Router rows for a generation's groups, from its number of experts in each layer."""
    routing = architecture.routing
    return sum(routing.groups_of(num) for num in experts) if isinstance(routing, HierarchicalConfig) else 0


def pass_products(
    architecture: Architecture, trains: IsTrainable, text: Text, parts: tuple[Part, ...] = (Part.attention, Part.head)
) -> float:
    """Multiply-adds of one pass that do not depend on its number of tokens: the products of low-rank changes."""
    # `up @ down` of each matrix for each generation in the text; if it is trainable, one more for the gradient of each.
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


def few_rows_products(architecture: Architecture, text: Text, rows: int) -> float:
    """Multiply-adds that low-rank changes take of a pass without gradients over so many tokens.

    Where a generation has few of them, its factors are applied to these one after the other, and not made a matrix
    first (:meth:`lifelong_moe.model.deltas.Deltas.product`).
    """
    config, total = architecture.model, 0.0
    wide, narrow = (heads * config.attention_width for heads in (config.heads, config.kv_heads))
    # Rows of each matrix that has changes, and how many have so many rows or columns beside the model's width.
    matrices = ((wide, 2 * config.layers), (narrow, 2 * config.layers), (architecture.vocab_size, 1))
    for g, share in text.shares.items():
        rank, own = architecture.generations[g].delta_rank, rows * share
        total += sum(rank * num * min(size * config.width, own * (size + config.width)) for size, num in matrices)
    return total
