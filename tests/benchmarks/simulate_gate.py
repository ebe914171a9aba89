"""The gate's statistics by simulation: how often bounds miss the truth, and which candidates pass. Numbers only.

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/benchmarks/simulate_gate.py --out gate.json

Prints two tables, Markdown, and writes their numbers as JSON. "Before" is the rule that divided the level by the number
of distributions, tested each alone, and counted every source alike.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

from lifelong_moe.config.retraining.policy import GateConfig
from lifelong_moe.retraining.bounds import (
    Bounds,
    DocumentLosses,
    difference_bounds,
    effective_sources,
    has_enough_sources,
)
from lifelong_moe.retraining.gate import judge_derived
from tests.benchmarks.provenance import keep, made_with

LEVEL, RESAMPLES = 0.05, 400
SCATTER = 0.0085
"""Standard deviation of a source's change, nats per token: a check of ten sources alone passes 95 % of the harmless."""
SIZES: dict[str, list[int]] = {
    **{f"{number} equal": [1] * number for number in (2, 3, 5, 8, 20, 100)},
    **{f"one of 30 %, {number}": [3 * (number - 1), *[7] * (number - 1)] for number in (5, 20)},
    **{f"one of 50 %, {number}": [number - 1, *[1] * (number - 1)] for number in (3, 5, 20, 100)},
    **{f"one of 90 %, {number}": [9 * (number - 1), *[1] * (number - 1)] for number in (2, 5, 20, 100)},
}
"""Tokens of each source, in hundreds."""
NOISE = ("normal", "heavy", "skewed")
Floats = NDArray[np.float64]


def changes(rng: np.random.Generator, noise: str, size: int) -> Floats:
    """Changes of sources about 0: normal, Student's with 3 degrees of freedom, or exponential (few lose much)."""
    if noise == "skewed":
        return rng.exponential(size=size) - 1
    return rng.normal(size=size) if noise == "normal" else rng.standard_t(3, size=size)


def gate_set(change: Floats, tokens: Sequence[int] | NDArray[np.int64]) -> tuple[DocumentLosses, DocumentLosses]:
    """Losses after and before, a document each source."""
    names, sizes = [f"{i:03}" for i in range(len(change))], np.asarray(tokens)
    return DocumentLosses(change * sizes, sizes, names), DocumentLosses(np.zeros(len(change)), sizes, names)


def as_before(found: Bounds, sizes: NDArray[np.int64]) -> Bounds:
    """The bounds with S - 1 degrees of freedom in place of the effective number's."""
    number, count = effective_sources(sizes), len(sizes)
    now = math.sqrt(number / (number - 1)) * t.ppf(LEVEL, number - 1)
    then = math.sqrt(count / (count - 1)) * t.ppf(LEVEL, count - 1)
    return Bounds(found.mean, *(found.mean + then / now * (bound - found.mean) for bound in (found.lower, found.upper)))


def raw_bounds(after: DocumentLosses, seed: int) -> Bounds:
    """As :func:`difference` from no loss, also where that gives none."""
    sizes = after.sizes
    drawn = np.random.default_rng(seed).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=RESAMPLES)
    means, mean = (drawn @ after.nats) / (drawn @ sizes), after.nats.sum() / sizes.sum()
    number = effective_sources(sizes)
    widening = math.sqrt(number / (number - 1)) * t.ppf(LEVEL, number - 1) / norm.ppf(LEVEL)
    ends = np.quantile(means, LEVEL, method="lower"), np.quantile(means, 1 - LEVEL, method="higher")
    return Bounds(mean, *(mean + widening * (end - mean) for end in ends))


def coverage(trials: int) -> list[dict[str, Any]]:
    """Share of upper bounds at 5 % that the truth exceeds, by sizes of sources and noise; None: no verdict is given."""
    rows = []
    for name, hundreds in SIZES.items():
        sizes, row = 100 * np.array(hundreds), {"sources": name, "effective": effective_sources(np.array(hundreds))}
        rng = np.random.default_rng(0)
        for noise in NOISE:
            missed, wide, told = np.zeros(2), [], has_enough_sources(sizes)
            for seed in range(trials):
                after, before = gate_set(changes(rng, noise, len(sizes)), sizes)
                now = difference_bounds(after, before, level=LEVEL, resamples=RESAMPLES, seed=seed)
                then = as_before(raw_bounds(after, seed), sizes)
                missed += [then.upper < 0, now.upper < 0]
                if told:
                    wide.append((now.upper - now.mean) / (then.upper - then.mean))
            row |= {f"{noise}/before": missed[0] / trials, f"{noise}/now": missed[1] / trials if told else None}
            row[f"{noise}/width"] = float(np.median(wide)) if told else None
        rows.append(row)
    return rows


def before_passes(sets: Sequence[tuple[DocumentLosses, DocumentLosses]], config: GateConfig, seed: int) -> bool:
    """The rule of before; sources are equal here, so only the level differs, and that each is tested alone."""
    level = config.level / len(sets)
    for after, _ in sets:
        count, shift = len(after.sizes), raw_bounds(after, seed)
        error = math.sqrt(((after.nats / after.sizes - shift.mean) ** 2).sum() / (count - 1) / count)
        if shift.mean + t.ppf(1 - level, count - 1) * error > config.tolerance:
            return False
    return True


def passing(trials: int) -> list[dict[str, Any]]:
    """Share of candidates that pass, by number of distributions, of sources in each, and by what one of them loses."""
    config, rows = GateConfig(level=LEVEL, resamples=RESAMPLES), []
    for sources in (3, 5, 10, 20, 40):
        for number in (1, 5, 20, 50):
            row: dict[str, Any] = {"sources": sources, "distributions": number}
            for lost in (0.0, 0.02, 0.05):
                rng, count = np.random.default_rng(1), np.zeros(2)
                for seed in range(trials):
                    means = np.where(np.arange(number) == number // 2, lost, 0.0)
                    tokens = np.full(sources, 100)
                    sets = [gate_set(rng.normal(mean, SCATTER, sources), tokens) for mean in means]
                    after, before = ({f"d{k:02}": pair[side] for k, pair in enumerate(sets)} for side in (0, 1))
                    verdict = judge_derived(after=after, before=before, config=config, seed=seed)
                    count += [before_passes(sets, config, seed), verdict.passed]
                row |= {f"{lost}/before": count[0] / trials, f"{lost}/now": count[1] / trials}
            row["checks"] = sum(check.name.endswith("step") for check in verdict.checks)
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def percent(value: float) -> str:
    """In a table's cell."""
    return f"{100 * value:.1f}" if value < 0.1 else f"{100 * value:.0f}"


def tables(found: dict[str, Any]) -> str:
    """Both, as Markdown."""
    lines = ["| sources | effective | normal | heavy | skewed |", "|---|---:|---:|---:|---:|"]
    for row in found["coverage"]:
        told = row["normal/now"] is not None
        cells = [f"{percent(row[f'{n}/before'])} → {percent(row[f'{n}/now']) if told else 'none'}" for n in NOISE]
        lines.append(f"| {row['sources']} | {row['effective']:.1f} | {' | '.join(cells)} |")
    lines += [
        "",
        "| sources each | K | checks | harmless | one loses 0.02 | one loses 0.05 |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["passing"]:
        cells = [f"{percent(row[f'{lost}/before'])} → {percent(row[f'{lost}/now'])}" for lost in (0.0, 0.02, 0.05)]
        lines.append(f"| {row['sources']} | {row['distributions']} | {row['checks']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Simulate, print and write."""
    parser = argparse.ArgumentParser(description="The gate's statistics by simulation.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--coverage-trials", type=int, default=3000)
    parser.add_argument("--passing-trials", type=int, default=300)
    arguments, origin = parser.parse_args(), made_with()
    found = {
        "coverage": coverage(arguments.coverage_trials),
        "passing": passing(arguments.passing_trials),
        "scatter": SCATTER,
        "trials": [arguments.coverage_trials, arguments.passing_trials],
    }
    keep(arguments.out, found, origin)
    print(tables(found))


if __name__ == "__main__":
    main()
