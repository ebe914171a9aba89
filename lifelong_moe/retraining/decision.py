"""Skip, continue or grow? What two probes gained, less what they forgot, added and would cost.

A probe is a short training on the new data: ``continue`` trains the experts that the data uses, with replay; ``grow``
trains new ones. Noise can be learned as well, as far as its frequencies go, and then gains as lastingly as any text.
What it does not have is order, so each probe is also scored on the new documents shuffled
(`lifelong_moe.retraining.structure`), and what order is worth to it is a term, ``structure``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from lifelong_moe.retraining.config import DecisionConfig


class Action(StrEnum):
    """What to do with new data."""

    skip = "skip"
    continue_ = "continue"
    grow = "grow"


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a probe showed on held-out text. Losses are in nats per token, bounds hold with 95 % confidence."""

    gain: float
    """Loss of the champion minus that of the probe on new text."""
    gain_lower: float
    """Lower bound of it."""
    structure: float
    """Lower bound of the probe's loss on new documents that were shuffled, minus its loss on them as they are."""
    forgetting: float
    """Highest upper bound, over old distributions, of the probe's loss minus the champion's; 0 if there is none."""
    parameters_fraction: float
    """Parameters added, in units of those there are."""
    cost_fraction: float
    """Cost of the stage that the probe stands for, in units of the budget."""


@dataclass(frozen=True)
class Decision:
    """What to do and why."""

    action: Action
    terms: dict[str, float]
    """Every number that counted, such as ``grow/gain``; utilities and what they are made of in nats per token."""
    reasons: list[str]
    """For a person: a sentence on each action that was considered, and one on the choice."""
    way: str = ""
    """Which of several ways to grow was the best."""


def decide(
    *, continued: ProbeResult | None, grown: Mapping[str, ProbeResult], drifted: bool, config: DecisionConfig
) -> Decision:
    """Choose the action of largest utility; skipping has 0, and wins a tie as the cheaper action does.

    ``gain - forgetting_weight max(0, forgetting - tolerance) - parameter_weight ΔP / P - cost_weight cost / budget``.
    An action is ruled out where the gain may be under ``min_gain``, where order is worth less than ``min_structure``
    (noise), or where a number is missing. Without drift growing is not considered.

    Args:
        continued: Probe that continued the experts there are; None if it was not made.
        grown: Probes with new experts, by a name in words ("Growing by 4 experts"); none without drift.
        drifted: Whether the new documents come from elsewhere.
        config: Prices and limits.
    """
    way = _best_way(grown, config) if drifted else ""
    probes = {Action.continue_: continued, Action.grow: grown.get(way)}
    terms = {"drifted": float(drifted), "skip/utility": 0.0}
    reasons = [] if drifted else ["Growing is not considered: the new data did not drift."]
    best, highest = Action.skip, 0.0
    obstacles: list[str] = []
    if len(grown) > 1 and drifted:
        for name, tried in grown.items():
            parts = utility_terms(tried, config)
            terms |= {f"{_slug(name)}/{term}": value for term, value in parts.items()}
            reasons.append(f"{name}: utility {parts['utility']:.4f}{', the best of the ways to grow' * (name == way)}.")
    for action, probe in probes.items():
        if probe is None:
            continue
        parts = utility_terms(probe, config)
        terms |= {f"{action}/{name}": value for name, value in parts.items()}
        obstacle = _obstacle(probe, parts["utility"], config)
        obstacles.append(obstacle or f"the utility of what {action} brings is {parts['utility']:.4f}")
        reasons.append(_account(action, parts, obstacle))
        if obstacle is None and parts["utility"] > highest:
            best, highest = action, parts["utility"]
    return Decision(best, terms, [*reasons, _choice(best, highest, obstacles)], way)


def _best_way(grown: Mapping[str, ProbeResult], config: DecisionConfig) -> str:
    """The way to grow of largest utility, ruled-out ones last; of equals the first. Empty if there is none."""

    def worth(name: str) -> tuple[bool, float]:
        utility = utility_terms(grown[name], config)["utility"]
        return _obstacle(grown[name], utility, config) is None, utility if math.isfinite(utility) else -math.inf

    return max(grown, key=worth, default="")


def _slug(name: str) -> str:
    """A name that may stand in a metric's."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def utility_terms(probe: ProbeResult, config: DecisionConfig) -> dict[str, float]:
    """The probe's numbers, what each costs, and ``utility``: gain less the three costs; nats per token.

    NaN anywhere makes the utility NaN.
    """
    forgetting_cost = config.forgetting_weight * max(0.0, probe.forgetting - config.tolerance)
    if math.isnan(probe.forgetting):  # max() would drop it
        forgetting_cost = math.nan
    parameter_cost = config.parameter_weight * probe.parameters_fraction
    budget_cost = config.cost_weight * probe.cost_fraction
    return {
        "gain": probe.gain,
        "gain_lower": probe.gain_lower,
        "structure": probe.structure,
        "forgetting": probe.forgetting,
        "forgetting_cost": forgetting_cost,
        "parameter_cost": parameter_cost,
        "budget_cost": budget_cost,
        "utility": probe.gain - forgetting_cost - parameter_cost - budget_cost,
    }


def _obstacle(probe: ProbeResult, utility: float, config: DecisionConfig) -> str | None:
    """Why an action is ruled out whatever its utility. Conditions are such that NaN does not fulfil them."""
    if not probe.structure >= config.min_structure:
        return (
            f"the text is noise: reading it in order is worth only {probe.structure:.3f} nats per token "
            f"(decision.min_structure={config.min_structure})"
        )
    if not probe.gain_lower >= config.min_gain:
        return f"the gain may be as low as {probe.gain_lower:.4f} nats per token (decision.min_gain={config.min_gain})"
    return None if math.isfinite(utility) else "a number is missing"


def _account(action: Action, parts: dict[str, float], obstacle: str | None) -> str:
    verb = {Action.continue_: "Continuing", Action.grow: "Growing"}[action]
    text = (
        f"{verb} gains {parts['gain']:.4f} nats per token; forgetting costs {parts['forgetting_cost']:.4f}, parameters "
        f"{parts['parameter_cost']:.4f}, training {parts['budget_cost']:.4f}: utility {parts['utility']:.4f}"
    )
    return f"{text}. Ruled out: {obstacle}." if obstacle else f"{text}."


def _choice(best: Action, utility: float, obstacles: list[str]) -> str:
    if best == Action.skip:
        why = f": {obstacles[-1]}" if obstacles else ""
        return f"Skip: no action is worth more than nothing{why}."
    return f"{best.capitalize()}: its utility of {utility:.4f} is the largest."
