from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize

from lifelong_moe.config.retraining.policy import DriftConfig
from lifelong_moe.retraining.drift import DocumentSample, measure_drift
from lifelong_moe.retraining.mixtures import draw_mixture, nearest_shares

WIDTH = 16


def draw(rng: np.random.Generator, centre_D: NDArray[np.float64], num_sources: int, name: str = "") -> DocumentSample:
    """Sources of three documents around a centre."""
    effects_SD = centre_D + rng.normal(size=(num_sources, WIDTH))
    x_ND = np.repeat(effects_SD, 3, axis=0) + rng.normal(size=(3 * num_sources, WIDTH))
    return DocumentSample(x_ND, [f"{name}{i // 3}" for i in range(3 * num_sources)], np.array([3 * num_sources]))


def joined(sides: dict[str, DocumentSample]) -> DocumentSample:
    names = [f"{name} {source}" for name, side in sides.items() for source in side.sources]
    return DocumentSample(np.concatenate([side.features_ND for side in sides.values()]), names, np.array([len(names)]))


def kinds(rng: np.random.Generator, number: int) -> list[NDArray[np.float64]]:
    return [3 * rng.normal(size=WIDTH) for _ in range(number)]


def test_shares_are_the_best_of_all_that_sum_to_one() -> None:
    """Against a general optimizer, for a batch that no mixture fits exactly."""
    rng = np.random.default_rng(0)
    centres = kinds(rng, 4)
    old = {f"kind {k}": draw(rng, centre, 20) for k, centre in enumerate(centres[:3])}
    new = joined({"a": draw(rng, centres[0], 14), "b": draw(rng, centres[2], 4), "c": draw(rng, centres[3], 2)})
    means_SD = [side.features_ND.reshape(-1, 3, WIDTH).mean(axis=1) for side in (new, *old.values())]
    unit_D = np.concatenate(means_SD).std(axis=0)
    target_D, *known_D = (side.mean(axis=0) / unit_D for side in means_SD)

    def distance(shares_K: NDArray[np.float64]) -> float:
        return float(((shares_K @ np.stack(known_D) - target_D) ** 2).sum())

    found = minimize(
        distance, np.full(3, 1 / 3), bounds=[(0, 1)] * 3, constraints={"type": "eq", "fun": lambda x: x.sum() - 1}
    )
    shares = nearest_shares(new, old)
    assert list(shares.values()) == pytest.approx(found.x.tolist(), abs=1e-3)
    assert sum(shares.values()) == pytest.approx(1.0) and min(shares.values()) >= 0
    assert shares["kind 0"] > 0.5 > shares["kind 2"] > shares["kind 1"]


def test_a_mixture_is_drawn_by_whole_sources_in_its_shares() -> None:
    rng = np.random.default_rng(1)
    old = {name: draw(rng, np.zeros(WIDTH), number) for name, number in (("a", 40), ("b", 10), ("c", 30))}
    rows = draw_mixture(old, {"a": 0.75, "b": 0.25, "c": 0.0}, seed=0)
    assert {name: len(chosen) for name, chosen in rows.items()} == {"a": 90, "b": 30}  # 30 and 10 sources of three
    for name, chosen in rows.items():
        assert chosen == sorted(chosen)
        assert all(
            sum(old[name].sources[row] == s for row in chosen) == 3 for s in {old[name].sources[r] for r in chosen}
        )
    assert draw_mixture(old, {"a": 0.75, "b": 0.25, "c": 0.0}, seed=1) != rows
    assert {n: len(c) for n, c in draw_mixture(old, {"a": 0.0, "b": 1.0, "c": 0.0}, seed=0).items()} == {"b": 30}


@pytest.mark.parametrize(("shares", "is_new"), [([0.5, 0.5, 0, 0], False), ([0.8, 0, 0.2, 0], False), ([0] * 4, True)])
def test_a_mixture_of_known_kinds_is_no_new_kind(shares: list[float], is_new: bool) -> None:
    """Whatever its shares. More repetitions in tests/benchmarks/simulate_drift.py."""
    config, verdicts, alone = DriftConfig(), [], []
    for seed in range(10):
        rng = np.random.default_rng((3, seed))
        centres = kinds(rng, 5)
        old = {f"kind {k}": draw(rng, centre, 24) for k, centre in enumerate(centres[:4])}
        parts = [*shares, 1 - sum(shares)]
        new = joined({str(k): draw(rng, centres[k], round(20 * p)) for k, p in enumerate(parts) if p > 1e-9})
        rows = draw_mixture(old, nearest_shares(new, old), seed=seed)
        nearest = joined(
            {n: DocumentSample(old[n].features_ND[c], [old[n].sources[r] for r in c], old[n].counts_K)
             for n, c in rows.items()}
        )  # fmt: skip
        verdicts.append(measure_drift(new, nearest, config, seed=seed).drifted)
        alone.append(measure_drift(new, joined(old), config, seed=seed).drifted)
    assert sum(verdicts) == 10 if is_new else sum(verdicts) <= 1
    assert is_new or sum(alone) > sum(verdicts)  # the pool in its own shares would not do
