"""The description of a model: shape, routing, and generations of experts. Torch-free, stored as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lifelong_moe.config.data import MAX_VOCAB_SIZE
from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.routing.base import RoutingConfig
from lifelong_moe.config.routing.mixture import MixtureConfig
from lifelong_moe.config.routing.modes import stored_routing
from lifelong_moe.errors import ConfigError
from lifelong_moe.storage.grammars import Name
from lifelong_moe.storage.plain import PlainError, from_plain

MOST_EXPERTS = 10_000_000
"""Most experts of a stored model, over all layers: each has a name in lineage, and names alone could fill memory."""


@dataclass(frozen=True)
class Generation:
    """Experts, router rows and low-rank changes that one stage added."""

    stage: Name
    """Name of the stage they were born in."""
    experts: int
    """Number in each layer that grew."""
    layers: tuple[int, ...] | None = None
    """Layers that grew; None means all."""
    delta_rank: int = 0
    """Rank of the changes of the trunk that belong to these experts; 0 means none."""
    by_layer: tuple[int, ...] | None = None
    """Number in each layer, if they differ; ``experts`` is then the largest."""
    rank: int = 0
    """Rank of the changes of older experts that these are; 0 means whole experts."""
    tokens: int = 0
    """Tokens that it added to the vocabulary, whose rows of the embedding and the head are its own."""

    def experts_in(self, layer: int) -> int:
        """Number of experts in a layer."""
        if self.by_layer is not None:
            return self.by_layer[layer]
        return self.experts if self.layers is None or layer in self.layers else 0

    def experts_by_layer(self, num_layers: int) -> list[int]:
        """Numbers in all layers."""
        if self.by_layer is not None:
            return list(self.by_layer)
        grown = range(num_layers) if self.layers is None else set(self.layers)
        return [self.experts if layer in grown else 0 for layer in range(num_layers)]


def first_generation(stage: str, model: ModelConfig) -> Generation:
    """The experts of the first stage."""
    # In the shortest of three forms, so that stored architectures of plain models stay as they are.
    numbers = model.experts_by_layer
    if len(set(numbers)) == 1:
        return Generation(stage, numbers[0])
    if len(set(numbers) - {0}) == 1:
        return Generation(stage, model.most_experts, model.moe_layers)
    return Generation(stage, model.most_experts, model.moe_layers, by_layer=numbers)


@dataclass(frozen=True)
class Architecture:
    """Everything about a model but its weights: equal architectures have tensors of the same names and shapes."""

    model: ModelConfig
    routing: RoutingConfig
    vocab_size: int
    """Tokens of the first generation's text. Those that later generations added come after them."""
    bos_id: int
    generations: tuple[Generation, ...]
    frozen: int = 0
    """Number of frozen generations, the oldest ones."""
    continued: int | None = None
    """An older generation that alone trains on; ``frozen`` then counts all."""
    labels: tuple[tuple[Name, int], ...] = ()
    """For routing by label: the generation of each distribution learned so far."""

    @property
    def num_experts(self) -> int:
        """Experts of the largest layer."""
        return max(self.experts_in(layer) for layer in range(self.model.layers))

    @property
    def num_tokens(self) -> int:
        """Tokens of all vocabularies."""
        return self.tokens_of(len(self.generations) - 1)

    def tokens_of(self, generation: int) -> int:
        """Tokens that a generation's text may have: those of the generations before it, and its own."""
        return self.vocab_size + sum(one.tokens for one in self.generations[: generation + 1])

    def label(self, distribution: str | None) -> int:
        """The generation of a distribution under routing by label; of an unknown one, the first."""
        return dict(self.labels).get(distribution or "", 0)

    def vocabulary_of(self, distribution: str | None) -> int:
        """Number of the vocabulary that a distribution's text is read with: 0 is the first, each later one adds to it.

        Args:
            distribution: Its name; None, and one that no stage has learned, has the first vocabulary.
        """
        return self.vocabulary(self.label(distribution))

    def vocabulary(self, generation: int) -> int:
        """Number of the vocabulary of a generation's text."""
        return sum(one.tokens > 0 for one in self.generations[: generation + 1])

    @property
    def mixture(self) -> MixtureConfig | None:
        """How its generations predict together; None if one is selected, or if there is no other."""
        return self.routing.mixture if self.routing.mixes and len(self.generations) > 1 else None

    @property
    def has_deltas(self) -> bool:
        """Whether generations have low-rank changes of the trunk."""
        return any(generation.delta_rank for generation in self.generations)

    def experts_in(self, layer: int) -> int:
        """Experts of a layer."""
        # Counted once: whatever is read that was stored of a model asks for it.
        if layer not in self._counted:
            self._counted[layer] = sum(generation.experts_in(layer) for generation in self.generations)
        return self._counted[layer]

    @cached_property
    def _counted(self) -> dict[int, int]:
        return {}

    def expert_births(self, layer: int) -> list[str]:
        """Birth stage of each expert of a layer, by index."""
        return [generation.stage for generation in self.generations for _ in range(generation.experts_in(layer))]

    def grown(self, generation: Generation, freezes: bool = True) -> Architecture:
        """With a new generation; all others are frozen, or stay as they are."""
        frozen = len(self.generations) if freezes else self.frozen
        continued = None if freezes else self.continued
        return replace(self, generations=(*self.generations, generation), frozen=frozen, continued=continued)

    def continuing(self, stage: str) -> Architecture:
        """With the generation of a stage trainable, and all others frozen.

        Raises:
            ConfigError: If later experts are low-rank changes of older ones, perhaps of these.
        """
        if (why := self.why_fixed(stage)) is not None:
            raise ConfigError(f"{why}.")
        # All count as frozen, and `continued` is the exception.
        return replace(self, frozen=len(self.generations), continued=self.born_in(stage))

    def why_fixed(self, stage: str) -> str | None:
        """Why a stage's experts cannot train on, in words; None if they can."""
        index = self.born_in(stage)
        changing = [one.stage for one in self.generations[index + 1 :] if one.rank]
        if not changing or self.generations[index].rank:
            return None
        return (
            f"stage {stage}'s experts do not train on: the low-rank experts of stage {changing[0]} change them "
            f"(grow.rank), and would change with them"
        )

    def shallow(self, layers: Sequence[int]) -> Architecture:
        """With some of the layers, all of which have a mixture of experts; everything is trainable."""
        # The kept layers have new numbers, so `by_layer` takes the place of `layers`.
        model = replace(self.model, layers=len(layers), experts=[self.experts_in(layer) for layer in layers])
        kept = tuple(
            replace(g, layers=None, by_layer=tuple(g.experts_in(layer) for layer in layers)) for g in self.generations
        )
        return replace(self, model=model, generations=kept, frozen=0, continued=None)

    def born_in(self, stage: str) -> int:
        """Number of the generation that a stage added."""
        return [generation.stage for generation in self.generations].index(stage)

    def trains(self, generation: int) -> bool:
        """Whether a generation is trainable."""
        return generation >= self.frozen or generation == self.continued

    def labelled(self, distribution: str) -> Architecture:
        """With the distribution's label at the newest generation, or at the one that trains on."""
        domain = len(self.generations) - 1 if self.continued is None else self.continued
        labels = {**dict(self.labels), distribution: domain}
        return replace(self, labels=tuple(labels.items()))

    def to_json(self) -> dict[str, object]:
        """As plain JSON data."""
        data = dataclasses.asdict(self) | {"model": self.model.to_json(), "routing": self.routing.to_json()}
        # Left out where it is None or 0, as in stages from before the field existed, whose keys must not change.
        if self.continued is None:
            del data["continued"]
        born = [dataclasses.asdict(one) for one in self.generations]
        later = ("rank", "tokens")
        return data | {"generations": [{k: v for k, v in one.items() if v or k not in later} for one in born]}

    @classmethod
    def from_json(cls, data: Any) -> Architecture:
        """The inverse of :meth:`to_json`.

        Raises:
            PlainError: If the data is no architecture.
        """
        if not isinstance(data, Mapping) or "routing" not in data:
            raise PlainError("not the architecture of a model")
        found = from_plain(cls, {**data, "routing": stored_routing(data["routing"])})
        _check(found)
        return found


def _check(architecture: Architecture) -> None:
    """Require what no type says: that layers, generations and tokens which are named are there."""
    layers, born = architecture.model.layers, len(architecture.generations)
    for place, one in enumerate(architecture.generations):
        numbers = (one.experts, one.delta_rank, one.rank, one.tokens, *(one.by_layer or ()))
        named = one.layers or ()
        fits = all(0 <= layer < layers for layer in named) and len(one.by_layer or range(layers)) == layers
        if min(numbers) < 0 or not fits:
            raise PlainError(f"not numbers of experts in {layers} layers", f".generations[{place}]")
    if not born:
        raise PlainError("a model has at least one", ".generations")
    if architecture.generations[0].rank:
        raise PlainError("the first experts are changes of none", ".generations[0].rank")
    if architecture.num_tokens > MAX_VOCAB_SIZE or architecture.generations[0].tokens:
        raise PlainError(f"at most {MAX_VOCAB_SIZE:,} tokens, and none that the first adds", ".generations")
    if architecture.num_tokens > architecture.vocab_size and not architecture.routing.by_label:
        raise PlainError("tokens of a generation's own need routing by label", ".generations")
    if layers * sum(one.experts for one in architecture.generations) > MOST_EXPERTS:
        raise PlainError(f"more than {MOST_EXPERTS:,} experts", ".generations")
    places = {".frozen": (architecture.frozen, born + 1), ".continued": (architecture.continued or 0, born)}
    places |= {f".labels.{name}": (place, born) for name, place in architecture.labels}
    places |= {".bos_id": (architecture.bos_id, architecture.vocab_size)}
    for path, (number, end) in places.items():
        if not 0 <= number < end:
            raise PlainError(f"must lie in 0 to {end - 1}, not be {number}", path)
