"""Skip, wait or act: how often each is said of a gain that is planted, by the number of held-out sources. Numbers only.

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/benchmarks/simulate_waiting.py --out waiting.json

A source's gain scatters about the planted one by 0.4 nats per token, and a document's about its source's by as much; a
source has 1 to 6 documents of 50 to 400 tokens. What order is worth is planted at 2. "Before" is the rule that skipped
for good whatever was not certain, with the bounds of today.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from lifelong_moe.retraining.bounds import DocumentLosses, difference
from lifelong_moe.retraining.config import DecisionConfig, GateConfig
from lifelong_moe.retraining.decision import Action, ProbeResult, decide

SOURCES, GAINS, TRIALS, RESAMPLES, SCATTER = (1, 2, 3, 5, 10, 20), (-0.5, 0.0, 0.1, 0.5, 2.8), 200, 400, 0.4


def planted(rng: np.random.Generator, sources: int, gain: float) -> tuple[DocumentLosses, DocumentLosses]:
    """Losses after and before."""
    names = np.repeat(np.arange(sources), rng.integers(1, 7, size=sources))
    tokens = rng.integers(50, 401, size=len(names))
    found = gain + SCATTER * (rng.normal(size=sources)[names] + rng.normal(size=len(names)))
    labels = [str(name) for name in names]
    return DocumentLosses(-found * tokens, tokens, labels), DocumentLosses(np.zeros(len(names)), tokens, labels)


def verdicts(sources: int, gain: float, seed: int) -> tuple[str, str]:
    """What is decided now, and what was before."""
    rng = np.random.default_rng([sources, seed, round(1000 * (gain + 1))])
    bounds = [-difference(*planted(rng, sources, one), level=0.05, resamples=RESAMPLES, seed=seed) for one in (gain, 2)]
    probe = ProbeResult(
        gain=bounds[0].mean, gain_lower=bounds[0].lower, gain_upper=bounds[0].upper, structure=bounds[1].lower,
        structure_upper=bounds[1].upper, forgetting=0.0, forgetting_lower=0.0, leak=0.0, parameters_fraction=0.1,
        cost_fraction=0.3,
    )  # fmt: skip
    config = DecisionConfig()
    found = decide(continued=None, grown=[("Growing", probe)], drifted=True, config=config, gate=GateConfig())
    certain = probe.structure >= config.min_structure and probe.gain_lower >= config.min_gain
    return str(found.action), str(Action.grow if certain and found.terms["grow/utility"] > 0 else Action.skip)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| held-out sources | gain | acts | waits | skips | skipped before |\n|---:|---:|---:|---:|---:|---:|")
    for sources in SOURCES:
        for gain in GAINS:
            both = [verdicts(sources, gain, seed) for seed in range(TRIALS)]
            now, before = (Counter(said) for said in zip(*both, strict=True))
            shares = {action: now[action] / TRIALS for action in ("grow", "wait", "skip")}
            rows.append({"sources": sources, "gain": gain, **shares, "skipped_before": before["skip"] / TRIALS})
            cells = (sources, gain, *(f"{100 * share:.0f}" for share in (*shares.values(), before["skip"] / TRIALS)))
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    options.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
