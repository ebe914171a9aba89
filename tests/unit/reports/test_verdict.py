"""Sentences on built cases: kept and lost, better and worse, ties within noise, one run only, no reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lifelong_moe.measures import MEASURES
from lifelong_moe.reports.comparison import build_comparison
from lifelong_moe.reports.report import Report
from lifelong_moe.reports.verdict import GLOSSARY, Outcome, comparison_verdict, report_verdict, verdict
from tests.unit.reports.test_comparison import arm, shifted
from tests.unit.reports.test_comparison import report as plain_report
from tests.unit.reports.test_report import report as whole_report


def outcome(
    name: str,
    lost: dict[str, list[float]],
    learned: dict[str, list[float]] | None = None,
    *,
    final: float = 2.0,
    flops: float = 100.0,
    leaks: dict[str, float] | None = None,
) -> Outcome:
    """Values of seeds 0, 1, …; each distribution ends at ``final``."""
    forgetting, new = ({n: dict(enumerate(v)) for n, v in found.items()} for found in (lost, learned or {}))
    seeds = len(next(iter([*lost.values(), *(learned or {}).values()]), [0.0]))
    ends = {n: dict.fromkeys(range(seeds), final) for n in {**forgetting, **new}} or {"x": {0: final}}
    return Outcome(name, forgetting, new, ends, flops, leaks or {})


NAIVE = outcome("naive", {"docs": [0.71]}, {"headers": [2.0]})


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (  # kept where the other lost, learned worse, paid more
            outcome("lifelong", {"docs": [0.0]}, {"headers": [2.11]}, flops=114.0),
            "lifelong kept docs (0.00 bits per byte) where naive lost 0.71 bits per byte; it learned "
            "headers 0.11 worse; "
            "in the mean it ends level; 14 % more FLOPs.",
        ),
        (  # lost too, learned better, paid less
            outcome("replay", {"docs": [0.3]}, {"headers": [1.8]}, final=1.75, flops=90.0),
            "replay lost 0.30 bits per byte of docs where naive lost 0.71 bits per byte; it learned headers "
            "0.20 better; "
            "in the mean it ends 0.25 better; 10 % fewer FLOPs.",
        ),
        (  # improved, and a tie in what was learned
            outcome("deltas", {"docs": [-0.2]}, {"headers": [2.004]}),
            "deltas improved docs by 0.20 bits per byte where naive lost 0.71 bits per byte; it learned "
            "headers as well; "
            "in the mean it ends level; as many FLOPs.",
        ),
    ],
)
def test_one_seed_against_a_reference(one: Outcome, said: str) -> None:
    assert verdict(one, NAIVE) == [said]


def test_training_that_makes_its_own_text_worse_is_said() -> None:
    one = replace(outcome("a", {"docs": [0.0]}, {"words": [3.95], "sea": [2.0]}), by_training={
        "words": {0: 0.03}, "sea": {0: -1.0}, "sand": {0: 0.004},
    })  # fmt: skip
    assert verdict(one)[1:] == [
        "Training on it has made held-out text worse than it was before, words 0.03 bits per byte: give such a stage "
        "more text, fewer tokens (plan shows the epochs) or a lower optim.lr."
    ]
    # With seeds of both signs nothing is clear.
    assert len(verdict(replace(one, by_training={"words": {0: 0.05, 1: -0.02}}))) == 1


def test_what_the_other_kept_or_never_had() -> None:
    kept = outcome("a", {"docs": [0.001]}, {"headers": [2.0]})
    assert verdict(kept, outcome("b", {"docs": [0.002]}))[0].startswith(
        "a kept docs (0.00 bits per byte) where b kept it too;"
    )
    joint = outcome("joint", {}, {}, final=1.8)
    assert verdict(joint, joint)[0].startswith(
        "joint could forget nothing: its last stage trained on all that it learned;"
    )
    assert " where joint" not in verdict(kept, outcome("joint", {}, {"headers": [1.0]}))[0]


def test_without_a_reference_it_says_what_was_reached() -> None:
    one = outcome("one", {"docs": [0.2], "code": [0.0]}, {"code": [3.0], "headers": [2.5]})
    said = (
        "one lost 0.20 bits per byte of docs, and kept code (0.00 bits per byte); it learned code to 3.00 bits per "
        "byte and headers to 2.50."
    )
    assert verdict(one) == [said]
    # Measured on none of the same text, another run is no reference.
    assert verdict(one, outcome("far", {"poems": [0.1]})) == [said]
    assert verdict(outcome("first", {})) == [
        "first could forget nothing: its last stage trained on all that it learned."
    ]


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ([0.05, 0.07], "lost 0.06 bits per byte of docs"),
        ([0.06, -0.02], "may have lost 0.02 bits per byte of docs"),  # the seeds disagree
        ([0.05, 0.06, 0.07], "lost 0.06 bits per byte of docs"),
        ([0.30, -0.02, 0.05], "may have lost 0.11 bits per byte of docs"),  # 0 lies within the interval
        ([-0.30, 0.02, -0.05], "kept docs (-0.11 bits per byte)"),
        ([0.009, 0.009, 0.009], "kept docs (+0.01 bits per byte)"),  # clear, and too little to matter
    ],
)
def test_noise_over_seeds(lost: list[float], said: str) -> None:
    assert verdict(outcome("a", {"docs": lost}))[0].startswith(f"a {said}")


def test_differences_are_paired_by_seed() -> None:
    # Levels differ by a whole bit between seeds, the arms by 0.1 within each.
    ours, theirs = (outcome(n, {}, {"new": [1.0 + d, 2.0 + d, 3.0 + d]}) for n, d in (("a", 0.1), ("b", 0.0)))
    assert "it learned new 0.10 bits per byte worse; in the mean" in verdict(ours, theirs)[0]
    mixed = outcome("a", {}, {"new": [1.3, 1.9, 3.02]})
    assert "it learned new as well" in verdict(mixed, theirs)[0]


def test_many_distributions_are_summed_up() -> None:
    names = [f"d{i}" for i in range(8)]
    ours = outcome("a", {key: [0.002] for key in names}, {key: [1.1] for key in names})
    theirs = outcome("b", {name: [0.1 * (i + 1)] for i, name in enumerate(names)}, {key: [1.0] for key in names})
    assert verdict(ours, theirs)[0].startswith(
        "a kept 8 distributions (0.00 bits per byte at worst, 0.00 in the mean) where b lost 0.80 bits per "
        "byte at worst "
        "and 0.45 in the mean of 8 distributions; it learned 8 distributions 0.10 worse in the mean "
        "(+0.10 at worst, of d0)"
    )
    assert "it learned 8 distributions to 1.10 bits per byte in the mean" in verdict(ours)[0]


def test_a_leak_comes_with_what_to_do() -> None:
    harmless = outcome("a", {"docs": [0.0]}, leaks={"docs": 0.75, "code": 0.2})
    said = "75% of docs goes to experts that were born later (router leak), which cost it nothing: nothing to do."
    assert verdict(harmless)[1] == said
    # Of two, the one that has lost something.
    (_, harmful) = verdict(outcome("a", {"docs": [0.4], "code": [0.0]}, leaks={"docs": 0.6, "code": 0.9}))
    assert harmful.startswith("60% of docs goes to experts that were born later (router leak), and it lost by that")
    assert all(key in harmful for key in ("routing.bundles=cluster", "review.fraction", "replay.fraction"))
    assert len(verdict(outcome("a", {"docs": [0.4]}, leaks={"docs": 0.04}))) == 1
    said, unsure = verdict(outcome("a", {"docs": [0.5, -0.5, 0.1]}, leaks={"docs": 0.3}))
    assert said.startswith("a may have lost 0.03") and "(router leak), and if it lost, then by that or by" in unsure


def test_a_run_without_flops_has_no_cost_to_compare() -> None:
    (said,) = verdict(outcome("a", {"docs": [0.0]}), outcome("b", {"docs": [0.4]}, flops=0.0))
    assert "FLOPs" not in said


def read(stages: list[str | list[str]], rows: list[list[float]], name: str, method: str) -> Report:
    return Report.from_json(whole_report(stages, rows, method=method) | {"run": name})


def test_reports_and_comparisons_say_what_training_made_worse() -> None:
    worse = read(["english", "python"], [[2.0, 3.0, 7.0], [2.0, 3.4, 6.5]], "worse", "lifelong")
    (change,) = worse.changed_by_training().values()
    assert change == pytest.approx(worse.bits_per_byte[1][1] - worse.bits_per_byte[0][1]) and change > 0
    assert f"worse than it was before, python {change:.2f} bits per byte" in report_verdict([worse])[1]
    rows = plain_report([[2.0, 3.0, 9.0], [2.0, 3.4, 9.0], [2.0, 3.4, 4.0]])
    found: dict[str, Any] = build_comparison([arm("held", "lifelong", rows)], reference="held")
    assert "worse than it was before" in comparison_verdict(found)["held"][1]


def test_reports_side_by_side() -> None:
    kept = read(["english", "python"], [[2.0, 6.0, 7.0], [2.0, 3.2, 6.5]], "kept", "lifelong")
    naive = read(["english", "python"], [[2.0, 6.0, 7.0], [2.5, 3.0, 6.5]], "naive", "sequential")
    said = [
        "kept kept english (0.00 bits per byte) where naive lost 0.25 bits per byte; it learned python 0.10 "
        "worse; in the "
        "mean it ends 0.05 better; as many FLOPs."
    ]
    # The one without retention is the reference, wherever it stands; of equals, the last.
    assert report_verdict([kept, naive]) == report_verdict([naive, kept]) == said
    assert report_verdict([kept]) == [
        "kept kept english (0.00 bits per byte); it learned python to 1.60 bits per byte."
    ]


def test_a_comparison_with_seeds() -> None:
    held = plain_report([[2.0, 9.0, 9.0], [2.0, 3.0, 9.0], [2.0, 3.0, 4.0]])
    free = plain_report([[2.0, 9.0, 9.0], [2.9, 2.8, 9.0], [3.0, 3.8, 3.9]])
    arms = [
        arm("held", "lifelong", held, held),
        arm("naive", "sequential", free, shifted(free, 0.01)),
        arm("late", "replay"),
    ]
    found: dict[str, Any] = build_comparison(arms, reference="naive")
    said = comparison_verdict(found)
    assert list(said) == ["held", "naive"]  # the third has no results yet
    assert said["held"] == [
        "held kept a (0.00 bits per byte) and b (0.00) where naive lost 0.51 and 0.50 bits per byte; it "
        "learned b 0.10 worse and c 0.05 worse; in the mean it ends 0.29 better; as many FLOPs."
    ]
    assert said["naive"][0].startswith("naive lost 0.51 bits per byte of a and 0.50 of b; it learned b to 1.40")


def test_the_words_are_few() -> None:
    assert len(GLOSSARY) == 8 and {"bits per byte", "forgetting", "router leak"} <= set(GLOSSARY)
    assert MEASURES["forgetting_max_bits_per_byte"].words.split(",")[0] in GLOSSARY
