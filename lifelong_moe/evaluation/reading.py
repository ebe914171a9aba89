"""Held-out windows as a model predicts them: by a generation that is selected for each token, or by a mixture of all.

Legend: B windows of a batch, S positions, R of the windows, P of the positions, G generations, E experts, D model
width, V vocabulary, T scored tokens of the batch in reading order of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lifelong_moe.config.routing.mixture import MixtureConfig
from lifelong_moe.data.tokens.windows import EvaluationSet
from lifelong_moe.evaluation.readings import Readings
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel, ModelOutput
from lifelong_moe.ops.posterior import log_weights

FIRST = 32
"""Positions of a text that every generation reads before those that have no weight left are spared the rest."""

Arrays = dict[str, Tensor]


@dataclass
class Member:
    """What one member of the mixture made of some windows of a batch; a selected generation is the only member."""

    windows_R: Tensor
    """The windows that it read, int64 places in the batch."""
    domain_ids_RP: Tensor
    """Generation, or other domain, of each token that it read."""
    output: ModelOutput
    weights_RP: Tensor
    """Its weight in the prediction of each target, float64, or bool where it is selected; 0 where another window scores
    the target."""


@dataclass
class WindowBatch:
    """Some windows of a set, and what each member of the mixture made of them."""

    places_B: NDArray[np.int64]
    """The windows' places in the set."""
    arrays: Arrays
    """Their tokens ``(B, S)``; see :meth:`lifelong_moe.data.tokens.windows.EvaluationSet.batch`."""
    members: list[Member]
    """Those that read; a selected generation has all of the weight. Without known readings there is at least one."""
    nats_T: Tensor
    """Loss of each scored token, float64."""
    weights_TG: Tensor | None = None
    """Weight of each generation in the prediction of each scored token, float64; None where one is selected."""
    known_loads: Sequence[Tensor] = ()
    """Of the members that need not read, float64 ``(members, E)`` for each layer; empty if there are none."""

    @cached_property
    def shares(self) -> list[tuple[Member, Tensor, Tensor]]:
        """Each member with the scored tokens that it has a weight in.

        Returns:
            The member, which of its own tokens these are, bool ``(R, P)``, and which of the batch's, int64 places in T.
        """
        found = []
        scored_BS = self.arrays["scored"]
        number_BS = scored_BS.flatten().cumsum(0).view_as(scored_BS) - 1
        for member in self.members:
            here, width = member.windows_R, member.weights_RP.shape[1]
            has_part_RP = scored_BS[here, :width] & (member.weights_RP > 0)
            found.append((member, has_part_RP, number_BS[here, :width][has_part_RP]))
        return found

    def tokens(self, windows: EvaluationSet) -> NDArray[np.int64]:
        """The token before each scored target, as a place in the set's shard ``(T,)``; each stands in one batch."""
        rows, columns = (place.cpu().numpy() for place in self.arrays["scored"].nonzero(as_tuple=True))
        first_B = windows.shard.offsets[windows.document[self.places_B]] + windows.start[self.places_B] - 1
        return first_B[rows] + columns

    def loads(self) -> list[Tensor]:
        """Assignments of scored tokens by layer and expert, ``(E,)``: float64 by the members' weights, or int64."""
        parts = [
            [one.loads_of((has_part_RP * member.weights_RP).flatten()).unsqueeze(0) for one in member.output.routings]
            for member, has_part_RP, _ in self.shares
        ]
        known = [[*self.known_loads]] if self.known_loads else []
        return [torch.cat(layer).sum(dim=0) for layer in zip(*parts, *known, strict=True)]

    def log_probabilities(self, model: LanguageModel, part_T: Tensor) -> Tensor:
        """Log probabilities of all next tokens, for some of the scored tokens, float32 ``(len(part_T), V)``.

        Args:
            model: That read the windows.
            part_T: Which, int64 ascending places in T.
        """
        mixed = torch.full((len(part_T), model.architecture.num_tokens), -math.inf, device=self.nats_T.device)
        for member, has_part_RP, places in self.shares:
            wanted = torch.isin(places, part_T)
            if not bool(wanted.any()):
                continue
            hidden_ND = member.output.hidden_BSD[has_part_RP][wanted]
            logits_NV = model.head.logits(hidden_ND, member.domain_ids_RP[has_part_RP][wanted])
            logs_N1 = member.weights_RP[has_part_RP][wanted].log().float().unsqueeze(1)
            rows = torch.searchsorted(part_T, places[wanted])
            mixed[rows] = torch.logaddexp(mixed[rows], logits_NV.float().log_softmax(dim=-1) + logs_N1)
        return mixed


@torch.no_grad()
def read_windows(
    model: LanguageModel,
    windows: EvaluationSet,
    *,
    distribution: str | None,
    batch_tokens: int,
    readings: Readings | None = None,
) -> Iterator[WindowBatch]:
    """Read held-out windows in evaluation mode, batch by batch.

    A mixture's weights for a target depend on the tokens before it alone, also on those in earlier windows of its text.

    Args:
        model: On any device; left in the mode it was in.
        windows: Of any order; each is in one batch.
        distribution: The text's distribution if it is known; only routing by label looks at it.
        batch_tokens: Tokens a forward pass, or those of one window if it is longer.
        readings: What generations of a mixture said of these windows before; what others say is added. Of the members
            that are known, losses and loads can be asked, and no hidden states.
    """
    mixture = model.architecture.mixture
    if mixture is None:
        yield from _selected(model, windows, distribution, batch_tokens)
    else:
        with _evaluating(model):
            yield from _mixed(_Texts(model, windows, mixture, readings), windows, batch_tokens)


@torch.no_grad()
def forward_selected(
    model: LanguageModel, windows: EvaluationSet, *, distribution: str | None, batch_tokens: int
) -> Iterator[tuple[NDArray[np.int64], Arrays, ModelOutput]]:
    """Run windows through the generations that are selected for their tokens; arguments as for :func:`read_windows`.

    Yields:
        Places of consecutive windows, their arrays, and what the model made of them.
    """
    windows = replace(windows, domain_ids=model.domain_ids(windows.shard, distribution))
    with _evaluating(model):
        for places_B in _batches(windows, np.arange(len(windows)), batch_tokens):
            arrays = _arrays(model, windows, places_B)
            yield places_B, arrays, _forward(model, arrays, arrays["domain_ids"])


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """In evaluation mode; training may continue with the model."""
    # Not set again where it is so already: that takes a step for each module of each generation.
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


def _selected(
    model: LanguageModel, windows: EvaluationSet, distribution: str | None, batch_tokens: int
) -> Iterator[WindowBatch]:
    passes = forward_selected(model, windows, distribution=distribution, batch_tokens=batch_tokens)
    for places_B, arrays, output in passes:
        scored, domain_ids = arrays["scored"], arrays["domain_ids"]
        nats_T = model.head.token_nats(output.hidden_BSD[scored], arrays["target_ids"][scored], domain_ids[scored])
        all_B = torch.arange(len(places_B), device=scored.device)
        member = Member(all_B, domain_ids, output, arrays["evidence"])
        yield WindowBatch(places_B, arrays, [member], nats_T.double())


def _batches(windows: EvaluationSet, places: NDArray[np.int64], batch_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Windows in order, as many at a time as the tokens of a pass allow, and at least one."""
    first = 0
    while first < len(places):
        rows = max(1, batch_tokens // int(windows.length[places[first]]))
        yield places[first : first + rows]
        first += rows


def _arrays(model: LanguageModel, windows: EvaluationSet, places_B: NDArray[np.int64]) -> Arrays:
    device = model.embedding.weight.device
    return {name: torch.from_numpy(array).to(device) for name, array in windows.batch(places_B).items()}


def _forward(model: LanguageModel, arrays: Arrays, domain_ids: Tensor) -> ModelOutput:
    token_ids = arrays["token_ids"]
    # A window holds one document.
    return model(TokenBatch(token_ids, torch.zeros_like(token_ids), domain_ids, arrays["valid"]))


def _mixed(texts: _Texts, windows: EvaluationSet, batch_tokens: int) -> Iterator[WindowBatch]:
    # A text's windows one after another: what the earlier ones say decides the weights in the later ones.
    for number in range(int(texts.number_W.max(initial=-1)) + 1):
        for places_B in _batches(windows, np.flatnonzero(texts.number_W == number), batch_tokens):
            yield texts.read(places_B)


@dataclass
class _Hearing:
    """Windows of a batch while generations read them."""

    places_B: NDArray[np.int64]
    arrays: Arrays
    evidence_BS: Tensor
    """As in ``arrays``, on the CPU, where weights are computed."""
    nats_BSG: Tensor
    """What each target costs each generation, float64; not a number where that is not known."""
    until_BG: Tensor
    """Positions that each generation has read itself; 0 where it has not, though a reading may know its costs."""
    members: list[Member]

    @classmethod
    def of(cls, places_B: NDArray[np.int64], arrays: Arrays, left_BG: Tensor) -> _Hearing:
        """Before anybody read."""
        evidence_BS = arrays["evidence"].cpu()
        shape = *evidence_BS.shape, left_BG.shape[1]
        nats_BSG = torch.full(shape, math.nan, dtype=torch.float64)
        return cls(places_B, arrays, evidence_BS, nats_BSG, torch.zeros_like(left_BG, dtype=torch.int64), [])

    @property
    def length(self) -> int:
        """Positions of the longest window."""
        return self.evidence_BS.shape[1]

    def lacking(self, weights_BSG: Tensor) -> Tensor:
        """Which generations have a weight, in the first positions, beyond what is known of them, bool ``(B, G)``."""
        beyond_BSG = (weights_BSG > 0) & self.nats_BSG[:, : weights_BSG.shape[1]].isnan()
        return beyond_BSG.any(dim=1) & (self.until_BG == 0)


class _Texts:
    """Texts as far as they have been read: which generations are left, and how likely each found them."""

    def __init__(
        self, model: LanguageModel, windows: EvaluationSet, mixture: MixtureConfig, readings: Readings | None
    ) -> None:
        self.model, self.windows, self.mixture, self.readings = model, windows, mixture, readings
        self.text_W, self.number_W = windows.texts()
        shape = int(self.text_W.max(initial=-1)) + 1, len(model.architecture.generations)
        self.alive = torch.ones(shape, dtype=torch.bool)
        self.nats = torch.zeros(shape, dtype=torch.float64)
        """What the text so far cost each generation; those that are out, only as far as they read it."""

    def read(self, places_B: NDArray[np.int64]) -> WindowBatch:
        """Read some windows, no two of one text."""
        arrays, text_B = _arrays(self.model, self.windows, places_B), torch.from_numpy(self.text_W[places_B])
        left_BG = self.alive[text_B]
        now = _Hearing.of(places_B, arrays, left_BG)
        known = self._recall(now, left_BG)
        known_G = torch.zeros_like(left_BG[0]).index_fill(0, torch.tensor(known, dtype=torch.int64), True)
        is_long = now.length > 2 * FIRST and bool((left_BG.sum(dim=1) > 1).any())
        for width in (FIRST, now.length) if is_long else (now.length,):
            self._pass(now, left_BG & ~known_G, width)
            weights_BSG, left_BG = self._weigh(now, width)
            # A reading may end too early: whoever left the generation out then may now be left out before.
            while bool((lacking_BG := now.lacking(weights_BSG)).any()):
                self._pass(now, lacking_BG, now.length)
                weights_BSG, left_BG = self._weigh(now, width)
        self.alive[text_B] = left_BG
        self.nats[text_B] += now.nats_BSG.nan_to_num().sum(dim=1)
        for member in now.members:
            here, generation = member.windows_R.cpu(), int(member.domain_ids_RP[0, 0])
            weights_RP = weights_BSG[here, : member.weights_RP.shape[1], generation]
            # What was read again to the end counts there.
            weights_RP = weights_RP * (now.until_BG[here, generation, None] == weights_RP.shape[1])
            member.weights_RP = weights_RP.to(member.weights_RP.device)
            if self.readings is not None:
                costs_RP = now.nats_BSG[here, : weights_RP.shape[1], generation]
                places_R = torch.from_numpy(places_B)[here]
                self.readings.note(generation, places_R, weights_RP > 0, costs_RP, member.output)
        scored_BS, device = arrays["scored"].cpu(), arrays["scored"].device
        loads = self._known_loads(known, now, weights_BSG, scored_BS)
        weights_TG = weights_BSG[scored_BS]
        # Without a weight the cost is not a number, either.
        logs_TG = (weights_TG.log() - now.nats_BSG[scored_BS]).nan_to_num(-math.inf, neginf=-math.inf)
        nats_T = -logs_TG.logsumexp(dim=1)
        return WindowBatch(places_B, arrays, now.members, nats_T.to(device), weights_TG.to(device), loads)

    def _recall(self, now: _Hearing, left_BG: Tensor) -> list[int]:
        """Note what windows cost the known generations; returns these, but those that are left in no window."""
        if self.readings is None:
            return []
        is_left_G = left_BG.any(dim=0).tolist()
        known = [generation for generation in self.readings.known if is_left_G[generation]]
        costs_GBS = self.readings.nats(known, torch.from_numpy(now.places_B), now.length)
        now.nats_BSG[:, :, known] = costs_GBS.permute(1, 2, 0).masked_fill(~now.evidence_BS.unsqueeze(2), math.nan)
        return known

    def _known_loads(self, known: list[int], now: _Hearing, weights_BSG: Tensor, scored_BS: Tensor) -> list[Tensor]:
        """Assignments by generations that need not read and have a weight, ``(members, E)`` for each layer."""
        # Of all generations at once: a step for each of fifty would cost more than the newest one's reading.
        has_weight_G = ((weights_BSG > 0).any(dim=1) & (now.until_BG == 0)).any(dim=0).tolist()
        members = [generation for generation in known if has_weight_G[generation]]
        if self.readings is None or not members:
            return []
        counts_BSG = scored_BS.unsqueeze(2) & (now.until_BG[:, members] == 0).unsqueeze(1)
        own_GBS = (weights_BSG[:, :, members] * counts_BSG).permute(2, 0, 1)
        loads = self.readings.loads(members, torch.from_numpy(now.places_B), own_GBS)
        return [layer.to(now.arrays["scored"].device) for layer in loads]

    def _pass(self, now: _Hearing, asked_BG: Tensor, width: int) -> None:
        """Let generations read the first positions of some windows each, and note what they cost."""
        for generation in asked_BG.any(dim=0).nonzero().flatten().tolist():
            here = asked_BG[:, generation].nonzero().squeeze(1)
            part = {name: array[here.to(array.device), :width] for name, array in now.arrays.items()}
            domain_ids, heard = torch.full_like(part["token_ids"], generation), part["evidence"]
            output = _forward(self.model, part, domain_ids)
            nats = self.model.head.token_nats(output.hidden_BSD[heard], part["target_ids"][heard], domain_ids[heard])
            cost_RP = torch.full(heard.shape, math.nan, dtype=torch.float64)
            cost_RP[heard.cpu()] = nats.double().cpu()
            now.nats_BSG[here, :width, generation] = cost_RP
            now.until_BG[here, generation] = width
            no_weight_RP = torch.zeros_like(domain_ids, dtype=torch.float64)
            now.members.append(Member(here.to(heard.device), domain_ids, output, no_weight_RP))

    def _weigh(self, now: _Hearing, width: int) -> tuple[Tensor, Tensor]:
        """Weights in each prediction of the first positions, ``(B, width, G)``, and the generations that are left
        afterwards ``(B, G)``."""
        weights_BSG = torch.zeros_like(now.nats_BSG[:, :width])
        left_BG = self.alive[self.text_W[now.places_B]].clone()
        for row, place in enumerate(now.places_B):
            heard, text = now.evidence_BS[row, :width].nonzero().squeeze(1), self.text_W[place]
            nats_TG = now.nats_BSG[row, heard]
            costs_TG = nats_TG.nan_to_num()
            score_TG = -self.mixture.likelihood * (self.nats[text] + costs_TG.cumsum(dim=0) - costs_TG)
            # Who stopped reading was out by then. Where a reading ends, weights must say whether it was.
            score_TG = score_TG.masked_fill(nats_TG.isnan() & (now.until_BG[row] > 0), -math.inf)
            logs_TG, left_BG[row] = log_weights(score_TG, left_BG[row], self.mixture.drop)
            weights_BSG[row, heard] = logs_TG.exp()
        return weights_BSG, left_BG
