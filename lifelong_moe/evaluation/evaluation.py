"""The measurement of a model's loss on one distribution, as it is stored and reported. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

EVALUATION_SCHEMA = 2
"""Version of the measurement; a change invalidates every stored evaluation."""


@dataclass(frozen=True)
class Evaluation:
    """The measurement of one distribution."""

    nats_per_token: float
    """Mean cross-entropy of the scored tokens; where stages add tokens, by those of the first vocabulary."""
    bits_per_byte: float
    """Total cross-entropy in bits over the UTF-8 bytes of the source text."""
    tokens: int
    """Tokens scored."""
    bytes: int
    """UTF-8 bytes of their text."""
    documents: int
    """Documents that they come from."""
    expert_counts: list[list[float]]
    """Assignments of scored tokens per layer and expert; a mixture counts those of each generation by its weight."""
    shares: list[float] = field(default_factory=list)
    """Mean weight of each generation in a mixture of them, oldest first; empty without a mixture."""
    readers: float = 1.0
    """Generations that a token is predicted by, in the mean."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        return dict(vars(self))


def per_token_of(found: Evaluation, tokens: int) -> Evaluation:
    """The same loss by the tokens of another vocabulary, so that losses of models with different ones compare.

    Args:
        found: Of the same text.
        tokens: Scored tokens of the other vocabulary.
    """
    return replace(found, nats_per_token=found.nats_per_token * found.tokens / tokens, tokens=tokens)
