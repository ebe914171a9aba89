"""Skip, wait or act: how often each is said of a gain that is planted, by the number of held-out sources. Numbers only.

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/benchmarks/simulate_waiting.py --out waiting.json

A source's gain scatters about the planted one by 0.4 nats per token, and a document's about its source's by as much; a
source has 1 to 6 documents of 50 to 400 tokens. What order is worth is planted at 2. "Before" is the rule that skipped
for good whatever was not certain, with the bounds of today.

The second table is by all sources of a batch, split as batches are (15 %, at least five of ten) and as they were before
(15 %, at least one), both by a hash of the source's name.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.config.retraining.operation import InboxConfig
from lifelong_moe.config.retraining.policy import HELDOUT_SOURCES, DecisionConfig, GateConfig
from lifelong_moe.data.text.documents import Document
from lifelong_moe.data.text.split import build_corpus
from lifelong_moe.retraining.bounds import DocumentLosses, difference_bounds
from lifelong_moe.retraining.decision import Action, ProbeResult, decide
from tests.benchmarks.provenance import keep, made_with

SOURCES, GAINS, TRIALS, RESAMPLES, SCATTER = (1, 2, 3, 5, 10, 20), (-0.5, 0.0, 0.1, 0.5, 2.8), 200, 400, 0.4
BATCHES = (4, 9, 10, 12, 24, 40, 100)


def planted(rng: np.random.Generator, sources: int, gain: float) -> tuple[DocumentLosses, DocumentLosses]:
    """Losses after and before."""
    names = np.repeat(np.arange(sources), rng.integers(1, 7, size=sources))
    tokens = rng.integers(50, 401, size=len(names))
    found = gain + SCATTER * (rng.normal(size=sources)[names] + rng.normal(size=len(names)))
    labels = [str(name) for name in names]
    return DocumentLosses(-found * tokens, tokens, labels), DocumentLosses(np.zeros(len(names)), tokens, labels)


def held_out(batch: int, seed: int, least: int) -> int:
    """Sources that are held out of a batch of so many, of one document each."""
    documents = [Document(f"text {seed} {i}", f"{seed}/{i}") for i in range(batch)]
    config = SourceConfig(files="unused", heldout_fraction=InboxConfig().heldout_fraction, heldout_sources=least)
    return len(build_corpus("new", documents, config).heldout)


def by_batch() -> Iterator[dict[str, Any]]:
    """What becomes of batches; prints a row each."""
    print("\n| sources | gain | held out | acts | waits | skips | held out before | skipped before |")
    print("|---:" * 8 + "|")
    for batch in BATCHES:
        for gain in (DecisionConfig().min_gain, 0.5, 2.8):
            split, earlier = ([held_out(batch, s, least) for s in range(TRIALS)] for least in (HELDOUT_SOURCES, 1))
            now = Counter(verdicts(n, gain, seed)[0] for seed, n in enumerate(split))
            before = Counter(verdicts(n, gain, seed)[1] for seed, n in enumerate(earlier))
            shares = {action: now[action] / TRIALS for action in ("grow", "wait", "skip")}
            shares["skipped_before"] = before["skip"] / TRIALS
            spans = [f"{min(found)} to {max(found)}" for found in (split, earlier)]
            acts, waits, skips, skipped = (f"{100 * share:.0f}" for share in shares.values())
            print(
                f"| {batch} | {gain} | {spans[0]} | {acts} | {waits} | {skips} | {spans[1]} | {skipped} |", flush=True
            )
            yield {"batch": batch, "gain": gain, "held_out": spans[0], "held_out_before": spans[1], **shares}


def verdicts(sources: int, gain: float, seed: int) -> tuple[str, str]:
    """What is decided now, and what was before."""
    rng = np.random.default_rng([sources, seed, round(1000 * (gain + 1))])
    bounds = [
        -difference_bounds(*planted(rng, sources, one), level=0.05, resamples=RESAMPLES, seed=seed) for one in (gain, 2)
    ]
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
    options, origin = parser.parse_args(), made_with()
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
    keep(options.out, {"heldout": rows, "batches": list(by_batch())}, origin)


if __name__ == "__main__":
    main()
