"""Skip, wait, continue or grow: the action of largest utility, from probes.

A probe is a short training on the new data: ``continue`` trains the experts that the data uses, with replay; ``grow``
trains new ones. Utility is the gain of the probe less the costs of forgetting, parameters and training.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from lifelong_moe.config.retraining.policy import DecisionConfig, GateConfig


class Action(StrEnum):
    """What to do with new data."""

    skip = "skip"
    """Train nothing, for good."""
    wait = "wait"
    """Train nothing yet: too little text for an answer."""
    continue_ = "continue"
    """Train on the experts that the data uses."""
    grow = "grow"
    """Add experts and train them."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Measurements of a probe on held-out text: nats per token, with 95 % bounds, infinite if there is too little text.

    The order of documents tells text from noise: a model can learn the frequencies of noise too, and gains by it as
    lastingly as by any text. So a probe is also scored on shuffled documents (`lifelong_moe.retraining.structure`).
    """

    gain: float
    """Loss of the champion minus that of the probe on new text."""
    gain_lower: float
    gain_upper: float
    structure: float
    """Lower bound of the probe's loss on shuffled new documents minus its loss on the same documents in order."""
    structure_upper: float
    forgetting: float
    """Highest upper bound, over the gate's pools of old distributions, of the probe's loss minus the champion's; 0
    without old distributions."""
    forgetting_lower: float
    """Highest lower bound of the same: at least so much is forgotten in one of the pools."""
    leak: float
    """Highest router leak of an old distribution: share of its tokens routed to later experts."""
    parameters_fraction: float
    """Parameters added, as a fraction of the champion's."""
    cost_fraction: float
    """Cost of the whole stage and its probes, as a fraction of the budget."""


@dataclass(frozen=True)
class Decision:
    """The chosen action and its reasons."""

    action: Action
    terms: dict[str, float]
    """Every number behind the choice, such as ``grow/gain``; utilities and their terms in nats per token."""
    reasons: list[str]
    """Sentences for the operator: on each action considered, warnings, and the choice."""
    way: int | None = None
    """Index of the best way to grow; None if none was tried."""


@dataclass(frozen=True)
class Obstacle:
    """Why an action cannot be taken."""

    words: str
    waits: bool = False
    """Whether more text might remove it: "cannot tell" is not "no"."""


def decide(
    *,
    continued: ProbeResult | None,
    grown: Sequence[tuple[str, ProbeResult]],
    drifted: bool,
    config: DecisionConfig,
    gate: GateConfig,
    untested: str | None = None,
) -> Decision:
    """Choose the action of largest utility; skipping has utility 0.

    ``gain - forgetting_weight max(0, forgetting - tolerance) - parameter_weight ΔP / P - cost_weight cost / budget``.
    An action is ruled out if its probe shows that the gain is under ``min_gain``, that order is worth less than
    ``min_structure`` (noise), or that the gate will refuse it. If bounds leave that open, or a number is missing, the
    decision is to wait, unless another action is worth taking or the utility is at most 0 even at its upper bound.

    Args:
        continued: Probe of continuing; None if it was not run.
        grown: Probes of growing, each with its name in words ("Growing by 4 experts"); empty without drift.
        drifted: Whether the new documents drifted, or no experts can train on; growing is considered only then.
        config: Prices and limits.
        gate: Limits of the gate that a candidate will meet.
        untested: Why drift could not be tested, in words; the text then waits and is not skipped.
    """
    way = _best_way(grown, config, gate) if drifted else None
    probes = {Action.continue_: continued, Action.grow: None if way is None else grown[way][1]}
    terms = {"drifted": float(drifted), "skip/utility": 0.0}
    reasons: list[str] = []
    best, highest = Action.skip, 0.0
    obstacles: list[Obstacle] = []
    if len(grown) > 1 and drifted:
        for i, (name, tried) in enumerate(grown):
            parts = utility_terms(tried, config)
            terms |= {f"way_{i + 1}/{term}": value for term, value in parts.items()}
            reasons.append(f"{name}: utility {parts['utility']:z.4f}{', the best of the ways to grow' * (i == way)}.")
    for action, probe in probes.items():
        if probe is None:
            continue
        parts = utility_terms(probe, config)
        terms |= {f"{action}/{name}": value for name, value in parts.items()}
        obstacle = _obstacle(probe, parts, config, gate)
        reasons.append(_summary(action, parts, obstacle))
        # Strictly greater: on a tie the cheaper action stays, and skipping is the cheapest.
        if obstacle is None and parts["utility"] > highest:
            best, highest = action, parts["utility"]
        obstacles.append(obstacle or Obstacle(f"the utility of what {action} brings is {parts['utility']:z.4f}"))
    open_ = [obstacle for obstacle in obstacles if obstacle.waits]
    open_ += [Obstacle(untested, waits=True)] if untested else []
    # Text is skipped for good only where bounds say so; any open question makes it wait for more of its kind.
    if best == Action.skip and open_:
        best, obstacles = Action.wait, open_
    if (taken := probes.get(best)) is not None:
        reasons += _warnings(taken, gate)
    return Decision(best, terms, [*reasons, _choice(best, highest, obstacles)], way)


def _best_way(grown: Sequence[tuple[str, ProbeResult]], config: DecisionConfig, gate: GateConfig) -> int | None:
    """Index of the way to grow with the largest utility; None if there is none.

    Ways without an obstacle come first, then open ones, then those ruled out; the first of equals wins.
    """

    def worth(i: int) -> tuple[int, float]:
        parts = utility_terms(grown[i][1], config)
        obstacle = _obstacle(grown[i][1], parts, config, gate)
        rank = 2 if obstacle is None else int(obstacle.waits)
        # NaN compares false with everything, and max() would keep whichever came first.
        return rank, parts["utility"] if math.isfinite(parts["utility"]) else -math.inf

    return max(range(len(grown)), key=worth, default=None)


def utility_terms(probe: ProbeResult, config: DecisionConfig) -> dict[str, float]:
    """The probe's measurements, the three costs, and ``utility``, in nats per token; NaN anywhere makes utility NaN."""
    forgetting_cost = config.forgetting_weight * max(0.0, probe.forgetting - config.tolerance)
    if math.isnan(probe.forgetting):  # max() would drop it
        forgetting_cost = math.nan
    parameter_cost = config.parameter_weight * probe.parameters_fraction
    budget_cost = config.cost_weight * probe.cost_fraction
    return {
        "gain": probe.gain,
        "gain_lower": probe.gain_lower,
        "gain_upper": probe.gain_upper,
        "structure": probe.structure,
        "structure_upper": probe.structure_upper,
        "forgetting": probe.forgetting,
        "forgetting_lower": probe.forgetting_lower,
        "leak": probe.leak,
        "forgetting_cost": forgetting_cost,
        "parameter_cost": parameter_cost,
        "budget_cost": budget_cost,
        "utility": probe.gain - forgetting_cost - parameter_cost - budget_cost,
    }


def _obstacle(
    probe: ProbeResult, parts: Mapping[str, float], config: DecisionConfig, gate: GateConfig
) -> Obstacle | None:
    """Why an action cannot be taken whatever its utility; None if it can."""
    # What is certain comes before what is open: text that is shown to be noise must not wait for more of it.
    if any(math.isnan(value) for value in dataclasses.astuple(probe)):
        return Obstacle("a number is missing", waits=True)
    if probe.structure_upper < config.min_structure:
        return Obstacle(
            f"the text is noise: reading it in order is worth at most {probe.structure_upper:z.3f} nats per token "
            f"(decision.min_structure={config.min_structure})"
        )
    for key, least in (("decision", config.min_gain), ("gate", gate.min_gain)):
        if probe.gain_upper < least:
            return Obstacle(f"the gain is at most {probe.gain_upper:z.4f} nats per token ({key}.min_gain={least})")
    if probe.forgetting_lower > gate.tolerance:
        return Obstacle(
            f"old text loses at least {probe.forgetting_lower:z.4f} nats per token in the probe alone, which the gate "
            f"will not let pass (gate.tolerance={gate.tolerance})"
        )
    if probe.leak > gate.max_leak:
        return Obstacle(
            f"{probe.leak:.0%} of old text goes to experts born after it, which the gate will not let pass "
            f"(gate.max_leak={gate.max_leak})"
        )
    return _open_question(probe, parts, config)


def _open_question(probe: ProbeResult, parts: Mapping[str, float], config: DecisionConfig) -> Obstacle | None:
    """What more text might answer; an obstacle for good where even the best case is worth less than it costs."""
    if math.isinf(probe.forgetting):
        return Obstacle("what old text loses cannot be told until more sources of it are held out", waits=True)
    worth = f"{probe.gain_lower:z.4f} to {probe.gain_upper:z.4f}"
    # The utility's upper bound: the largest gain that the bounds allow, with the least forgetting that they allow.
    least_cost = config.forgetting_weight * max(0.0, probe.forgetting_lower - config.tolerance)
    if parts["utility"] - probe.gain + probe.gain_upper - (least_cost - parts["forgetting_cost"]) <= 0:
        return Obstacle(f"whatever it gains ({worth} nats per token) is worth less than it costs")
    if math.isinf(probe.gain_lower):
        return Obstacle(
            "what it gains cannot be told: its held-out text is of too few sources, or mostly of one", waits=True
        )
    if probe.gain_lower < config.min_gain:
        return Obstacle(f"the gain may be {worth} nats per token (decision.min_gain={config.min_gain})", waits=True)
    if probe.structure < config.min_structure:
        return Obstacle(
            f"reading the text in order may be worth {probe.structure:z.3f} to {probe.structure_upper:z.3f} nats per "
            f"token (decision.min_structure={config.min_structure}), so it may be noise",
            waits=True,
        )
    return None


def _summary(action: Action, parts: Mapping[str, float], obstacle: Obstacle | None) -> str:
    verb = {Action.continue_: "Continuing", Action.grow: "Growing"}[action]
    text = (
        f"{verb} gains {parts['gain']:z.4f} nats per token; forgetting costs {parts['forgetting_cost']:z.4f}, "
        f"parameters {parts['parameter_cost']:z.4f}, training {parts['budget_cost']:z.4f}: "
        f"utility {parts['utility']:z.4f}"
    )
    if obstacle is None:
        return f"{text}."
    return f"{text}. {'Cannot be told yet' if obstacle.waits else 'Ruled out'}: {obstacle.words}."


def _warnings(probe: ProbeResult, gate: GateConfig) -> list[str]:
    """Warnings where the gate may refuse the candidate, though the probe's bounds leave it open."""
    # Only warnings: a probe is a fraction of the stage, which both gains and forgets more.
    found = []
    if probe.gain_lower < gate.min_gain:
        found.append(
            f"Warning: after its probe the gain may be as low as {probe.gain_lower:z.4f} nats per token; the gate asks "
            f"for {gate.min_gain:g} (gate.min_gain)."
        )
    if probe.forgetting > gate.tolerance:
        found.append(
            f"Warning: after its probe old text may have lost up to {probe.forgetting:z.4f} nats per token; the gate "
            f"lets {gate.tolerance:g} pass (gate.tolerance)."
        )
    return found


def _choice(best: Action, utility: float, obstacles: Sequence[Obstacle]) -> str:
    why = f": {obstacles[-1].words}" if obstacles else ""
    if best == Action.skip:
        return f"Skip: no action is worth more than nothing{why}."
    if best == Action.wait:
        return f"Wait: there is no answer yet{why}."
    return f"{best.capitalize()}: its utility of {utility:z.4f} is the largest."
