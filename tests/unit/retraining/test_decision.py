from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from lifelong_moe.retraining.bounds import DocumentLosses, difference
from lifelong_moe.retraining.config import DecisionConfig
from lifelong_moe.retraining.decision import Action, ProbeResult, decide, utility_terms

CONFIG = DecisionConfig(forgetting_weight=2.0, parameter_weight=0.1, cost_weight=0.05)
GOOD = ProbeResult(gain=0.5, gain_lower=0.4, structure=2.0, forgetting=0.0, parameters_fraction=0.0, cost_fraction=0.2)


def test_utility_by_hand() -> None:
    probe = replace(GOOD, forgetting=0.06, parameters_fraction=0.3)
    # 0.5 - 2 * (0.06 - 0.01) - 0.1 * 0.3 - 0.05 * 0.2
    assert utility_terms(probe, CONFIG) == pytest.approx(
        {
            "gain": 0.5,
            "gain_lower": 0.4,
            "structure": 2.0,
            "forgetting": 0.06,
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
    grown = replace(GOOD, gain=0.6, parameters_fraction=0.5)  # 0.6 - 0.05 - 0.01 = 0.54 against 0.49
    assert decide(continued=GOOD, grown={"Growing": grown}, drifted=True, config=CONFIG).action == Action.grow
    dear = replace(grown, parameters_fraction=1.5)  # 0.44
    assert decide(continued=GOOD, grown={"Growing": dear}, drifted=True, config=CONFIG).action == Action.continue_


def test_equal_utilities_go_to_the_smaller_action() -> None:
    assert decide(continued=GOOD, grown={"Growing": GOOD}, drifted=True, config=CONFIG).action == Action.continue_
    nothing = replace(GOOD, gain=0.01)  # its cost is 0.01
    assert decide(continued=nothing, grown={}, drifted=True, config=CONFIG).action == Action.skip


def test_growing_needs_drift() -> None:
    grown = replace(GOOD, gain=5.0)
    found = decide(continued=GOOD, grown={"Growing": grown}, drifted=False, config=CONFIG)
    assert found.action == Action.continue_ and found.terms["drifted"] == 0.0
    assert not any(name.startswith("grow/") for name in found.terms)
    assert found.reasons[0] == "Growing is not considered: the new data did not drift."
    assert decide(continued=None, grown={"Growing": grown}, drifted=False, config=CONFIG).action == Action.skip


def test_without_probes_there_is_nothing_to_do() -> None:
    found = decide(continued=None, grown={}, drifted=True, config=CONFIG)
    assert found.action == Action.skip and found.terms == {"drifted": 1.0, "skip/utility": 0.0}
    assert found.reasons == ["Skip: no action is worth more than nothing."]


def test_each_condition_rules_out_what_it_should() -> None:
    def action(**changes: float) -> Action:
        return decide(continued=replace(GOOD, **changes), grown={}, drifted=False, config=CONFIG).action

    assert action() == Action.continue_
    assert action(gain_lower=0.0101) == Action.continue_ and action(gain_lower=0.0099) == Action.skip
    assert action(structure=0.101) == Action.continue_ and action(structure=0.099) == Action.skip
    assert action(forgetting=0.24) == Action.continue_ and action(forgetting=0.27) == Action.skip
    assert action(cost_fraction=9.0) == Action.continue_ and action(cost_fraction=10.5) == Action.skip


def test_what_is_ruled_out_leaves_the_choice_to_the_other() -> None:
    found = decide(
        continued=GOOD, grown={"Growing": replace(GOOD, gain=3.0, structure=0.05)}, drifted=True, config=CONFIG
    )
    assert found.action == Action.continue_ and found.terms["grow/utility"] > found.terms["continue/utility"]
    assert found.reasons == [
        "Continuing gains 0.5000 nats per token; forgetting costs 0.0000, parameters 0.0000, training 0.0100: utility "
        "0.4900.",
        "Growing gains 3.0000 nats per token; forgetting costs 0.0000, parameters 0.0000, training 0.0100: utility "
        "2.9900. Ruled out: the text is noise: reading it in order is worth only 0.050 nats per token "
        "(decision.min_structure=0.1).",
        "Continue: its utility of 0.4900 is the largest.",
    ]


@pytest.mark.parametrize("field", [field.name for field in fields(ProbeResult)])
def test_a_number_that_is_missing_rules_out(field: str) -> None:
    ill = replace(GOOD, **{"gain": 9.0, field: math.nan})
    assert decide(continued=None, grown={"Growing": ill}, drifted=True, config=CONFIG).action == Action.skip
    assert decide(continued=GOOD, grown={"Growing": ill}, drifted=True, config=CONFIG).action == Action.continue_


def test_terms_are_flat_numbers() -> None:
    terms = decide(continued=GOOD, grown={"Growing": GOOD}, drifted=True, config=CONFIG).terms
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
    gain = -difference(after, bigram_losses([], heldout), level=0.05, resamples=200, seed=seed)
    order = -difference(after, bigram_losses(train, shuffled), level=0.05, resamples=200, seed=seed)
    return ProbeResult(gain=gain.mean, gain_lower=gain.lower, structure=order.lower, forgetting=0.0,
                       parameters_fraction=0.2, cost_fraction=0.2)  # fmt: skip


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
        decision = decide(continued=found, grown={"Growing": found}, drifted=True, config=CONFIG)
        assert decision.action == Action.skip and decision.terms["grow/utility"] > 0.3
        assert sum("the text is noise" in reason for reason in decision.reasons[:-1]) == 2
        assert decision.reasons[-1].startswith("Skip: no action is worth more than nothing: the text is noise")


def test_text_with_order_is_not_taken_for_noise() -> None:
    for seed in range(20):
        found = probe(draw_documents(np.random.default_rng(seed), order=True), seed)
        assert found.structure > 0.8
        assert decide(continued=None, grown={"Growing": found}, drifted=True, config=CONFIG).action == Action.grow
