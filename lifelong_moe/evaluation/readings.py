"""What each generation said of a text, kept, so that a model with one more generation asks only that one.

A mixture leaves a generation out of a text for good once its weight falls under a share of the largest one. One more
generation mostly raises the largest, so that all others are left out as early as before, or earlier: what they said
until then is all that is asked of them. Weights and losses are computed from it anew. But the new one may also leave
out who has left out others before: these keep a weight for longer than they were heard, and read such windows again.

Legend: W windows, S positions, B windows of a batch, N places where a generation had a weight, K experts per token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lifelong_moe.config.parts import TensorName
from lifelong_moe.data.tokens.windows import EvaluationSet
from lifelong_moe.model.transformer import LanguageModel, ModelOutput
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.storage.keys import content_key

KEPT_BYTES = 256 << 20
"""Of readings that a process keeps."""


@dataclass(frozen=True)
class Reading:
    """What one generation said of the windows of a set."""

    places_N: Tensor
    """Window times S plus position, int64 and ascending ``(N,)``."""
    nats_N: Tensor
    """What each target cost, float32 ``(N,)``."""
    experts_NK: list[Tensor]
    """Experts that each token used, int16 ``(N, K)``; -1 for none. One tensor for each layer."""

    @property
    def num_bytes(self) -> int:
        """Of memory."""
        return sum(one.nbytes for one in (self.places_N, self.nats_N, *self.experts_NK))

    @classmethod
    def joined(cls, parts: Sequence[Reading]) -> Reading:
        """Of all windows, from those of some of them each; where two say something of a place, the later one counts."""
        places_N = torch.cat([part.places_N for part in parts])
        order_N = places_N.argsort(stable=True)
        is_last_N = F.pad(places_N[order_N].diff() > 0, (0, 1), value=True)[: len(order_N)]
        order_N = order_N[is_last_N]
        layers = [_padded(layer) for layer in zip(*(part.experts_NK for part in parts), strict=True)]
        return cls(
            places_N[order_N],
            torch.cat([part.nats_N for part in parts])[order_N],
            [torch.cat(layer)[order_N] for layer in layers],
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], generation: int, architecture: Architecture) -> Reading:
        """From stored tensors.

        Raises:
            ValueError: If they are not what :meth:`tensors` makes.
        """
        try:
            places_N, nats_N = tensors[f"places.{generation}"], tensors[f"nats.{generation}"]
            experts = [tensors[f"experts.{layer}.{generation}"] for layer in range(architecture.model.layers)]
        except KeyError as error:
            raise ValueError(f"no tensor {error}") from None
        shapes = {places_N.shape, *(layer.shape[:1] for layer in experts)}
        kinds = [places_N.dtype, nats_N.dtype, *(layer.dtype for layer in experts)]
        are_tables = nats_N.ndim == 1 and all(layer.ndim == 2 for layer in experts)
        are_ours = kinds == [torch.int64, torch.float32, *[torch.int16] * len(experts)]
        if not are_tables or shapes != {nats_N.shape} or not are_ours:
            raise ValueError("tensors of other shapes or types")
        if bool((places_N.diff() <= 0).any()) or bool((places_N < 0).any()) or not bool(nats_N.isfinite().all()):
            raise ValueError("places that do not ascend, or costs that are not finite")
        for number, layer in enumerate(experts):
            if bool((layer < -1).any()) or bool((layer >= architecture.experts_in(number)).any()):
                raise ValueError("experts that the model does not have")
        return cls(places_N, nats_N, experts)

    def tensors(self, generation: int) -> dict[str, Tensor]:
        """By name, to be stored."""
        experts = {f"experts.{layer}.{generation}": ids_NK for layer, ids_NK in enumerate(self.experts_NK)}
        return {f"places.{generation}": self.places_N, f"nats.{generation}": self.nats_N, **experts}


def _padded(parts: Sequence[Tensor]) -> list[Tensor]:
    """Experts of tokens, as wide as the widest: a layer of few experts has fewer than a token uses, until it grows."""
    widest = max(ids_NK.shape[1] for ids_NK in parts)
    return [F.pad(ids_NK, (0, widest - ids_NK.shape[1]), value=-1) for ids_NK in parts]


class KeptReadings:
    """What this process knows of readings, so that a run's next stage opens no file for what the one before knew.

    Args:
        most_bytes: Further readings are not kept; they are in files all the same.
    """

    def __init__(self, most_bytes: int = KEPT_BYTES) -> None:
        self._left = most_bytes
        self._kept: dict[tuple[str, str], Reading] = {}

    def of(self, text: str, readers: Sequence[str]) -> dict[int, Reading]:
        """By generation, given the key of a text and the hashes of a model's generations."""
        each = {generation: self._kept.get((text, reader)) for generation, reader in enumerate(readers)}
        return {generation: one for generation, one in each.items() if one is not None}

    def keep(self, text: str, readers: Sequence[str], readings: Mapping[int, Reading]) -> None:
        """Keep readings by generation, each in place of what was known of it."""
        for generation, one in readings.items():
            before = self._kept.pop((text, readers[generation]), None)
            self._left += 0 if before is None else before.num_bytes
            if one.num_bytes <= self._left:
                self._kept[text, readers[generation]] = one
                self._left -= one.num_bytes


class Readings:
    """Readings of one set of windows: those that are known, and those that are made."""

    def __init__(self, windows: EvaluationSet, architecture: Architecture, known: Mapping[int, Reading]) -> None:
        """Known ones that do not fit these windows are left aside."""
        self.width, self.num_windows = int(windows.length.max(initial=1)), len(windows)
        self.num_experts = [architecture.experts_in(layer) for layer in range(architecture.model.layers)]
        # Ascending; a generation's place among them is its row below.
        self._known = {generation: one for generation, one in sorted(known.items()) if self._fits(one)}
        # Of all known generations in one table, so that many cost no more steps than one. The last row, where a
        # reading says nothing, is padding.
        each = [*self._known.values(), Reading(torch.empty(0), torch.tensor([math.nan]), self._nobody())]
        self._costs_N = torch.cat([one.nats_N for one in each])
        layers = [_padded(layer) for layer in zip(*(one.experts_NK for one in each), strict=True)]
        self._experts_NK = [torch.cat(layer) for layer in layers]
        self._rows_GWS = self._rows()
        self._place = {generation: place for place, generation in enumerate(self._known)}
        self._parts: dict[int, list[Reading]] = {}

    def _fits(self, reading: Reading) -> bool:
        return not len(reading.places_N) or int(reading.places_N[-1]) < self.num_windows * self.width

    def _nobody(self) -> list[Tensor]:
        return [torch.full((1, 1), -1, dtype=torch.int16) for _ in self.num_experts]

    def _rows(self) -> Tensor:
        """Each place's row in the table for each known generation, ``(G, W, S)``; -1 where it says nothing."""
        kind = torch.int32 if len(self._costs_N) < 2**31 else torch.int64
        rows = torch.full((len(self._known), self.num_windows * self.width), -1, dtype=kind)
        first = 0
        for rows_N, one in zip(rows, self._known.values(), strict=True):
            rows_N[one.places_N] = torch.arange(first, first + len(one.places_N), dtype=kind)
            first += len(one.places_N)
        return rows.view(-1, self.num_windows, self.width)

    @property
    def known(self) -> list[int]:
        """Generations that need not read, ascending."""
        return [*self._known]

    def nats(self, generations: Sequence[int], places_B: Tensor, length: int) -> Tensor:
        """What targets cost known generations, float64 ``(G, B, length)``; not a number where one had no weight."""
        return self._costs_N[self._rows_of(generations, places_B, length)].double()

    def loads(self, generations: Sequence[int], places_B: Tensor, weights_GBS: Tensor) -> list[Tensor]:
        """Assignments by known generation, layer and expert, each token counted by a weight.

        Args:
            generations: Known ones.
            places_B: Places of the windows.
            weights_GBS: Of each position in each window, float64; 0 where it does not count.

        Returns:
            For each layer float64 ``(G, E)``.
        """
        counted_GBS = weights_GBS > 0
        rows_N = self._rows_of(generations, places_B, weights_GBS.shape[2])[counted_GBS]
        of_N1 = counted_GBS.nonzero()[:, :1]
        weights_N1 = weights_GBS[counted_GBS].unsqueeze(1)
        found = []
        for num_experts, ids_NK in zip(self.num_experts, self._experts_NK, strict=True):
            ids_TK = ids_NK[rows_N].long()
            loads = weights_GBS.new_zeros(len(generations) * num_experts)
            places_TK = of_N1 * num_experts + ids_TK.clamp_min(0)
            # In the order of the tokens, as one generation's loads are added up in Routing.loads_of.
            loads.scatter_add_(0, places_TK.flatten(), (weights_N1 * (ids_TK >= 0)).flatten())
            found.append(loads.view(-1, num_experts))
        return found

    def _rows_of(self, generations: Sequence[int], places_B: Tensor, length: int) -> Tensor:
        own = torch.tensor([self._place[one] for one in generations], dtype=torch.int64)
        return self._rows_GWS[own[:, None], places_B, :length]

    def note(
        self, generation: int, places_R: Tensor, has_weight_RP: Tensor, nats_RP: Tensor, made: ModelOutput
    ) -> None:
        """Keep what a generation made of some windows, where it had a weight."""
        row_N, column_N = has_weight_RP.nonzero(as_tuple=True)
        token_N = row_N * has_weight_RP.shape[1] + column_N
        places_N = places_R[row_N] * self.width + column_N
        experts = [one.expert_ids_TK[token_N].to("cpu", torch.int16) for one in made.routings]
        part = Reading(places_N, nats_RP[row_N, column_N].float(), experts)
        self._parts.setdefault(generation, []).append(part)

    def made(self) -> dict[int, Reading]:
        """Of the generations that did read, each with what was known of it."""
        return {
            generation: Reading.joined([*self._before(generation), *parts])
            for generation, parts in sorted(self._parts.items())
        }

    def _before(self, generation: int) -> list[Reading]:
        return [self._known[generation]] if generation in self._known else []


def reader_hashes(model: LanguageModel) -> list[str]:
    """For each generation a hash of all that what it says of a text depends on, and of older generations.

    What stages share counts for all of them: where a stage trains the trunk, no reading is found again.
    """
    architecture, places = model.architecture, model.places()
    shared = {"model": architecture.model.to_json(), "routing": architecture.routing.to_json()}
    tensors: list[list[tuple[str, Tensor]]] = [[] for _ in range(1 + len(architecture.generations))]
    named: Iterable[tuple[str, Tensor]] = (*model.named_parameters(), *model.named_buffers())
    for name, tensor in named:
        # Clusters choose generations where one is selected; a mixture does not ask them.
        if not name.startswith("document_clusters."):
            place = places.get(name)
            generation = TensorName.parse(name).generation if place is None else place.generation
            tensors[0 if generation is None else 1 + generation].append((name, tensor))
    digest, found = hashlib.sha256(content_key(shared).encode()), []
    for number, group in enumerate(tensors):
        for name, tensor in sorted(group, key=lambda one: one[0]):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        if number:
            found.append(digest.hexdigest())
    return found
