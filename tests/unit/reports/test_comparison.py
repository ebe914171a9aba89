"""Arms side by side, by hand: signs, scales, and what is not known."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from lifelong_moe.reports.comparison import ArmResult, build_comparison, measure
from lifelong_moe.reports.seeds import Interval, PairedDifference, over_seeds, paired

NAMES = ["a", "b", "c"]


def report(
    matrix: Sequence[Sequence[float]],
    *,
    names: Sequence[str] = NAMES,
    learns: Sequence[Sequence[str]] = (("a",), ("b",), ("c",)),
    leak: Mapping[str, float] | None = None,
    grows: bool = True,
) -> dict[str, Any]:
    """What a comparison reads of a report; stage i costs i + 1 of everything."""
    after = {name: max(i for i, of in enumerate(learns) if name in of) for of in learns for name in of}
    column = {name: j for j, name in enumerate(names)}
    return {
        "distributions": list(names),
        "loss_nats_per_token": [list(row) for row in matrix],
        "bits_per_byte": [[value / 2 for value in row] for row in matrix],
        "forgetting": {n: matrix[-1][column[n]] - matrix[i][column[n]] for n, i in after.items()},
        "routing": {name: {"leak": (leak or {}).get(name, 0.0)} for name in names},
        "from_scratch": {},
        "stages": [
            {
                "name": f"s{i}", "data": of[0], "learns": list(of),
                "tokens": 100 * (i + 1), "active_flops": 10 * (i + 1), "seconds": 2.0 * (i + 1),
                "parameters_total": 7 + i, "parameters_active": 3 + i, "epochs": 1.0 / (i + 1),
                "experts_per_layer": 2 + (i if grows else 0),
            }
            for i, of in enumerate(learns)
        ],
    }  # fmt: skip


# Learned at 2.0, 3.0, 4.0; a is forgotten by 0.3 nats, b by 0.1.
HELD = report([[2.0, 9.0, 9.0], [2.2, 3.0, 9.0], [2.3, 3.1, 4.0]], leak={"a": 0.2, "b": 0.5, "c": 0.9})
# Learned b and c better by 0.2 and 0.1, and forgot more.
FREE = report([[2.0, 9.0, 9.0], [2.9, 2.8, 9.0], [3.0, 3.8, 3.9]])
# Everything at once, columns in another order: 1.9, 3.2, 3.8 for a, b, c.
JOINT = report([[3.8, 1.9, 3.2]], names=["c", "a", "b"], learns=(("a", "c", "b"),))


def test_one_run_by_hand() -> None:
    found = measure(HELD, FREE, JOINT)
    numbers = found.numbers
    assert found.forgetting == pytest.approx({"a": 0.3, "b": 0.1})  # c is not old
    assert numbers["forgetting_max"] == pytest.approx(math.exp(0.3) - 1)
    assert numbers["forgetting_mean"] == pytest.approx(math.exp(0.2) - 1)
    assert found.forgetting_bits_per_byte == pytest.approx({"a": 0.15, "b": 0.05})
    in_bits = {"forgetting_max": 0.15, "forgetting_mean": 0.1, "plasticity_gap": 0.1, "plasticity_gap_mean": 0.075}
    in_bits["oracle_gap"] = 0.5 / 6
    assert {key: numbers[f"{key}_bits_per_byte"] for key in in_bits} == pytest.approx(in_bits)
    assert found.plasticity_gap == pytest.approx({"b": 0.2, "c": 0.1})  # a was learned first: nothing to hold
    assert numbers["plasticity_gap"] == pytest.approx(math.exp(0.2) - 1)
    assert numbers["plasticity_gap_mean"] == pytest.approx(math.exp(0.15) - 1)
    assert found.oracle_gap == pytest.approx({"a": 0.4, "b": -0.1, "c": 0.2})
    assert numbers["oracle_gap"] == pytest.approx(math.exp(0.5 / 3) - 1)
    assert numbers["final_mean_nats"] == pytest.approx((2.3 + 3.1 + 4.0) / 3)
    assert numbers["final_mean_bits_per_byte"] == pytest.approx((2.3 + 3.1 + 4.0) / 6)
    assert numbers["leak_max"] == 0.5 and found.leak == {"a": 0.2, "b": 0.5}  # no expert is born after c
    assert [numbers[key] for key in ("tokens", "active_flops", "seconds")] == [600, 60, 12.0]
    assert [numbers[key] for key in ("parameters_total", "parameters_active", "epochs_max")] == [9, 5, 1.0]
    assert found.final_bits_per_byte == {"a": 1.15, "b": 1.55, "c": 2.0}
    assert found.curves["a"] == [1.0, 1.1, 1.15]


def test_what_was_learned_better_and_remembered_better_is_negative() -> None:
    improved = report([[2.0, 9.0, 9.0], [1.9, 2.7, 9.0], [1.8, 2.5, 3.5]])
    numbers = measure(improved, FREE, JOINT).numbers
    assert numbers["forgetting_max"] == pytest.approx(math.exp(-0.2) - 1)
    assert numbers["plasticity_gap"] == pytest.approx(math.exp(-0.1) - 1)
    assert numbers["oracle_gap"] == pytest.approx(math.exp((-0.1 - 0.7 - 0.3) / 3) - 1)


def test_what_is_not_there_is_null() -> None:
    numbers = measure(HELD, None, None).numbers
    assert numbers["plasticity_gap"] is numbers["plasticity_gap_mean"] is numbers["oracle_gap"] is None
    half = report([[1.9, 3.2]], names=["a", "b"], learns=(("a", "b"),))  # never learned c
    assert measure(HELD, FREE, half).numbers["oracle_gap"] is None
    joint = measure(JOINT, FREE, JOINT).numbers
    assert joint["forgetting_max"] is joint["plasticity_gap"] is joint["leak_max"] is None
    assert joint["oracle_gap"] == 0.0
    flat = report(FREE["loss_nats_per_token"], grows=False)  # no expert is a later one
    assert measure(flat, None, None).leak == {} and measure(flat, None, None).numbers["leak_max"] is None
    mixture = HELD | {"mixture": {"a": {"shares": {}, "readers": 1.0}}}
    assert measure(mixture, None, None).leak == {}


def test_a_distribution_that_comes_back_was_learned_last() -> None:
    back = report([[2.0, 9.0], [2.5, 3.0], [1.9, 3.4]], names=["a", "b"], learns=(("a",), ("b",), ("a",)))
    free = report([[2.0, 9.0], [2.5, 2.9], [1.7, 3.5]], names=["a", "b"], learns=(("a",), ("b",), ("a",)))
    found = measure(back, free, None)
    assert found.forgetting == pytest.approx({"b": 0.4})
    assert found.plasticity_gap == pytest.approx({"a": 0.2, "b": 0.1})


def test_distributions_only_evaluated_count_in_the_mean_alone() -> None:
    wide = report([[2.0, 9.0], [2.5, 8.0]], names=["a", "other"], learns=(("a",), ("a",)))
    found = measure(wide, None, None)
    assert found.numbers["final_mean_nats"] == pytest.approx(5.25)
    assert found.forgetting == {} and found.leak == {}


def test_interval_over_seeds_by_hand() -> None:
    # 1, 2, 3: deviation 1, t(0.975, 2) = 4.302653, half = 4.302653 / sqrt(3).
    assert asdict(over_seeds([1.0, 2.0, 3.0])) == pytest.approx(
        {"mean": 2.0, "low": -0.484138, "high": 4.484138, "n": 3, "lowest": 1.0, "highest": 3.0}
    )
    # Two seeds: t(0.975, 1) = 12.706205 times |difference| / 2.
    assert asdict(over_seeds([1.0, None, 2.0])) == pytest.approx(
        {"mean": 1.5, "low": -4.853102, "high": 7.853102, "n": 2, "lowest": 1.0, "highest": 2.0}
    )
    assert over_seeds([4.0]) == Interval(4.0, None, None, 1, 4.0, 4.0)
    assert over_seeds([None, None]) is None and over_seeds([]) is None


def test_paired_differences_by_hand() -> None:
    # Differences 1, 2, 3: t = 2 / (1 / sqrt 3) = 3.464102, p = 0.074180 with 2 degrees of freedom.
    found = paired({0: 11.0, 1: 22.0, 2: 33.0, 3: 5.0}, {2: 30.0, 1: 20.0, 0: 10.0})
    assert asdict(found) == pytest.approx(
        {"mean": 2.0, "low": -0.484138, "high": 4.484138, "n": 3, "lowest": 1.0, "highest": 3.0, "p": 0.0741799},
        abs=1e-6,
    )
    lower = paired({0: 10.0, 1: 20.0, 2: 30.0}, {0: 11.0, 1: 22.0, 2: 33.0})
    assert lower is not None and lower.mean == -2.0 and lower.p == pytest.approx(0.0741799, abs=1e-6)
    assert paired({0: 1.0, 1: 2.0}, {0: 1.0}) is None
    assert paired({0: 1.0, 1: None}, {0: 1.0, 1: 2.0}) is None
    even = paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0})
    assert even == PairedDifference(1.0, 1.0, 1.0, 2, 1.0, 1.0, None)


def arm(name: str, method: str, *reports: dict[str, Any], failed: Mapping[int, str] | None = None) -> ArmResult:
    runs = {seed: f"x.{name}.s{seed}" for seed in (0, 1)}
    return ArmResult(name, method, (f"method={method}",), runs, dict(enumerate(reports)), failed or {})


def shifted(one: dict[str, Any], by: float) -> dict[str, Any]:
    matrix = [[value + by * i for value in row] for i, row in enumerate(one["loss_nats_per_token"])]
    return report(matrix, names=one["distributions"], learns=[stage["learns"] for stage in one["stages"]])


def test_arms_against_their_references() -> None:
    arms = [
        arm("held", "lifelong", HELD, shifted(HELD, 0.1)),
        arm("naive", "sequential", FREE, FREE),
        arm("all", "joint", JOINT),
    ]
    found = build_comparison(arms, reference="naive")
    assert (found["reference"], found["unrestrained"], found["joint"]) == ("naive", "naive", "all")
    assert found["distributions"] == NAMES and not found["complete"]
    held, naive, joint = found["arms"]
    assert [run["status"] for run in joint["runs"]] == ["committed", "absent"]
    assert held["stages"] == ["s0", "s1", "s2"] and held["learned_after"] == {"a": 0, "b": 1, "c": 2}
    # Seed 0: 0.3 nats; seed 1: stage i is worse by 0.1 i, so a is forgotten by 0.5.
    values = [math.exp(0.3) - 1, math.exp(0.5) - 1]
    assert held["summary"]["forgetting_max"]["mean"] == pytest.approx(sum(values) / 2)
    assert naive["summary"]["plasticity_gap"]["mean"] == 0.0
    assert held["runs"][1]["plasticity_gap"] == pytest.approx({"b": 0.3, "c": 0.3})
    assert held["runs"][0]["numbers"]["oracle_gap"] is not None
    assert held["runs"][1]["numbers"]["oracle_gap"] is None  # no joint run with seed 1
    assert held["summary"]["oracle_gap"]["n"] == 1
    difference = held["differences"]["final_mean_nats"]
    base = (3.0 + 3.8 + 3.9) / 3
    assert difference["mean"] == pytest.approx((2.3 + 3.1 + 4.0) / 3 + 0.1 - base) and difference["n"] == 2
    assert naive["differences"] is None
    assert joint["differences"]["final_mean_nats"] is None  # one seed
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_roles_can_be_given_and_a_method_of_that_name_comes_first() -> None:
    arms = [arm("naive", "sequential", HELD), arm("free", "unrestrained", FREE)]
    assert build_comparison(arms, reference="naive")["unrestrained"] == "free"
    found = build_comparison(arms, reference="naive", unrestrained="naive")
    assert found["unrestrained"] == "naive" and found["joint"] is None
    assert found["arms"][1]["runs"][0]["plasticity_gap"] == pytest.approx({"b": -0.2, "c": -0.1})


def test_failed_and_absent_runs() -> None:
    found = build_comparison([arm("a", "lifelong", failed={1: "diverged"})], reference="a")
    (one,) = found["arms"]
    assert [(run["status"], run["reason"]) for run in one["runs"]] == [("absent", None), ("failed", "diverged")]
    assert one["summary"] == {} and one["stages"] == [] and found["distributions"] == []
    again = build_comparison([arm("a", "lifelong", HELD, HELD, failed={1: "diverged"})], reference="a")
    assert [(run["status"], run["reason"]) for run in again["arms"][0]["runs"]] == [("committed", None)] * 2
    assert again["complete"]


def test_differences_are_taken_over_the_same_distributions_only() -> None:
    wide = report([[*row, 1.0] for row in HELD["loss_nats_per_token"]], names=[*NAMES, "d"])
    back = report(FREE["loss_nats_per_token"], learns=(("c",), ("b",), ("a",)))
    arms = [
        arm("naive", "sequential", FREE, FREE),
        arm("wide", "lifelong", wide, wide),  # measured on one more: other means, the same old distributions
        arm("back", "lifelong", back, back),  # the same columns in another order of stages
        arm("mixed", "lifelong", HELD, wide),
    ]
    _, wider, backward, mixed = (row["differences"] for row in build_comparison(arms, reference="naive")["arms"])
    assert wider["final_mean_nats"] is wider["final_mean_bits_per_byte"] is None
    assert wider["forgetting_max"]["n"] == wider["plasticity_gap"]["n"] == wider["leak_max"]["n"] == 2
    assert backward["final_mean_nats"]["mean"] == 0.0
    for number in ("forgetting_max", "forgetting_mean", "plasticity_gap", "plasticity_gap_mean", "leak_max"):
        assert backward[number] is None, number
    for row in (wider, backward, mixed):  # what it costs does not depend on what is measured
        assert row["tokens"]["mean"] == row["active_flops"]["mean"] == 0.0
    assert mixed["final_mean_nats"] is None and mixed["forgetting_max"]["n"] == 2  # one seed in common is no test


def test_models_from_scratch_are_counted_apart() -> None:
    alone = {"nats_per_token": 3.0, "bits_per_byte": 1.5, "tokens": 200, "active_flops": 21}
    found = measure(FREE | {"from_scratch": {"b": alone, "c": alone | {"active_flops": 30}}}, None, None).numbers
    assert (found["tokens"], found["active_flops"]) == (600, 60)
    assert (found["scratch_tokens"], found["scratch_active_flops"]) == (400, 51)
    none = measure(HELD, None, None).numbers
    assert none["scratch_tokens"] == none["scratch_active_flops"] == 0
    del alone["active_flops"]  # a report of an earlier version
    old = measure(FREE | {"from_scratch": {"b": alone}}, None, None).numbers
    assert (old["scratch_tokens"], old["scratch_active_flops"]) == (200, None)


def test_intervals_and_paired_tests_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 30):
        ours, theirs = rng.normal([[0.3], [0.0]], size=(2, n))
        reference = ttest_rel(ours, theirs)
        low, high = reference.confidence_interval(0.95)
        found = paired(dict(enumerate(ours)), dict(enumerate(theirs)))
        assert found is not None
        assert (found.p, found.low, found.high) == pytest.approx((reference.pvalue, low, high), rel=1e-12)
