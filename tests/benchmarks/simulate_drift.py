"""How often drift is found where there is none, and where there is: sources of many sizes, and mixtures of known kinds.

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/benchmarks/simulate_drift.py --out drift.json

Documents are vectors: their source's effect (standard deviation 1 in each feature, times a spectrum) and their own
deviation from it, ``within`` as large. The rule before is beside: it classified documents, each counting once.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from lifelong_moe.config.retraining.policy import DriftConfig
from lifelong_moe.retraining.drift import DocumentSample, choose_documents, measure_drift
from lifelong_moe.retraining.mixtures import draw_mixture, nearest_shares
from tests.benchmarks.provenance import keep, made_with

WIDTH = 32
SPECTRUM = np.arange(1, WIDTH + 1) ** -0.5
SHIFTED = slice(8, 16)
"""Features that a drift moves."""
SHIFT = 2.5
"""By how many standard deviations of sources."""
CONFIG = DriftConfig()
DESIGNS: dict[str, tuple[list[int], list[int]]] = {
    "41 of 150, 1, 1, … : 100 of 4": ([150] + [1] * 40, [4] * 100),
    "100 of 4 : 41 of 150, 1, 1, …": ([4] * 100, [150] + [1] * 40),
    "20 of 1 : 10 of 40": ([1] * 20, [40] * 10),
    "10 of 40 : 20 of 1": ([40] * 10, [1] * 20),
    "5 of 1 : 20 of 20": ([1] * 5, [20] * 20),
    "20 of 20 : 5 of 1": ([20] * 20, [1] * 5),
    "50 of 1 : 20 of 20": ([1] * 50, [20] * 20),
    "20 of 200/n : 40 of 200/n": ([200 // n for n in range(1, 21)], [200 // n for n in range(1, 41)]),
    "12 of 6 : 15 of 6": ([6] * 12, [6] * 15),
}
WITHIN = (0.5, 2.0, 6.0)


def draw(
    rng: np.random.Generator, sizes: list[int], within: float, centre_D: NDArray[np.float64] | float = 0.0
) -> DocumentSample:
    """Documents of sources of these sizes around a centre."""
    source_N = np.repeat(np.arange(len(sizes)), sizes)
    effects_SD = centre_D + rng.normal(size=(len(sizes), WIDTH)) * SPECTRUM
    x_ND = effects_SD[source_N] + within * rng.normal(size=(len(source_N), WIDTH)) * SPECTRUM
    return DocumentSample(x_ND, [f"source {s}" for s in source_N], np.array([len(source_N)]))


def shift(size: float) -> NDArray[np.float64]:
    moved_D = np.zeros(WIDTH)
    moved_D[SHIFTED] = size * SPECTRUM[SHIFTED]
    return moved_D


def drifted_by_documents(new: DocumentSample, old: DocumentSample, seed: int) -> bool:
    """The rule before: ridge regression and area over documents, sources exchanged."""
    rng, sides = np.random.default_rng(seed), []
    for side in (new, old):
        rows = choose_documents(side.sources, CONFIG.documents, seed=seed)
        sides.append((side.features_ND[rows], np.unique(np.array(side.sources)[rows], return_inverse=True)[1]))
    (new_ND, new_N), (old_ND, old_N) = sides
    num_new, num = new_N.max() + 1, new_N.max() + old_N.max() + 2
    source_N = np.concatenate([new_N, num_new + old_N])
    x_ND = np.concatenate([new_ND, old_ND])
    x_ND = (x_ND - x_ND.mean(axis=0)) / x_ND.std(axis=0)
    fold_N = (rng.permutation(num) % 10)[source_N]
    scoring_NN = np.zeros((len(x_ND), len(x_ND)))
    for fold in np.unique(fold_N):
        test, train = fold_N == fold, fold_N != fold
        z = x_ND[train] - x_ND[train].mean(axis=0)
        inverse = np.linalg.inv(z.T @ z + np.trace(z.T @ z) / min(z.shape) * np.eye(WIDTH))
        found = (x_ND[test] - x_ND[train].mean(axis=0)) @ inverse @ z.T
        scoring_NN[np.ix_(test, train)] = found - found.mean(axis=1, keepdims=True)

    def area(positive_S: NDArray[np.bool_]) -> float:
        y_N = positive_S[source_N]
        scores_N = scoring_NN @ y_N
        return float(mannwhitneyu(scores_N[y_N], scores_N[~y_N]).statistic / (y_N.sum() * (~y_N).sum()))

    truth_S = np.arange(num) < num_new
    found, chance = area(truth_S), [area(rng.permutation(truth_S)) for _ in range(CONFIG.permutations)]
    return bool(found > np.sort(chance)[-2] and found >= CONFIG.auc)


def share(trial: Callable[[int], bool], repetitions: int) -> float:
    return sum(trial(seed) for seed in range(repetitions)) / repetitions


def sizes_trial(seed: int, design: str, within: float, size: float, *, by_document: bool) -> bool:
    """Whether drift is found, by this rule or the one before."""
    rng, (new_sizes, old_sizes) = np.random.default_rng((11, seed)), DESIGNS[design]
    new, old = draw(rng, new_sizes, within, shift(size)), draw(rng, old_sizes, within)
    return drifted_by_documents(new, old, seed) if by_document else measure_drift(new, old, CONFIG, seed=seed).drifted


def sizes_table(repetitions: int, before: int) -> list[dict[str, Any]]:
    """Alarms without drift and with it, by this rule and the one before."""
    rows = []
    for design, within in itertools.product(DESIGNS, WITHIN):
        row: dict[str, Any] = {"design": design, "within": within}
        for name, size in (("alarms", 0.0), ("power", SHIFT)):
            trial = partial(sizes_trial, design=design, within=within, size=size)
            row[name] = share(partial(trial, by_document=False), repetitions)
            row[f"{name}_before"] = share(partial(trial, by_document=True), before)
        rows.append(row)
        cells = [design, str(within), f"{row['alarms']:.1%}", f"{row['alarms_before']:.0%}"]
        print("|", " | ".join([*cells, f"{row['power']:.0%}", f"{row['power_before']:.0%}"]), "|", flush=True)
    return rows


MIXTURES: dict[str, tuple[list[float], bool]] = {
    "the first kind of 2": ([1.0, 0.0], False),
    "half and half of 2": ([0.5, 0.5], False),
    "90 % and 10 % of 2": ([0.9, 0.1], False),
    "half and half, 2 of 5": ([0.5, 0.5, 0.0, 0.0, 0.0], False),
    "all 5 alike": ([0.2] * 5, False),
    "a new kind beside 2": ([0.0, 0.0], True),
    "a new kind beside 5": ([0.0] * 5, True),
    "half new, half the first of 2": ([0.5, 0.0], True),
}


def mixture_trial(seed: int, shares: list[float]) -> tuple[bool, bool, bool]:
    """Whether it drifts from each known kind, from all of them together as well, and from the nearest mixture as well.

    30 new sources of 4 documents; 40 of each known kind. What shares lack of 1 is of a new kind.
    """
    rng = np.random.default_rng((13, seed))
    centres = [rng.normal(size=WIDTH) * SPECTRUM * 2 for _ in range(len(shares) + 1)]
    parts = [*shares, 1 - sum(shares)]
    new = joined([draw(rng, [4] * round(30 * p), 1.0, c) for p, c in zip(parts, centres, strict=True) if p > 0])
    old = {f"kind {k}": draw(rng, [4] * 40, 1.0, centre) for k, centre in enumerate(centres[:-1])}
    each = all(measure_drift(new, side, CONFIG, seed=seed).drifted for side in old.values())
    if not each:
        return False, False, False
    rows = draw_mixture(old, nearest_shares(new, old), seed=seed)
    nearest = joined([part(old[name], chosen) for name, chosen in rows.items()])
    pooled = measure_drift(new, joined(list(old.values())), CONFIG, seed=seed).drifted
    return True, pooled, measure_drift(new, nearest, CONFIG, seed=seed).drifted


def part(side: DocumentSample, rows: list[int]) -> DocumentSample:
    return DocumentSample(side.features_ND[rows], [side.sources[row] for row in rows], side.counts_K)


def joined(sides: list[DocumentSample]) -> DocumentSample:
    names = [f"{number} {source}" for number, side in enumerate(sides) for source in side.sources]
    return DocumentSample(np.concatenate([side.features_ND for side in sides]), names, sides[0].counts_K)


def mixtures_table(repetitions: int) -> list[dict[str, Any]]:
    """How often a batch counts as a new kind."""
    rows = []
    for name, (shares, wanted) in MIXTURES.items():
        found = np.mean([mixture_trial(seed, shares) for seed in range(repetitions)], axis=0)
        row = {"batch": name, "is_new": wanted} | dict(zip(("each", "pooled", "nearest"), found.tolist(), strict=True))
        rows.append(row)
        print("| {batch} | {each:.0%} | {pooled:.0%} | {nearest:.1%} |".format(**row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=300)
    parser.add_argument("--before", type=int, default=100, help="repetitions of the rule before, which takes long")
    options, origin = parser.parse_args(), made_with()
    print("| sources, new : old | within | alarms | before | power | before |\n|---|---:|---:|---:|---:|---:|")
    sizes = sizes_table(options.repetitions, options.before)
    print("\n| batch | each | each, all | each, nearest mixture |\n|---|---:|---:|---:|")
    keep(options.out, {"sizes": sizes, "mixtures": mixtures_table(options.repetitions)}, origin)


if __name__ == "__main__":
    main()
