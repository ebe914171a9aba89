"""The arms of a comparison by how well they end. Pure: ``comparison.json`` in, places out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lifelong_moe.reports.verdict import Outcome, gaps, is_clear, listed, mean_loss, outcome_of_arm

MOST_TIED = 3
"""Arms that the sentence names; of more it tells the number."""


@dataclass(frozen=True)
class Ranked:
    """An arm and its place."""

    name: str
    place: int
    """From 1 on."""
    bits_per_byte: float
    """Mean over distributions and seeds, after the last stage."""
    is_tied: bool
    """Whether it is not clearly worse than the first one, as a verdict judges: its difference lies in the noise."""


def ranking(comparison: Mapping[str, Any]) -> list[Ranked]:
    """Arms with results, the lowest loss first; none that was measured on other distributions than the reference."""
    outcomes = [found for arm in comparison["arms"] if (found := outcome_of_arm(arm)) is not None]
    measured = next((set(one.final) for one in outcomes if one.name == comparison["reference"]), None)
    # Before the reference has a result, the first arm says what is measured.
    comparable = [one for one in outcomes if set(one.final) == (measured or set(outcomes[0].final))]
    order = sorted(comparable, key=_level)
    return [Ranked(one.name, i, _level(one), not is_clear(gaps(mean_loss(one), mean_loss(order[0]))))
            for i, one in enumerate(order, start=1)]  # fmt: skip


def best(ranked: Sequence[Ranked]) -> list[str]:
    """A sentence on the arm that ends best, and on those that are as good; none if there is nothing to rank."""
    if len(ranked) < 2:
        return []
    first, *others = ranked
    tied = [one.name for one in others if one.is_tied]
    sentence = f"Best at the end: {first.name}, {first.bits_per_byte:.3f} bits per byte in the mean"
    if not tied:
        return [f"{sentence}; the next one, {others[0].name}, is clearly worse."]
    who = listed(tied) if len(tied) <= MOST_TIED else f"{len(tied)} others"
    return [f"{sentence}; {who} {'is' if len(tied) == 1 else 'are'} within the noise of it."]


def _level(one: Outcome) -> float:
    return fmean(mean_loss(one).values())
