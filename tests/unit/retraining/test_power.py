"""The chance that a gate passes what does no harm, against a simulation of plain t-tests."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm, t

from lifelong_moe.config.retraining.policy import GateConfig, SliceConfig
from lifelong_moe.retraining.bounds import DocumentLosses
from lifelong_moe.retraining.power import passing_chances

CONFIG = GateConfig(tolerance=0.01)


def compared(number: int, scatter: float, mean: float = 0.0) -> tuple[DocumentLosses, DocumentLosses]:
    """Losses after and before whose differences have exactly this mean and standard deviation over sources."""
    change = norm.ppf((np.arange(number) + 0.5) / number)
    change = mean + scatter * change / change.std(ddof=1)
    names, tokens = [str(i) for i in range(number)], np.full(number, 50)
    return DocumentLosses(50 * (1 + change), tokens, names), DocumentLosses(np.full(number, 50.0), tokens, names)


def chance(number: int, scatter: float, mean: float = 0.0) -> float:
    after, before = compared(number, scatter, mean)
    return passing_chances({"a": after}, {"a": before}, {}, CONFIG)["a",]


@pytest.mark.parametrize(("number", "scatter"), [(5, 0.005), (8, 0.01), (20, 0.02), (100, 0.05)])
def test_it_is_the_share_of_harmless_candidates_whose_upper_bound_is_low_enough(number: int, scatter: float) -> None:
    drawn = np.random.default_rng(0).normal(0.0, scatter, size=(20_000, number))
    upper = drawn.mean(axis=1) + t.ppf(0.95, number - 1) * drawn.std(axis=1, ddof=1) / np.sqrt(number)
    assert chance(number, scatter) == pytest.approx((upper <= 0.01).mean(), abs=0.01)


def test_only_the_scatter_counts_not_what_this_candidate_lost() -> None:
    assert chance(20, 0.02, mean=5.0) == pytest.approx(chance(20, 0.02))


def test_certainty_and_ignorance() -> None:
    assert chance(20, 0.0) == 1.0 and chance(4, 0.0) == 0.0
    after, before = compared(20, 0.02)
    after.nats[3] = np.nan
    assert passing_chances({"a": after}, {"a": before}, {}, CONFIG)["a",] == 0.0
    assert passing_chances({}, {}, {}, CONFIG) == {}


def test_each_distribution_or_pool_has_a_chance() -> None:
    sets = {"big": compared(30, 0.02), "a": compared(4, 0.02), "b": compared(4, 0.02)}
    after, before = ({name: pair[side] for name, pair in sets.items()} for side in (0, 1))
    assert set(passing_chances(after, before, {}, CONFIG)) == {("big",), ("a", "b")}


def test_each_slice_has_a_chance() -> None:
    after, before = compared(30, 0.02)
    slices = {"few": SliceConfig(sources="?"), "wide": SliceConfig(sources="?", tolerance=1.0)}
    slices["none"] = SliceConfig(sources="x")
    found = passing_chances({"a": after}, {"a": before}, {}, GateConfig(tolerance=0.01, slices=slices))
    first = [DocumentLosses(each.nats[:10], each.tokens[:10], each.sources[:10]) for each in (after, before)]
    assert found["slice few",] == passing_chances({"a": first[0]}, {"a": first[1]}, {}, CONFIG)["a",]
    assert (found["slice wide",], found["slice none",]) == (1.0, 0.0)
