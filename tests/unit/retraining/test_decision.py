from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from lifelong_moe.config.retraining.policy import DecisionConfig, GateConfig
from lifelong_moe.retraining.bounds import DocumentLosses, difference_bounds
from lifelong_moe.retraining.decision import Action, Decision, ProbeResult, decide, utility_terms

CONFIG = DecisionConfig(forgetting_weight=2.0, parameter_weight=0.1, cost_weight=0.05)
GATE = GateConfig(tolerance=0.02, max_leak=0.3)
GOOD = ProbeResult(
    gain=0.5, gain_lower=0.4, gain_upper=0.6, structure=2.0, structure_upper=3.0, forgetting=0.0, forgetting_lower=-0.1,
    leak=0.1, parameters_fraction=0.0, cost_fraction=0.2,
)  # fmt: skip
INFINITE = {"gain_lower": -math.inf, "gain_upper": math.inf, "structure": -math.inf, "structure_upper": math.inf}


def decided(continued: ProbeResult | None, *grown: ProbeResult, drifted: bool = True) -> Decision:
    named = [(f"Growing by {i}", probe) for i, probe in enumerate(grown)]
    return decide(continued=continued, grown=named, drifted=drifted, config=CONFIG, gate=GATE)


def test_utility_by_hand() -> None:
    probe = replace(GOOD, forgetting=0.06, parameters_fraction=0.3)
    # 0.5 - 2 * (0.06 - 0.01) - 0.1 * 0.3 - 0.05 * 0.2
    assert utility_terms(probe, CONFIG) == pytest.approx(
        {
            "gain": 0.5,
            "gain_lower": 0.4,
            "gain_upper": 0.6,
            "structure": 2.0,
            "structure_upper": 3.0,
            "forgetting": 0.06,
            "forgetting_lower": -0.1,
            "leak": 0.1,
            "forgetting_cost": 0.1,
            "parameter_cost": 0.03,
            "budget_cost": 0.01,
            "utility": 0.36,
        }
    )


@pytest.mark.parametrize("forgetting", [0.01, 0.0, -0.3])
def test_forgetting_within_the_tolerance_costs_nothing_and_less_than_none_earns_nothing(forgetting: float) -> None:
    assert utility_terms(replace(GOOD, forgetting=forgetting), CONFIG)["forgetting_cost"] == 0.0


def test_the_larger_utility_wins() -> None:
    grown = replace(GOOD, gain=0.6, gain_upper=0.7, parameters_fraction=0.5)  # 0.6 - 0.05 - 0.01 = 0.54 against 0.49
    assert decided(GOOD, grown).action == Action.grow
    assert decided(GOOD, replace(grown, parameters_fraction=1.5)).action == Action.continue_  # 0.44


def test_equal_utilities_go_to_the_smaller_action() -> None:
    assert decided(GOOD, GOOD).action == Action.continue_
    nothing = replace(GOOD, gain=0.02, gain_lower=0.015, gain_upper=0.03, cost_fraction=0.4)  # it costs what it gains
    assert decided(nothing, drifted=False).action == Action.skip


def test_growing_needs_drift() -> None:
    grown = replace(GOOD, gain=5.0)
    found = decided(GOOD, grown, drifted=False)
    assert found.action == Action.continue_ and found.terms["drifted"] == 0.0
    assert not any(name.startswith("grow/") for name in found.terms)
    assert decided(None, grown, drifted=False).action == Action.skip


def test_without_probes_there_is_nothing_to_do() -> None:
    found = decided(None)
    assert found.action == Action.skip and found.terms == {"drifted": 1.0, "skip/utility": 0.0}
    assert found.reasons == ["Skip: no action is worth more than nothing."]


def action(**changes: float) -> Action:
    return decided(replace(GOOD, **changes), drifted=False).action


def test_what_a_bound_rules_out_is_skipped_and_what_it_leaves_open_waits() -> None:
    assert action() == Action.continue_
    assert action(gain_lower=0.0101) == Action.continue_ and action(gain_lower=0.0099) == Action.wait
    assert action(gain=0.005, gain_lower=-0.1, gain_upper=0.0101) == Action.wait
    assert action(gain=0.005, gain_lower=-0.1, gain_upper=0.0099) == Action.skip
    assert action(structure=0.101) == Action.continue_ and action(structure=0.099) == Action.wait
    assert action(structure=-1.0, structure_upper=0.101) == Action.wait
    assert action(structure=-1.0, structure_upper=0.099) == Action.skip
    assert action(**INFINITE) == Action.wait


def test_what_reaches_a_limit_has_reached_it() -> None:
    assert action(gain_lower=0.01) == Action.continue_  # decision.min_gain, to be reached
    assert action(gain=0.005, gain_lower=-0.1, gain_upper=0.01, cost_fraction=0.0) == Action.wait
    assert action(structure=0.1) == Action.continue_ and action(structure=-1.0, structure_upper=0.1) == Action.wait
    assert action(forgetting=0.2, forgetting_lower=0.02) == Action.continue_  # gate.tolerance, which may be lost
    strict = replace(GATE, min_gain=0.6)
    assert decide(continued=GOOD, grown=[], drifted=False, config=CONFIG, gate=strict).action == Action.continue_
    exact = replace(GATE, min_gain=0.4)  # of the probe's lower bound: no warning
    found = decide(continued=GOOD, grown=[], drifted=False, config=CONFIG, gate=exact)
    assert not any("Warning" in reason for reason in found.reasons)


def test_what_costs_more_than_it_may_gain_is_skipped() -> None:
    assert action(forgetting=0.24) == Action.continue_ and action(forgetting=0.27) == Action.skip
    assert action(cost_fraction=9.0) == Action.continue_ and action(cost_fraction=10.5) == Action.skip
    # It may gain 0.6 at most: what costs 0.55 may still be worth it, but is not known to be.
    assert action(cost_fraction=11.0, gain_lower=0.0) == Action.wait
    assert action(cost_fraction=12.1, gain_lower=0.0) == Action.skip


def test_what_cannot_be_measured_is_no_noise_and_is_not_given_up() -> None:
    found = decided(replace(GOOD, **INFINITE), drifted=False)
    assert found.action == Action.wait and not any("noise" in reason for reason in found.reasons)
    assert found.reasons[-1].startswith("Wait: there is no answer yet: what it gains cannot be told")
    unknown = decided(replace(GOOD, forgetting=math.inf, forgetting_lower=-math.inf), drifted=False)
    assert unknown.action == Action.wait and "what old text loses cannot be told" in unknown.reasons[-1]


def test_what_could_not_be_tested_is_not_given_up() -> None:
    forgets = replace(GOOD, **INFINITE, forgetting=0.3, forgetting_lower=0.05)
    found = decide(continued=forgets, grown=[], drifted=False, config=CONFIG, gate=GATE, untested="nobody knows")
    assert found.action == Action.wait and found.reasons[-1] == "Wait: there is no answer yet: nobody knows."
    assert decided(forgets, drifted=False).action == Action.skip
    found = decide(continued=GOOD, grown=[], drifted=False, config=CONFIG, gate=GATE, untested="nobody knows")
    assert found.action == Action.continue_


def test_what_wide_bounds_on_old_text_cost_at_worst_gives_nothing_up() -> None:
    wide = replace(GOOD, gain=0.1, gain_lower=0.05, gain_upper=0.2, forgetting=0.5, forgetting_lower=-0.3)
    assert decided(wide, drifted=False).action == Action.skip  # certain to gain, and not worth its price
    assert decided(replace(wide, gain_lower=0.0), drifted=False).action == Action.wait


def test_one_action_that_is_certain_does_not_wait_for_another() -> None:
    assert decided(GOOD, replace(GOOD, gain=3.0, gain_upper=6.0, gain_lower=0.0)).action == Action.continue_
    assert decided(replace(GOOD, gain_lower=0.0), replace(GOOD, gain_upper=-1.0, gain=-2.0)).action == Action.wait


def test_what_the_gate_would_refuse_is_not_begun() -> None:
    assert action(forgetting=0.2, forgetting_lower=0.0199) == Action.continue_
    assert action(forgetting=0.2, forgetting_lower=0.0201) == Action.skip
    assert action(leak=0.3) == Action.continue_ and action(leak=0.31) == Action.skip
    strict = replace(GATE, min_gain=0.7)  # the gain is 0.6 at most
    found = decide(continued=GOOD, grown=[], drifted=False, config=CONFIG, gate=strict)
    assert found.action == Action.skip and "gate.min_gain=0.7" in found.reasons[-1]


def test_what_the_gate_may_refuse_is_said() -> None:
    found = decided(replace(GOOD, forgetting=0.021), drifted=False)
    assert found.action == Action.continue_ and found.reasons[1].startswith(
        "Warning: after its probe old text may have"
    )
    assert not any("Warning" in reason for reason in decided(replace(GOOD, forgetting=0.02)).reasons)
    strict = replace(GATE, min_gain=0.45)  # certain enough to begin, but not that the gate will pass it
    found = decide(continued=GOOD, grown=[], drifted=False, config=CONFIG, gate=strict)
    assert found.action == Action.continue_ and found.reasons[1].startswith(
        "Warning: after its probe the gain may be as low as 0.4000 nats per token; the gate asks for 0.45"
    )


def test_ways_to_grow_are_told_apart_by_their_place() -> None:
    """Two with the same words once shared a key, and the second was taken for both."""
    best, worse = replace(GOOD, gain=2.088, gain_upper=3.0), replace(GOOD, gain=2.014, gain_upper=3.0)
    named = [("Growing by 2", best), ("Growing by 2", worse)]
    for order, way in ((named, 0), (named[::-1], 1)):
        found = decide(continued=None, grown=order, drifted=True, config=CONFIG, gate=GATE)
        assert (found.action, found.way, found.terms["grow/gain"]) == (Action.grow, way, 2.088)
        assert {found.terms["way_1/gain"], found.terms["way_2/gain"]} == {2.088, 2.014}


def test_of_ways_to_grow_one_that_is_certain_comes_first() -> None:
    certain, open_, ruled_out = GOOD, replace(GOOD, gain=3.0, gain_lower=0.0, gain_upper=6.0), replace(GOOD, leak=0.9)
    assert decided(None, open_, ruled_out, certain).way == 2
    assert decided(None, ruled_out, open_).way == 1 and decided(None, ruled_out, open_).action == Action.wait


def test_what_is_ruled_out_leaves_the_choice_to_the_other() -> None:
    found = decided(GOOD, replace(GOOD, gain=3.0, gain_upper=3.5, structure=0.01, structure_upper=0.05))
    assert found.action == Action.continue_ and found.terms["grow/utility"] > found.terms["continue/utility"]
    assert found.reasons == [
        "Continuing gains 0.5000 nats per token; forgetting costs 0.0000, parameters 0.0000, training 0.0100: utility "
        "0.4900.",
        "Growing gains 3.0000 nats per token; forgetting costs 0.0000, parameters 0.0000, training 0.0100: utility "
        "2.9900. Ruled out: the text is noise: reading it in order is worth at most 0.050 nats per token "
        "(decision.min_structure=0.1).",
        "Continue: its utility of 0.4900 is the largest.",
    ]


@pytest.mark.parametrize("field", [field.name for field in fields(ProbeResult)])
def test_a_number_that_is_missing_decides_nothing(field: str) -> None:
    ill = replace(GOOD, **{"gain": 9.0, field: math.nan})
    assert decided(None, ill).action == Action.wait
    assert decided(GOOD, ill).action == Action.continue_


def test_terms_are_flat_numbers() -> None:
    terms = decided(GOOD, GOOD).terms
    names = list(utility_terms(GOOD, CONFIG))
    assert list(terms) == ["drifted", "skip/utility", *(f"{a}/{n}" for a in ("continue", "grow") for n in names)]
    assert all(type(value) is float for value in terms.values())


# Noise. A model that can learn which tokens are frequent and which follow one another reads text and noise.

VOCABULARY = 40


def bigram_losses(train: list[NDArray[np.int64]], heldout: list[NDArray[np.int64]]) -> DocumentLosses:
    """Losses of a bigram model that falls back to frequencies, trained on ``train``; uniform if that is empty."""
    pairs, first = np.zeros((VOCABULARY, VOCABULARY)), np.ones(VOCABULARY)
    for document in train:
        np.add.at(pairs, (document[:-1], document[1:]), 1.0)
        first += np.bincount(document, minlength=VOCABULARY)
    first /= first.sum()
    table = np.log((pairs + VOCABULARY * first) / (pairs.sum(axis=1, keepdims=True) + VOCABULARY))
    nats = [-table[document[:-1], document[1:]].sum() for document in heldout]
    return DocumentLosses(
        np.array(nats), np.array([len(d) - 1 for d in heldout]), [str(i) for i in range(len(heldout))]
    )


def probe(documents: list[NDArray[np.int64]], seed: int) -> ProbeResult:
    """Train on three quarters; the champion is a model that knows nothing."""
    train, heldout = documents[10:], documents[:10]
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(document) for document in heldout]
    after = bigram_losses(train, heldout)
    gain = -difference_bounds(after, bigram_losses([], heldout), level=0.05, resamples=200, seed=seed)
    order = -difference_bounds(after, bigram_losses(train, shuffled), level=0.05, resamples=200, seed=seed)
    return replace(GOOD, gain=gain.mean, gain_lower=gain.lower, gain_upper=gain.upper, structure=order.lower,
                   structure_upper=order.upper, parameters_fraction=0.2)  # fmt: skip


def draw_documents(rng: np.random.Generator, order: bool) -> list[NDArray[np.int64]]:
    """Skewed token frequencies, different in each document; with ``order``, tokens also prefer some successors."""
    ranks = np.arange(1, VOCABULARY + 1)
    successors = rng.integers(0, VOCABULARY, size=VOCABULARY)
    documents = []
    for _ in range(40):
        frequencies = 1 / ranks * rng.uniform(0.5, 2.0, size=VOCABULARY)
        document = rng.choice(VOCABULARY, size=200, p=frequencies / frequencies.sum())
        for place in range(1, 200) if order else ():
            if rng.random() < 0.6:
                document[place] = successors[document[place - 1]]
        documents.append(document)
    return documents


def test_noise_is_skipped_although_its_loss_can_be_lowered() -> None:
    for seed in range(20):
        found = probe(draw_documents(np.random.default_rng(seed), order=False), seed)
        assert found.gain_lower > 0.3  # its frequencies are learned, and stay learned
        assert -0.2 < found.structure < 0.05
        decision = decided(found, found)
        assert decision.action == Action.skip and decision.terms["grow/utility"] > 0.3
        assert sum("the text is noise" in reason for reason in decision.reasons[:-1]) == 2
        assert decision.reasons[-1].startswith("Skip: no action is worth more than nothing: the text is noise")


def test_text_with_order_is_not_taken_for_noise() -> None:
    for seed in range(20):
        found = probe(draw_documents(np.random.default_rng(seed), order=True), seed)
        assert found.structure > 0.8
        assert decided(None, found).action == Action.grow
