from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import Ridge

from lifelong_moe.retraining.config import DriftConfig
from lifelong_moe.retraining.drift import (
    DocumentSample,
    area_under_curve,
    choose_documents,
    measure_drift,
    population_stability,
)

WIDTH, CLUSTERS = 12, 8
AT_5_PERCENT = DriftConfig(auc=0.5, quantile=0.95, permutations=79)


def draw(
    rng: np.random.Generator, num_sources: int, *, documents: int = 6, shift: float = 0.0, between: float = 1.0
) -> DocumentSample:
    """Documents whose sources differ by ``between`` in every feature; ``shift`` moves all sources in the first."""
    source_N = np.repeat(np.arange(num_sources), documents)
    effects = between * rng.normal(size=(num_sources, WIDTH))
    effects[:, 0] += shift
    x_ND = effects[source_N] + rng.normal(size=(len(source_N), WIDTH))
    clusters_N = (x_ND[:, -3:] > 0) @ np.array([1, 2, 4])
    names = [f"source {s}" for s in source_N]
    return DocumentSample(x_ND, names, np.bincount(clusters_N, minlength=CLUSTERS))


def alarms(make: Callable[[np.random.Generator], tuple[DocumentSample, DocumentSample]], trials: int) -> float:
    """Share of trials in which drift is found at the 5 % level."""
    found = [measure_drift(*make(np.random.default_rng((7, i))), AT_5_PERCENT, seed=i).drifted for i in range(trials)]
    return sum(found) / trials


def nominal(trials: int) -> float:
    """The most that a true 5 % shows in so many trials, but for 2 in 100 times."""
    return 0.05 + 2 * math.sqrt(0.05 * 0.95 / trials)


def by_document(sample: DocumentSample) -> DocumentSample:
    """The same as if each document were a source, so that folds and permutations are over documents."""
    return replace(sample, sources=[str(i) for i in range(len(sample.sources))])


def undrifted(rng: np.random.Generator) -> tuple[DocumentSample, DocumentSample]:
    return draw(rng, 7), draw(rng, 9)


def test_false_alarms_are_as_rare_as_promised_since_sources_are_exchanged() -> None:
    assert 0.02 < alarms(undrifted, 200) <= nominal(200)


def test_exchanging_documents_would_raise_an_alarm_nearly_always() -> None:
    def documents(rng: np.random.Generator) -> tuple[DocumentSample, DocumentSample]:
        new, old = undrifted(rng)
        return by_document(new), by_document(old)

    assert alarms(documents, 50) > 0.9


def test_where_documents_are_independent_exchanging_them_is_calibrated() -> None:
    def independent(rng: np.random.Generator) -> tuple[DocumentSample, DocumentSample]:
        return by_document(draw(rng, 7, between=0.0)), by_document(draw(rng, 9, between=0.0))

    assert alarms(independent, 60) <= nominal(60)


def test_false_alarms_do_not_rise_where_old_sources_go_on() -> None:
    def going_on(rng: np.random.Generator) -> tuple[DocumentSample, DocumentSample]:
        both = draw(rng, 8, documents=12)
        first = np.arange(len(both.sources)) % 12 < 6
        halves = [
            DocumentSample(both.features_ND[half], [f"source {i // 6}" for i in range(48)], both.counts_K)
            for half in (first, ~first)
        ]
        return halves[0], halves[1]

    assert alarms(going_on, 60) <= 0.05


def test_a_planted_shift_is_found_at_the_default_limits() -> None:
    drifts = [
        measure_drift(draw(rng, 20, shift=4.0), draw(rng, 20), DriftConfig(), seed=0)
        for rng in map(np.random.default_rng, range(10))
    ]
    assert all(drift.drifted and drift.auc is not None and drift.auc > 0.8 for drift in drifts)
    assert drifts[0].words.startswith("Drift: on sources it has not seen, a classifier tells new documents from old")


def test_a_shift_too_small_to_matter_is_no_drift_however_certain() -> None:
    rng = np.random.default_rng(0)
    new, old = by_document(draw(rng, 30, shift=0.8, between=0.0)), by_document(draw(rng, 30, between=0.0))
    drift = measure_drift(new, old, DriftConfig(auc=0.75), seed=0)
    assert drift.auc is not None and drift.null_quantile is not None
    assert drift.null_quantile < drift.auc < 0.75 and not drift.drifted
    assert drift.words.startswith("No drift: ") and "0.75 is the least that counts" in drift.words
    assert measure_drift(new, old, DriftConfig(auc=0.6), seed=0).drifted


@pytest.mark.parametrize(("new", "old"), [(1, 30), (30, 1), (2, 12), (4, 4)])
def test_too_few_sources_give_no_answer_even_for_a_huge_shift(new: int, old: int) -> None:
    rng = np.random.default_rng(0)
    drift = measure_drift(draw(rng, new, shift=50.0), draw(rng, old), DriftConfig(), seed=0)
    assert drift.null_quantile is None and not drift.testable and not drift.drifted
    assert (drift.auc is None) == (min(new, old) == 1)
    assert drift.words == (
        f"No answer: {new} new and {old} old source(s) are too few to tell drift from the differences that sources "
        f"have anyway."
    )


@pytest.mark.parametrize(("new", "old"), [(2, 13), (4, 5), (5, 5)])
def test_a_hundred_distinct_relabellings_suffice(new: int, old: int) -> None:
    # 105, 126, and 252 / 2 since a relabelling and its mirror image have the same area.
    rng = np.random.default_rng(0)
    drift = measure_drift(draw(rng, new, shift=50.0), draw(rng, old), DriftConfig(), seed=0)
    assert drift.testable and drift.drifted and drift.auc is not None and drift.auc > 0.99


def test_what_cannot_be_reached_with_few_relabellings_is_no_answer() -> None:
    rng = np.random.default_rng(0)
    strict = DriftConfig(quantile=0.995, permutations=399)  # 1 / 126 is more than 0.005
    assert not measure_drift(draw(rng, 4, shift=50.0), draw(rng, 5), strict, seed=0).testable


def test_the_area_is_that_of_a_ridge_regression_for_each_left_out_source() -> None:
    rng = np.random.default_rng(3)
    new, old = draw(rng, 4, documents=3, shift=1.0), draw(rng, 5, documents=3)
    x_ND = np.concatenate([new.features_ND, old.features_ND])
    x_ND = (x_ND - x_ND.mean(axis=0)) / x_ND.std(axis=0)
    y_N, source_N = (np.arange(27) < 12).astype(float), np.arange(27) // 3  # fewer sources than folds
    scores_N = np.empty(27)
    for source in range(9):
        test = source_N == source
        z = x_ND[~test] - x_ND[~test].mean(axis=0)
        alpha = (z**2).sum() / WIDTH  # the mean eigenvalue of z^T z
        fit = Ridge(alpha=alpha).fit(x_ND[~test], y_N[~test])
        scores_N[test] = (x_ND[test] - x_ND[~test].mean(axis=0)) @ fit.coef_
    expected = area_under_curve(scores_N[:, None], y_N[:, None])[0]
    assert measure_drift(new, old, DriftConfig(), seed=0).auc == expected
    assert 0.5 < expected < 1


def test_the_same_seed_gives_the_same_and_another_gives_other_permutations() -> None:
    new, old = draw(np.random.default_rng(0), 8, shift=1.0), draw(np.random.default_rng(1), 9)
    drift = measure_drift(new, old, DriftConfig(), seed=5)
    assert drift == measure_drift(new, old, DriftConfig(), seed=5)
    assert drift.null_quantile != measure_drift(new, old, DriftConfig(), seed=6).null_quantile


def test_features_that_are_all_equal_tell_nothing() -> None:
    def flat(n: int) -> DocumentSample:
        return DocumentSample(np.ones((n, 3)), [str(i) for i in range(n)], np.array([n]))

    drift = measure_drift(flat(10), flat(12), DriftConfig(), seed=0)
    assert (drift.auc, drift.psi, drift.drifted) == (0.5, 0.0, False)


def test_at_most_so_many_documents_are_looked_at() -> None:
    new, old = draw(np.random.default_rng(0), 8), draw(np.random.default_rng(1), 8)
    rows = choose_documents(new.sources, 16, seed=2), choose_documents(old.sources, 16, seed=2)
    fewer = [
        DocumentSample(side.features_ND[r], [side.sources[i] for i in r], side.counts_K)
        for side, r in zip((new, old), rows, strict=True)
    ]
    limited = measure_drift(new, old, DriftConfig(documents=16), seed=2)
    assert limited == measure_drift(fewer[0], fewer[1], DriftConfig(), seed=2)
    assert limited != measure_drift(new, old, DriftConfig(), seed=2)


def test_documents_are_chosen_in_turn_from_each_source() -> None:
    sources = ["a"] * 8 + ["b"] * 2 + ["c"]
    for limit, expected in {3: "abc", 5: "aabbc", 7: "aaaabbc"}.items():
        rows = choose_documents(sources, limit, seed=0)
        assert "".join(sources[i] for i in rows) == expected and (np.diff(rows) > 0).all()
    assert choose_documents(sources, 11, seed=0).tolist() == list(range(11))
    assert len({tuple(choose_documents(sources, 3, seed=seed).tolist()) for seed in range(20)}) > 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_feature_that_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        DocumentSample(np.array([[1.0], [bad]]), ["a", "b"], np.array([2]))


@pytest.mark.parametrize(("shape", "sources"), [((2, 1), ["a"]), ((2,), ["a", "b"]), ((0, 1), [])])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...], sources: list[str]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        DocumentSample(np.zeros(shape), sources, np.array([1]))


def test_area_under_curve_by_hand() -> None:
    scores = np.array([[0.1, 1.0, 0.1], [0.4, 1.0, 0.4], [0.35, 1.0, 0.35], [0.8, 1.0, 0.8]])
    labels = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=float)
    # Column 0: of four pairs only (0.35, 0.4) is wrong. Column 1: all ties. Column 2: labels the other way round.
    assert area_under_curve(scores, labels).tolist() == [0.75, 0.5, 0.25]


def counts(*values: int) -> NDArray[np.int64]:
    return np.array(values)


def test_population_stability_by_hand() -> None:
    # (3.5, 1.5) / 5 against (1.5, 3.5) / 5; the bias is 1 * (1/4 + 1/4).
    expected = 2 * 0.4 * math.log(7 / 3) - 0.5
    assert population_stability(counts(3, 1), counts(1, 3)) == pytest.approx(expected, rel=1e-12)
    assert population_stability(counts(3, 0, 1), counts(1, 0, 3)) == pytest.approx(expected, rel=1e-12)
    assert population_stability(counts(1, 3), counts(3, 1)) == pytest.approx(expected, rel=1e-12)


def test_population_stability_survives_an_empty_cluster() -> None:
    # (10.5, 0.5) / 11 against the reverse: 2 * (10/11) * ln 21 - 2/10.
    assert population_stability(counts(10, 0), counts(0, 10)) == pytest.approx(20 / 11 * math.log(21) - 0.2, rel=1e-12)


def test_population_stability_is_without_bias_for_independent_documents() -> None:
    rng = np.random.default_rng(0)
    p_K = np.array([0.3, 0.2, 0.2, 0.1, 0.1, 0.1])
    values = [population_stability(rng.multinomial(100, p_K), rng.multinomial(80, p_K)) for _ in range(1000)]
    bias = 5 * (1 / 100 + 1 / 80)
    assert abs(np.mean(values)) < 0.05 * bias


def test_population_stability_is_large_without_drift_where_sources_differ() -> None:
    rng = np.random.default_rng(0)
    values = [measure_drift(*undrifted(rng), AT_5_PERCENT, seed=0).psi for _ in range(20)]
    assert np.median(values) > 0.1  # hence it is reported and decides nothing


@pytest.mark.parametrize(("new", "old"), [(counts(0, 0), counts(1, 0)), (counts(1), counts(1, 1))])
def test_population_stability_needs_documents_in_the_same_clusters(
    new: NDArray[np.int64], old: NDArray[np.int64]
) -> None:
    with pytest.raises(ValueError):
        population_stability(new, old)
