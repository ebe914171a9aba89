"""Parts of a model that parameters belong to, and the grammar of stored tensors' names. Torch-free.

A loaded model knows its parameters' parts from the modules that hold them (``LanguageModel.parameters_of``). Names are
parsed only where there are tensors without a model: those of a committed stage.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """The part of a model that a parameter belongs to."""

    embedding = "embedding"
    attention = "attention"
    """Projections, and the norms of queries and keys."""
    norm = "norm"
    """Norms of the residual stream."""
    dense = "dense"
    """The feed-forward network of a layer without a mixture of experts."""
    shared = "shared"
    """Shared experts of a layer with a mixture, and their mix with the routed ones; every token uses them."""
    expert = "expert"
    """Routed experts."""
    router = "router"
    head = "head"

    @property
    def is_routed(self) -> bool:
        """Whether it belongs to a sparse layer: its routed experts and its router."""
        return self in (Part.expert, Part.router)


@dataclass(frozen=True)
class Place:
    """Position of a parameter in a model."""

    part: Part
    layer: int | None = None
    """Decoder layer, counted from 0; None outside of the blocks."""
    generation: int | None = None
    """The only generation that trains it, counted from 0: experts, router rows, deltas of any part, rows of tokens that
    it added. None: all do."""

    def is_in(self, part: Part | None, generation: int | None) -> bool:
        """Whether it belongs to this part and this generation; None matches any."""
        return part in (None, self.part) and generation in (None, self.generation)

    @property
    def is_trunk(self) -> bool:
        """Whether all generations share it."""
        # A router's parameters outside of its rows have no generation either.
        return self.generation is None and not self.part.is_routed


_NAME = re.compile(
    r"""(?: blocks\.(?P<layer>\d+)\. )?
        (?: moe\.banks\.experts\.(?P<expert>\d+)\..+
          | (?: .+\.deltas\. | (?: embedding | head )\.added\.
              | moe\.router\..+[._] | moe\.banks\.generations\. | document_clusters\.centroids_ )
            (?P<generation>\d+) (?: \.(?: (?: up | down | gate_up ) (?: _[ab] )? | base ) )?
          | .+
        )""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class TensorName:
    """A tensor's name in a state dictionary, parsed; ``str`` gives the name again."""

    form: str
    """The name with ``{layer}``, ``{expert}`` and ``{generation}`` in place of the numbers."""
    layer: int | None = None
    expert: int | None = None
    """Index within the layer."""
    generation: int | None = None
    """Number within the names of router rows, biases, centroids and deltas. None for experts, whose names lack it."""

    @classmethod
    def parse(cls, name: str) -> TensorName:
        """Parse a name."""
        match = _NAME.fullmatch(name)
        # The grammar ends with an alternative that takes any other name.
        assert match is not None, name
        numbers = {kind: int(number) for kind, number in match.groupdict().items() if number is not None}
        form = name
        # From the right, since a replacement moves everything after it.
        for kind in sorted(numbers, key=match.start, reverse=True):
            form = f"{form[: match.start(kind)]}{{{kind}}}{form[match.end(kind) :]}"
        return cls(form, **numbers)

    @property
    def is_base(self) -> bool:
        """Whether it is the index of the expert that a low-rank expert changes."""
        return self.form.endswith(".experts.{expert}.base")

    def __str__(self) -> str:
        return self.form.format(layer=self.layer, expert=self.expert, generation=self.generation)


def expert_tensor(layer: int, expert: int, matrix: str) -> str:
    """Name of one of an expert's matrices: ``gate_up`` or ``up``, and ``down``; of a low-rank one, a factor of each:
    ``down_a``."""
    return str(TensorName("blocks.{layer}.moe.banks.experts.{expert}." + matrix, layer, expert))


def router_rows(layer: int, generation: int) -> str:
    """Name of a generation's rows in a trained router."""
    return str(TensorName("blocks.{layer}.moe.router.rows.{generation}", layer, generation=generation))


def document_centroids(generation: int) -> str:
    """Name of the centroids that recognize a generation's text."""
    return str(TensorName("document_clusters.centroids_{generation}", generation=generation))
