"""What a parameter of a model is, and the one grammar of names that stored tensors are read by. Torch-free.

A model itself says where its parameters belong (``LanguageModel.parameters_of``), by the modules that hold them. Names
are for tensors without a model: those of a committed stage.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """What a parameter belongs to."""

    embedding = "embedding"
    attention = "attention"
    """Projections, and the norms of queries and keys."""
    norm = "norm"
    """Norms of the stream."""
    dense = "dense"
    """The feed-forward network of a layer without a mixture of experts."""
    shared = "shared"
    """What every token uses in a layer with one: shared experts, and their mix with the routed ones."""
    expert = "expert"
    """Routed experts."""
    router = "router"
    head = "head"

    @property
    def is_routed(self) -> bool:
        """Whether it makes up a sparse layer: an expert that tokens are routed to, or its router."""
        return self in (Part.expert, Part.router)


@dataclass(frozen=True)
class Place:
    """Where in a model a parameter is."""

    part: Part
    layer: int | None = None
    """None outside of the blocks."""
    generation: int | None = None
    """Whose it is alone, counted from 0: experts, router rows, and deltas of any part. None is shared by all."""

    def is_in(self, part: Part | None, generation: int | None) -> bool:
        """Whether it is of this part and this generation; None is any."""
        return part in (None, self.part) and generation in (None, self.generation)

    @property
    def is_trunk(self) -> bool:
        """Whether all generations share it."""
        return self.generation is None and not self.part.is_routed


_NAME = re.compile(
    r"""(?: blocks\.(?P<layer>\d+)\. )?
        (?: moe\.banks\.experts\.(?P<expert>\d+)\..+
          | (?: .+\.deltas\. | moe\.router\..+[._] | moe\.banks\.generations\. | document_clusters\.centroids_ )
            (?P<generation>\d+) (?: \.up | \.down | \.gate_up )?
          | .+
        )""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class TensorName:
    """A tensor's name in a state dictionary, taken apart; ``str`` puts it together again."""

    form: str
    """The name with ``{layer}``, ``{expert}`` and ``{generation}`` in place of the numbers."""
    layer: int | None = None
    expert: int | None = None
    """Index within the layer."""
    generation: int | None = None
    """Of what carries its generation's number in its name: router rows, biases, centroids and deltas, not experts."""

    @classmethod
    def parse(cls, name: str) -> TensorName:
        """Take a name apart."""
        match = _NAME.fullmatch(name)
        assert match is not None, name
        numbers = {kind: int(number) for kind, number in match.groupdict().items() if number is not None}
        form = name
        for kind in sorted(numbers, key=match.start, reverse=True):  # what is replaced moves what comes after it
            form = f"{form[: match.start(kind)]}{{{kind}}}{form[match.end(kind) :]}"
        return cls(form, **numbers)

    def __str__(self) -> str:
        return self.form.format(layer=self.layer, expert=self.expert, generation=self.generation)


def expert_tensor(layer: int, expert: int, matrix: str) -> str:
    """Name of one of an expert's matrices: ``gate_up`` or ``up``, and ``down``."""
    return str(TensorName("blocks.{layer}.moe.banks.experts.{expert}." + matrix, layer, expert))


def router_rows(layer: int, generation: int) -> str:
    """Name of a generation's rows in a trained router."""
    return str(TensorName("blocks.{layer}.moe.router.rows.{generation}", layer, generation=generation))


def document_centroids(generation: int) -> str:
    """Name of the centroids by which a generation's text is recognized."""
    return str(TensorName("document_clusters.centroids_{generation}", generation=generation))
