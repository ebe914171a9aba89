"""Arms in the order of their losses, and which differences are noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lifelong_moe.reports.ranking import best, ranking


def arm(name: str, *means: float, others: Sequence[str] = ()) -> dict[str, Any]:
    """An arm with a seed for each mean of two distributions, which lie 1 apart."""
    runs = [
        {
            "seed": seed,
            "status": "committed",
            "leak": {},
            "curves": {},
            "forgetting_bits_per_byte": {},
            "final_bits_per_byte": {"a": mean - 0.5, "b": mean + 0.5} | dict.fromkeys(others, 1.0),
            "numbers": {"active_flops": 1.0},
        }
        for seed, mean in enumerate(means)
    ]
    return {"name": name, "learned_after": {}, "runs": runs or [{"seed": 0, "status": "absent"}]}


def test_the_lowest_loss_is_first_and_ties_are_called_so() -> None:
    arms = [arm("far", 3.0, 3.1, 3.2), arm("noisy", 2.0, 2.3, 1.95), arm("first", 2.0, 2.0, 2.05), arm("absent")]
    found = ranking({"arms": arms, "reference": "far"})
    assert [(one.name, one.place, one.is_tied) for one in found] == [
        ("first", 1, True), ("noisy", 2, True), ("far", 3, False),
    ]  # fmt: skip
    assert abs(found[1].bits_per_byte - 25 / 12) < 1e-12
    assert best(found) == ["Best at the end: first, 2.017 bits per byte in the mean; noisy is within the noise of it."]
    assert best([found[0], found[2]])[0].endswith("; the next one, far, is clearly worse.")
    assert "; 4 others are within" in best([found[0], *4 * [found[1]]])[0] and best(found[:1]) == []


def test_arms_on_other_text_have_no_place() -> None:
    arms = [arm("a", 2.0), arm("b", 1.0, others=["c"])]
    assert [one.name for one in ranking({"arms": arms, "reference": "a"})] == ["a"]
    assert [one.name for one in ranking({"arms": arms, "reference": "none yet"})] == ["a"]
    assert ranking({"arms": [arm("absent")], "reference": "absent"}) == []
