"""Which distributions are tested together, and whether one of them hides a loss."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from scipy.stats import t

from lifelong_moe.retraining.bounds import DocumentLosses, effective_sources, has_enough_sources
from lifelong_moe.retraining.pooling import pooled_losses, pools, sources_needed, worst_member

LEVEL = 0.05


def sized(**sources: int) -> dict[str, np.ndarray]:
    """Distributions with so many sources of 100 tokens."""
    return {name: np.full(number, 100) for name, number in sources.items()}


def test_effective_sources_by_hand() -> None:
    assert effective_sources(np.array([7, 7, 7])) == pytest.approx(3)
    assert effective_sources(np.array([90, 10])) == pytest.approx(1 / 0.82)
    assert has_enough_sources(np.full(5, 3)) and not has_enough_sources(np.full(4, 3))
    assert not has_enough_sources(np.array([80, 5, 5, 5, 5]))


@pytest.mark.parametrize("number", [1, 5, 50])
def test_as_many_harmless_candidates_pass_many_checks_as_one_of_five_sources(number: int) -> None:
    tolerance = (1.6449 + 0.8416) / math.sqrt(5)  # in units of a source's scatter: one check of five passes 80 %
    rng = np.random.default_rng(0)
    means = rng.normal(size=(20_000, number)) / math.sqrt(sources_needed(number, LEVEL))
    highest = means + 1.6449 / math.sqrt(sources_needed(number, LEVEL))
    assert (highest <= tolerance).all(axis=1).mean() == pytest.approx(0.8, abs=0.01)


def test_large_ones_stand_alone_and_small_ones_join_only_until_there_are_enough() -> None:
    needed = sources_needed(6, LEVEL)
    assert 9 < needed < 10
    found = pools(sized(big=30, a=4, b=4, c=6, d=7, other=10), {}, level=LEVEL)
    assert found == [("other",), ("big",), ("a", "b", "c"), ("d", "a")]


def test_first_come_those_of_one_kind() -> None:
    sizes = sized(de1=5, en1=5, de2=6, en2=6)
    assert pools(sizes, {"de1": "de", "de2": "de", "en1": "en", "en2": "en"}, level=LEVEL) == [
        ("de1", "de2"), ("en1", "en2"),
    ]  # fmt: skip


def test_what_is_left_borrows_from_its_kind_which_keeps_its_own_test() -> None:
    sizes = sized(code=40, text=40, more=3)
    assert pools(sizes, {}, level=LEVEL)[:2] == [("code",), ("text",)]
    assert pools(sizes, {"more": "text"}, level=LEVEL) == [("code",), ("text",), ("more", "text")]
    assert pools(sizes, {"more": "code"}, level=LEVEL) == [("code",), ("text",), ("more", "code")]


def test_a_huge_source_is_worth_one() -> None:
    sizes = {"a": np.array([10_000] + [10] * 20), "b": np.full(20, 100)}
    assert pools(sizes, {}, level=LEVEL)[0] == ("b",)


def test_all_together_may_still_be_too_few() -> None:
    assert pools(sized(a=1, b=2), {}, level=LEVEL) == [("a", "b")]
    assert pools({}, {}, level=LEVEL) == []


def test_every_distribution_is_tested_whatever_their_sizes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = {f"d{k}": rng.integers(1, 500, size=rng.integers(1, 25)) for k in range(rng.integers(1, 12))}
        kinds = {name: str(rng.integers(3)) for name in sizes}
        found = pools(sizes, kinds, level=LEVEL)
        count = Counter(name for group in found for name in group)
        assert set(count) == set(sizes) and len(set(found)) == len(found)
        enough = [
            effective_sources(np.concatenate([sizes[n] for n in group])) >= sources_needed(len(sizes), LEVEL)
            for group in found
        ]
        assert all(enough) or set(found[-1]) == set(sizes)


def losses(change: np.ndarray) -> DocumentLosses:
    """A source each, of 10 tokens."""
    return DocumentLosses(10 * change, np.full(len(change), 10), [str(i) for i in range(len(change))])


def test_joined_sets_keep_their_sources_apart() -> None:
    found = pooled_losses({"a": losses(np.zeros(2)), "b": losses(np.ones(3))}, ("a", "b"))
    assert len(found.sizes) == 5 and found.nats_per_token == pytest.approx(0.6)


def test_the_worst_member_by_hand() -> None:
    changes = {"a": np.array([0.0, 2.0]), "b": np.array([9.0, 10.0, 11.0])}
    after = {name: losses(change) for name, change in changes.items()}
    before = {name: losses(0 * change) for name, change in changes.items()}
    name, lost = worst_member(after, before, ("a", "b"), LEVEL)
    half = math.sqrt((1 + 1 + 1 + 0 + 1) / 3) * t.ppf(0.975, 3) / math.sqrt(3)
    assert name == "b" and (lost.mean, lost.lower) == pytest.approx((10, 10 - half))


def test_by_chance_a_member_looks_worse_as_rarely_as_stated() -> None:
    rng, names = np.random.default_rng(0), tuple("abcdef")
    before = {name: losses(np.zeros(3)) for name in names}
    wrong = 0
    for _ in range(1000):
        after = {name: losses(rng.normal(size=3)) for name in names}
        wrong += worst_member(after, before, names, LEVEL)[1].lower > 0
    assert 0.02 < wrong / 1000 <= LEVEL + 2 * math.sqrt(LEVEL * (1 - LEVEL) / 1000)


def test_members_of_one_source_each_show_nothing_and_what_is_no_number_bounds_none() -> None:
    before = {name: losses(np.zeros(1)) for name in "ab"}
    after = {name: losses(np.ones(1)) for name in "ab"}
    assert worst_member(after, before, ("a", "b"), LEVEL)[1].lower == -math.inf
    before, after = ({**sets, "c": losses(np.array([0.0, 1.0]))} for sets in (before, after))
    after["b"] = losses(np.array([math.nan]))
    assert math.isnan(worst_member(after, before, ("a", "b", "c"), LEVEL)[1].lower)
