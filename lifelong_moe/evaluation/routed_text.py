"""A text whose tokens are coloured by their experts.

In one layer, a token's owner is the expert with the largest gate weight. In the whole model, it is the generation whose
experts have the largest gate weights, summed over layers, or in a mixture of generations the one that weighs most in
the prediction of the next token. In a tie the older one wins.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lifelong_moe.evaluation.probing import Observation, expert_names
from lifelong_moe.plan.architecture import Architecture


@dataclass(frozen=True)
class RoutedToken:
    """One token and its experts."""

    token_id: int
    text: str
    """Its part of the text; empty where it begins a character that the next token completes."""
    owner: int
    """Index in the owners of its :class:`RoutedText`."""
    experts: list[list[tuple[str, float]]]
    """For each layer shown, the chosen experts' names and gate weights, heaviest first."""
    generations: list[tuple[str, float]] = field(default_factory=list)
    """In a mixture the generations that predict the next token and their weights, heaviest first."""


@dataclass(frozen=True)
class RoutedText:
    """A text and the owners of its tokens."""

    owners: list[str]
    """Names of the experts of a layer, or of the stages."""
    layers: list[int]
    """Layers shown."""
    tokens: list[RoutedToken]
    layer: int | None = None
    """The layer whose experts own tokens; None if stages do."""
    is_mixture: bool = False
    """Whether the generations predict together."""

    @property
    def colours(self) -> list[str]:
        """A light colour ``#rrggbb`` for each owner, on which black text is legible."""
        return [_colour(index, len(self.owners)) for index in range(len(self.owners))]

    @property
    def rule(self) -> str:
        """The rule of ownership, as a sentence."""
        if self.layer is not None:
            return f"A token belongs to its heaviest expert of layer {self.layer}."
        if self.is_mixture:
            return "A token belongs to the stage whose generation weighs most in predicting the next one."
        return "A token belongs to the stage whose experts weigh most for it, over all layers."

    def begins(self) -> list[bool]:
        """For each token whether its owner is another one than that of the token before it."""
        owners = [token.owner for token in self.tokens]
        return [i == 0 or owner != owners[i - 1] for i, owner in enumerate(owners)]

    @property
    def counts(self) -> list[int]:
        """Tokens of each owner."""
        return np.bincount([token.owner for token in self.tokens], minlength=len(self.owners)).tolist()


def route_text(
    architecture: Architecture, seen: Observation, decode: Callable[[Sequence[int]], str], layer: int | None = None
) -> RoutedText:
    """Give each token of an observed text its owner.

    Args:
        architecture: Of the model that was observed.
        seen: One text.
        decode: Token ids to text.
        layer: One layer's experts; None for the stages that experts of all layers were born in.
    """
    layers = list(range(len(seen.expert_ids))) if layer is None else [layer]
    names = {shown: expert_names(architecture, shown) for shown in layers}
    if layer is None:
        owners = [generation.stage for generation in architecture.generations]
        shares_TG = seen.shares_TG
        owner_T = (
            _heaviest_stage(architecture, seen, owners) if shares_TG is None else shares_TG.argmax(axis=1).tolist()
        )
    else:
        owners = names[layer]
        heaviest_T1 = seen.weights[layer].argmax(axis=1, keepdims=True)
        # A token without experts (-1) is shown as the first one's, with an empty description.
        owner_T = np.take_along_axis(seen.expert_ids[layer], heaviest_T1, axis=1)[:, 0].clip(0).tolist()
    pieces = token_pieces(seen.token_ids_T.tolist(), decode)
    tokens = [
        RoutedToken(
            int(seen.token_ids_T[t]),
            pieces[t],
            owner_T[t],
            [_choices(seen, i, t, names[i]) for i in layers],
            _predictors(architecture, seen, t),
        )
        for t in range(len(seen))
    ]
    return RoutedText(owners, layers, tokens, layer, seen.shares_TG is not None)


def token_pieces(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """Cut a text into what each token adds to it; joined, the pieces are the whole text.

    A character may span tokens: the last of them gets it, those before get nothing. Each piece is decoded after the
    one before it, because some tokenizers drop a space at the beginning of what they decode.
    """
    pieces: list[str] = []
    before = done = 0
    for end in range(1, len(token_ids) + 1):
        text = decode(token_ids[before:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(token_ids):
            pieces.append("")
        else:
            pieces.append(text[len(decode(token_ids[before:done])) :])
            before, done = done, end
    return pieces


def describe(routed: RoutedText, token: RoutedToken) -> str:
    """A line a layer: the experts of a token with their gate weights; in a mixture first the generations."""
    lines = [*([token.generations] if token.generations else []), *token.experts]
    return "\n".join(", ".join(f"{name} {weight:.3f}" for name, weight in chosen) for chosen in lines)


def _heaviest_stage(architecture: Architecture, seen: Observation, owners: Sequence[str]) -> list[int]:
    """Index of each token's stage, by gate weight summed over layers."""
    weight_TO = np.zeros((len(seen), len(owners)))
    for layer, (ids_TK, weights_TK) in enumerate(zip(seen.expert_ids, seen.weights, strict=True)):
        # The extra last entry stands for -1, no expert, whose weight is 0.
        stage_E = np.array([*(owners.index(name) for name in architecture.expert_births(layer)), 0])
        for stage in range(len(owners)):
            weight_TO[:, stage] += np.where(stage_E[ids_TK] == stage, weights_TK, 0.0).sum(axis=1)
    return [int(owner) for owner in weight_TO.argmax(axis=1)]


def _predictors(architecture: Architecture, seen: Observation, token: int) -> list[tuple[str, float]]:
    if seen.shares_TG is None:
        return []
    names = [generation.stage for generation in architecture.generations]
    shares_G = seen.shares_TG[token]
    return [(names[g], float(shares_G[g])) for g in np.argsort(-shares_G, kind="stable") if shares_G[g] > 0]


def _choices(seen: Observation, layer: int, token: int, names: Sequence[str]) -> list[tuple[str, float]]:
    ids_K, weights_K = seen.expert_ids[layer][token], seen.weights[layer][token]
    order = [k for k in np.argsort(-weights_K, kind="stable") if ids_K[k] >= 0]
    return [(names[ids_K[k]], float(weights_K[k])) for k in order]


def _colour(index: int, num: int) -> str:
    """Hues evenly apart; neighbours also differ in lightness."""
    # Light and saturated enough that black text stays legible on every hue.
    channels = colorsys.hls_to_rgb(index / num, (0.72, 0.85)[index % 2], 0.75)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)
