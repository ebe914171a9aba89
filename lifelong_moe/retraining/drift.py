"""Drift: do new documents come from another distribution than old ones? A classifier two-sample test over sources.

A classifier is trained to tell new sources from old ones, and its AUC is compared with the null distribution of AUCs
under permuted labels. Numbers only; features come from the caller and must not depend on which side a document is on.

Legend: N documents of both sides, S sources of both sides, D feature width, K clusters, P permutations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from lifelong_moe.config.retraining.policy import DriftConfig
from lifelong_moe.retraining.drifted import Drift

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]

FOLDS = 10
"""Folds of the cross-validation; one per source if there are fewer."""
# Results hardly depend on it.
SHRINKAGE = 1.0
"""Ridge penalty in units of the features' mean variance over their principal axes."""
# With few sources several labellings reach an AUC of 1, and the truth would not stand out however far apart the sides
# are. The weight is below any step of the AUC, so the correlation breaks ties and nothing else.
TIE = 1e-6
"""Weight of the correlation of scores and labels beside the AUC."""

# Made once: looking for the libraries takes longer than the test.
_THREADS = ThreadpoolController()


@dataclass(frozen=True, eq=False)
class DocumentSample:
    """Features and sources of the documents of one side."""

    features_ND: Floats
    """Finite features ``(N, D)``, computed alike on both sides."""
    sources: Sequence[str]
    """Source of each document."""
    counts_K: Ints
    """Documents in each cluster, ``(K,)``; may count more documents than there are features of."""

    def __post_init__(self) -> None:
        if not len(self.sources) or np.ndim(self.features_ND) != 2 or len(self.features_ND) != len(self.sources):
            raise ValueError(f"features {np.shape(self.features_ND)} do not fit {len(self.sources)} document(s)")
        if not np.isfinite(self.features_ND).all():
            raise ValueError("a feature is not finite")

    def subsample(self, limit: int, *, seed: int) -> tuple[NDArray[np.float64], Ints]:
        """Features of at most ``limit`` documents, and the index of their sources, from 0."""
        rows = choose_documents(self.sources, limit, seed=seed)
        _, source_N = np.unique(np.array(self.sources)[rows], return_inverse=True)
        return np.asarray(self.features_ND, dtype=np.float64)[rows], source_N


def measure_drift(new: DocumentSample, old: DocumentSample, config: DriftConfig, *, seed: int) -> Drift:
    """Test whether new documents come from another distribution than those the model has learned.

    The classifier is ridge regression on the standardized mean features of sources, weighted by the precision of each
    mean: the direction of a regularized Fisher discriminant. It is cross-validated over sources, so it finds only what
    new *sources* have in common.

    Args:
        new: New documents. A source that is on both sides counts as two, which can only hide drift.
        old: Documents that the model has learned.
        config: Limits of the test.
        seed: Of the choice of documents, the folds and the permutations; same seed, same result.

    Raises:
        ValueError: If the sides differ in the number of features or clusters.

    Source:
        Classifier two-sample tests (arXiv:1610.06545); exact p-values of sampled permutations: Phipson and Smyth 2010.
    """
    (new_ND, new_source_N), (old_ND, old_source_N) = (
        side.subsample(config.documents, seed=seed) for side in (new, old)
    )
    num_new, num_old = int(new_source_N.max()) + 1, int(old_source_N.max()) + 1
    psi = population_stability(new.counts_K, old.counts_K)
    auc = limit = None
    if min(num_new, num_old) >= 2:  # a single source would leave none to train on
        rng = np.random.default_rng(seed)
        # Labels of sources are permuted. Documents of one source resemble each other: with documents permuted, data
        # without drift raises an alarm nearly always.
        labels_SP = _permuted_labels(num_new, num_old, config.permutations, rng)
        x_ND, source_N = np.concatenate([new_ND, old_ND]), np.concatenate([new_source_N, num_new + old_source_N])
        # A source counts once, as the mean of its documents. Counted by document, one large source decides, and the
        # null distribution, whose new side seldom has as large a one, comes out too low.
        means_SD, weight_S = source_means(x_ND, source_N), source_weights(x_ND, source_N)
        # One thread, since their number changes the last bits of a product. Scores are linear in the labels, so one
        # matrix serves all permutations.
        with _THREADS.limit(limits=1):
            # shape: (S, S) @ (S, 1 + P)
            scores_SP = _scoring_matrix(means_SD, weight_S, rng) @ labels_SP
        aucs_P = area_under_curve(scores_SP, labels_SP) + TIE * _correlation(scores_SP, labels_SP)
        auc, limit = float(aucs_P[0]), _upper_quantile(aucs_P[1:], config.quantile, num_new == num_old)
    drifted = auc is not None and limit is not None and auc > limit and auc >= config.auc
    return Drift(
        auc=auc,
        null_quantile=limit,
        psi=psi,
        new_sources=num_new,
        old_sources=num_old,
        drifted=drifted,
        words=_sentence(auc, limit, drifted, num_new, num_old, config),
    )


def choose_documents(sources: Sequence[str], limit: int, *, seed: int) -> NDArray[np.int64]:
    """Choose at most ``limit`` documents in round robin over sources, so that each source has as many as possible.

    Returns:
        Their indices, ascending; all of them if they are no more than ``limit``.
    """
    order = np.random.default_rng(seed).permutation(len(sources))
    taken: dict[str, int] = {}
    turn = np.empty(len(sources), dtype=np.int64)
    for index in order:
        turn[index] = taken[sources[index]] = taken.get(sources[index], -1) + 1
    return np.sort(order[np.argsort(turn[order], kind="stable")][:limit])


def source_means(x_ND: Floats, source_N: Ints) -> NDArray[np.float64]:
    """Mean features of each source ``(S, D)``; ``source_N`` numbers sources from 0 without gaps."""
    sums_SD: NDArray[np.float64] = np.zeros((int(source_N.max()) + 1, np.shape(x_ND)[1]))
    np.add.at(sums_SD, source_N, x_ND)
    return sums_SD / np.bincount(source_N)[:, None]


def source_weights(x_ND: Floats, source_N: Ints) -> NDArray[np.float64]:
    """Precision of each source's mean features, scaled to a mean of 1 over sources ``(S,)``.

    The mean of n documents has variance ``b + w / n``, with ``b`` the variance between sources and ``w`` that within
    them, from a one-way analysis of variance pooled over standardized features. So a source of one document weighs less
    than one of ten, and one of ten nearly as much as one of thousands.

    Source:
        Moment estimates of the random-effects model: Searle, Casella, McCulloch, Variance Components, 1992, sec. 3.6.
    """
    documents_S, means_SD = np.bincount(source_N), source_means(x_ND, source_N)
    deviation_D = means_SD.std(axis=0)
    unit_D = np.where(deviation_D > 0, deviation_D, 1.0)
    within = (((x_ND - means_SD[source_N]) / unit_D) ** 2).sum() / max(1, len(x_ND) - len(means_SD))
    between = (means_SD / unit_D).var(axis=0, ddof=1).sum() - within * (1 / documents_S).mean()
    # The moment estimate of the variance between sources can be negative.
    variance_S = max(between, 0.0) + within / documents_S
    if not variance_S.all():  # all documents are equal
        return np.ones(len(variance_S))
    return (1 / variance_S) / (1 / variance_S).mean()


def population_stability(new_counts_K: Ints, old_counts_K: Ints) -> float:
    """Population stability index of two histograms, bias removed: ``sum (p - q) ln(p / q) - (K - 1)(1/n + 1/m)``.

    For independent documents of one distribution its expectation is about 0, so values may be negative. Clusters empty
    on both sides do not count.

    Args:
        new_counts_K: n documents by cluster, ``(K,)``.
        old_counts_K: m documents by cluster, ``(K,)``.

    Returns:
        Nats.

    Raises:
        ValueError: If a side has no document or the sides have other numbers of clusters.
    """
    counts_2K = np.stack([np.asarray(new_counts_K, float), np.asarray(old_counts_K, float)])
    total_2 = counts_2K.sum(axis=1)
    if not total_2.all():
        raise ValueError("each side needs a document")
    # Half a document more in each cluster: an empty one would make the index infinite.
    counts_2K = counts_2K[:, counts_2K.any(axis=0)] + 0.5
    p_K, q_K = counts_2K / counts_2K.sum(axis=1, keepdims=True)
    bias = (len(p_K) - 1) * (1 / total_2).sum()
    return float(((p_K - q_K) * np.log(p_K / q_K)).sum() - bias)


def area_under_curve(scores_NP: Floats, labels_NP: Floats) -> NDArray[np.float64]:
    """Probability that a positive scores above a negative, ties counting half; column by column.

    Args:
        scores_NP: Scores ``(N, P)``.
        labels_NP: 1 for positives, 0 for negatives; each column has both.
    """
    from scipy.stats import rankdata  # on use, as in ``bounds.py``

    positives_P = labels_NP.sum(axis=0)
    rank_sums_P = (rankdata(scores_NP, axis=0) * labels_NP).sum(axis=0)
    return (rank_sums_P - positives_P * (positives_P + 1) / 2) / (positives_P * (len(labels_NP) - positives_P))


def _correlation(scores_SP: Floats, labels_SP: Floats) -> NDArray[np.float64]:
    """Pearson's correlation of scores and labels, column by column; 0 where scores are all equal."""
    x_SP, y_SP = (a - a.mean(axis=0) for a in (scores_SP, labels_SP))
    norm_P = np.sqrt((x_SP**2).sum(axis=0) * (y_SP**2).sum(axis=0))
    return (x_SP * y_SP).sum(axis=0) / np.where(norm_P > 0, norm_P, 1.0)


def _permuted_labels(num_new: int, num_old: int, permutations: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Labels of sources, 1 for new, ``(S, 1 + P)``: the truth in column 0, then distinct permutations.

    P is ``permutations``, or the number of all others if there are fewer.
    """
    num, truth = num_new + num_old, tuple(range(num_new))
    chosen = {truth: None}  # a dict keeps the order
    if math.comb(num, num_new) - 1 <= permutations:
        chosen |= dict.fromkeys(itertools.combinations(range(num), num_new))
    while len(chosen) <= min(permutations, math.comb(num, num_new) - 1):
        chosen[tuple(sorted(rng.choice(num, num_new, replace=False).tolist()))] = None
    labels_SP = np.zeros((num, len(chosen)))
    for column, new in enumerate(chosen):
        labels_SP[list(new), column] = 1.0
    return labels_SP


def _scoring_matrix(x_SD: Floats, weight_S: Floats, rng: np.random.Generator) -> NDArray[np.float64]:
    """Matrix ``(S, S)`` from labels to cross-validated scores of sources, by weighted ridge regression.

    Ridge in its dual form: with W the weights and Z the training features, centred by their weighted mean and times
    ``sqrt(W)``, ``score(x) = sqrt(w) (x - mean) Z^T (Z Z^T + r)^-1 sqrt(W) C y``, C centring the labels alike.
    """
    centre_D = np.average(x_SD, axis=0, weights=weight_S)
    deviation_D = np.sqrt(np.average((x_SD - centre_D) ** 2, axis=0, weights=weight_S))
    x_SD = (x_SD - centre_D) / np.where(deviation_D > 0, deviation_D, 1.0)
    fold_S = rng.permutation(len(x_SD)) % FOLDS
    matrix_SS = np.zeros((len(x_SD), len(x_SD)))
    for fold in np.unique(fold_S):
        test, train = fold_S == fold, fold_S != fold
        share, root_S = weight_S[train] / weight_S[train].sum(), np.sqrt(weight_S)
        mean_D = share @ x_SD[train]
        # shape: (training sources, D)
        z = (x_SD[train] - mean_D) * root_S[train, None]
        gram = z @ z.T
        ridge = SHRINKAGE * np.trace(gram) / min(z.shape) or 1.0  # equal features: any penalty gives scores of 0
        # A score is in units of its standard deviation, hence times sqrt(w). Otherwise the side with the smaller
        # sources has the wider scores, which alone makes the null distribution too low.
        left_out = (x_SD[test] - mean_D) * root_S[test, None]
        solved = np.linalg.solve(gram + ridge * np.eye(len(gram)), z @ left_out.T).T * root_S[train]
        # Labels are centred and no intercept is added: the intercept of a fold would tell which labels were left out.
        matrix_SS[np.ix_(test, train)] = solved - np.outer(solved.sum(axis=1), share)
    return matrix_SS


def _upper_quantile(null_P: Floats, quantile: float, mirrored: bool) -> float | None:
    """Critical value of the AUC: above it the permutation p-value is at most ``1 - quantile``.

    None if even the largest AUC of all ``P + 1`` labellings has a larger p-value. When ``mirrored``, each labelling has
    a mirror image with the same AUC.
    """
    # Labellings that may reach the truth's AUC, the truth included; 1e-9 against (1 - quantile) rounded down.
    most = math.floor((len(null_P) + 1) * (1 - quantile) + 1e-9)
    return float(np.sort(null_P)[-most]) if most > int(mirrored) else None


def _sentence(
    auc: float | None, limit: float | None, drifted: bool, num_new: int, num_old: int, config: DriftConfig
) -> str:
    sources = f"{num_new} new and {num_old} old source(s)"
    if auc is None or limit is None:
        return f"No answer: {sources} are too few to tell drift from the differences that sources have anyway."
    found = (
        f"a classifier tells new sources that it has not seen from old ones with an AUC of {auc:.2f} "
        f"({sources}; chance stays below {limit:.2f} in {config.quantile:.0%} of cases, and {config.auc:.2f} is "
        f"the least that counts)"
    )
    return f"Drift: {found}." if drifted else f"No drift: {found}."
