from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu
from sklearn.linear_model import Ridge

from lifelong_moe.config.retraining.policy import DriftConfig
from lifelong_moe.retraining.drift import (
    DocumentSample,
    _correlation,
    _permuted_labels,
    area_under_curve,
    choose_documents,
    measure_drift,
    population_stability,
    source_weights,
)

WIDTH, CLUSTERS = 12, 8
AT_5_PERCENT = DriftConfig(auc=0.5, quantile=0.95, permutations=79)


def draw(
    rng: np.random.Generator,
    num_sources: int,
    *,
    documents: int | list[int] = 6,
    shift: float = 0.0,
    between: float = 1.0,
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


@pytest.mark.parametrize(
    ("new", "old", "between"),
    [
        ([60] + [1] * 20, [3] * 40, 2.0),  # one large source among small ones
        ([60] + [1] * 20, [3] * 40, 0.3),
        ([1] * 5, [20] * 20, 0.3),  # the side of few documents scatters more
        ([20] * 20, [1] * 5, 0.3),
        ([1] * 20, [30] * 8, 1.0),
    ],
)
def test_unequal_sources_raise_no_more_alarms(new: list[int], old: list[int], between: float) -> None:
    """Simulated, and with more repetitions in tests/benchmarks/simulate_drift.py."""

    def unequal(rng: np.random.Generator) -> tuple[DocumentSample, DocumentSample]:
        sides = [draw(rng, len(sizes), documents=sizes, between=between) for sizes in (new, old)]
        return sides[0], sides[1]

    assert alarms(unequal, 60) <= nominal(60)


def test_unequal_sources_are_told_apart_where_they_drifted() -> None:
    sizes = [60] + [1] * 20
    found = [
        measure_drift(draw(rng, 21, documents=sizes, shift=5.0), draw(rng, 40, documents=3), DriftConfig(), seed=0)
        for rng in map(np.random.default_rng, range(10))
    ]
    assert sum(drift.drifted for drift in found) >= 9


def test_a_source_counts_once_however_many_documents_it_has() -> None:
    """All documents twice: another number of documents, the same means, the same verdict."""
    rng = np.random.default_rng(4)
    sides = [draw(rng, n, documents=3, between=3.0, shift=s) for n, s in ((8, 2.0), (9, 0.0))]
    twice = [
        DocumentSample(np.repeat(side.features_ND, 2, axis=0), [s for s in side.sources for _ in "ab"], side.counts_K)
        for side in sides
    ]
    once, again = (measure_drift(new, old, DriftConfig(), seed=0) for new, old in (sides, twice))
    assert once.auc == pytest.approx(again.auc, abs=2e-6)
    assert once.null_quantile == pytest.approx(again.null_quantile, abs=2e-6)


def test_a_source_weighs_as_much_as_its_mean_is_known() -> None:
    """By simulation: means of 1 and 25 documents have variances 1 + 4 and 1 + 4 / 25, and weights in inverse ratio."""
    rng = np.random.default_rng(0)
    source_N = np.repeat(np.arange(2000), [1, 25] * 1000)
    x_ND = rng.normal(size=(2000, 5))[source_N] + 2 * rng.normal(size=(len(source_N), 5))
    weight_S = source_weights(x_ND, source_N)
    assert np.ptp(weight_S[::2]) == np.ptp(weight_S[1::2]) == 0 and weight_S.mean() == pytest.approx(1.0)
    assert weight_S[1] / weight_S[0] == pytest.approx(5 / 1.16, rel=0.1)


def test_a_source_weighs_by_its_documents_alone_where_sources_are_alike() -> None:
    """Means that lie nearer to each other than their documents' scatter explains: no variance between sources."""
    x_ND = np.array([[-1.0], [1.0], [-1.0], [0.0], [1.0], [0.1]])
    weight_S = source_weights(x_ND, np.array([0, 0, 1, 1, 1, 2]))
    assert weight_S == pytest.approx(np.array([2, 3, 1]) / 2)


def test_relabellings_are_distinct_and_all_if_they_are_few() -> None:
    for num_new, num_old in ((2, 2), (2, 3), (3, 3), (4, 2)):
        number = math.comb(num_new + num_old, num_new)
        for permutations in (1, number - 3, number - 2, number - 1, number, 2 * number):
            labels_SP = _permuted_labels(num_new, num_old, permutations, np.random.default_rng(0))
            columns = list(map(tuple, labels_SP.T.astype(int).tolist()))
            assert columns[0] == (1,) * num_new + (0,) * num_old
            assert len(set(columns)) == len(columns) == 1 + min(permutations, number - 1)
            assert {sum(column) for column in columns} == {num_new}


def test_the_correlation_that_breaks_ties_is_pearson_s() -> None:
    rng = np.random.default_rng(0)
    scores_SP, labels_SP = rng.normal(3, 1, size=(9, 4)), (rng.random((9, 4)) < 0.4).astype(float)
    expected = [np.corrcoef(scores_SP[:, p], labels_SP[:, p])[0, 1] for p in range(4)]
    assert _correlation(scores_SP, labels_SP) == pytest.approx(expected)
    assert _correlation(np.ones((9, 4)), labels_SP).tolist() == [0.0] * 4


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
    assert drifts[0].words.startswith(
        "Drift: a classifier tells new sources that it has not seen from old ones with an AUC"
    )


def test_a_shift_too_small_to_matter_is_no_drift_however_certain() -> None:
    rng = np.random.default_rng(0)
    new, old = by_document(draw(rng, 30, shift=0.8, between=0.0)), by_document(draw(rng, 30, between=0.0))
    drift = measure_drift(new, old, DriftConfig(auc=0.75), seed=0)
    assert drift.auc is not None and drift.null_quantile is not None
    assert drift.null_quantile < drift.auc < 0.75 and not drift.drifted
    assert drift.words.startswith("No drift: ") and "0.75 is the least that counts" in drift.words
    assert measure_drift(new, old, DriftConfig(auc=0.6), seed=0).drifted
    assert measure_drift(new, old, DriftConfig(auc=drift.auc), seed=0).drifted  # the least that counts does count


@pytest.mark.parametrize(("new", "old"), [(1, 30), (30, 1), (2, 12), (4, 4)])
def test_too_few_sources_give_no_answer_even_for_a_huge_shift(new: int, old: int) -> None:
    rng = np.random.default_rng(0)
    drift = measure_drift(draw(rng, new, shift=50.0), draw(rng, old), DriftConfig(), seed=0)
    assert drift.null_quantile is None and not drift.drifted
    assert (drift.auc is None) == (min(new, old) == 1)
    assert drift.words == (
        f"No answer: {new} new and {old} old source(s) are too few to tell drift from the differences that sources "
        f"have anyway."
    )


@pytest.mark.parametrize(("new", "old"), [(2, 13), (4, 5), (5, 5)])
def test_a_hundred_distinct_relabellings_suffice(new: int, old: int) -> None:
    # 105, 126, and 252 / 2 since a relabelling and its mirror image have the same area.
    # Chance reaches an area of 1 as well with so few sources; what sets the truth apart is by how much.
    rng = np.random.default_rng(0)
    far = draw(rng, new)
    drift = measure_drift(replace(far, features_ND=far.features_ND + 20), draw(rng, old), DriftConfig(), seed=0)
    assert drift.null_quantile is not None and drift.drifted and drift.auc is not None and drift.auc > 0.99


def test_what_cannot_be_reached_with_few_relabellings_is_no_answer() -> None:
    rng = np.random.default_rng(0)
    strict = DriftConfig(quantile=0.995, permutations=399)  # 1 / 126 is more than 0.005
    assert measure_drift(draw(rng, 4, shift=50.0), draw(rng, 5), strict, seed=0).null_quantile is None


def test_the_area_is_that_of_a_ridge_regression_for_each_left_out_source() -> None:
    rng, sizes = np.random.default_rng(3), [1, 2, 3, 9, 4, 4, 1, 7, 2]  # four new sources; fewer than there are folds
    new, old = draw(rng, 4, documents=sizes[:4], shift=15.0), draw(rng, 5, documents=sizes[4:])
    groups = np.split(np.concatenate([new.features_ND, old.features_ND]), np.cumsum(sizes)[:-1])
    means_SD = np.stack([group.mean(axis=0) for group in groups])
    unit_D = means_SD.std(axis=0)
    # One-way analysis of variance, feature by feature, in those units.
    within = np.mean([sum(((g[:, d] - g[:, d].mean()) ** 2).sum() for g in groups) / 24 / unit_D[d] ** 2
                      for d in range(WIDTH)])  # fmt: skip
    between = np.mean([np.var(means_SD[:, d], ddof=1) / unit_D[d] ** 2 for d in range(WIDTH)])
    between -= within * np.mean([1 / size for size in sizes])
    assert between > 0
    weight_S = np.array([1 / (between + within / size) for size in sizes])

    def centred(a: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return a - (weights[:, None] * a).sum(axis=0) / weights.sum()  # type: ignore[no-any-return]

    x_SD = centred(means_SD, weight_S)
    x_SD /= np.sqrt((weight_S[:, None] * x_SD**2).sum(axis=0) / weight_S.sum())
    y_S, scores_S = (np.arange(9) < 4).astype(float), np.empty(9)
    for source in range(9):
        train = np.arange(9) != source
        weights = weight_S[train]
        z = centred(x_SD[train], weights)
        alpha = (weights[:, None] * z**2).sum() / 8  # the mean eigenvalue
        fit = Ridge(alpha=alpha).fit(x_SD[train], y_S[train], sample_weight=weights)
        away_D = x_SD[source] - (x_SD[train] - z)[0]
        scores_S[source] = np.sqrt(weight_S[source]) * (away_D @ fit.coef_)
    expected = mannwhitneyu(scores_S[:4], scores_S[4:]).statistic / 20
    found = measure_drift(new, old, DriftConfig(), seed=0).auc
    assert found == pytest.approx(expected, abs=2e-6)  # ties are broken there
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
    drift = measure_drift(flat(10), flat(12), DriftConfig(auc=0.5), seed=0)  # enough, but no more than chance reaches
    assert (drift.auc, drift.null_quantile, drift.drifted) == (0.5, 0.5, False)


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


def test_area_under_curve_is_mann_whitney_s_statistic() -> None:
    rng = np.random.default_rng(1)
    scores_NP = rng.integers(0, 6, size=(40, 8)).astype(float)  # many ties
    labels_NP = (rng.random((40, 8)) < 0.3).astype(float)
    for column, area in enumerate(area_under_curve(scores_NP, labels_NP)):
        positive = labels_NP[:, column] > 0
        found = mannwhitneyu(scores_NP[positive, column], scores_NP[~positive, column])
        assert area == pytest.approx(found.statistic / (positive.sum() * (~positive).sum()), abs=1e-12)


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
