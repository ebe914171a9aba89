"""Kill a run after each of twenty steps of its first and of its grown stage, and continue it.

    OMP_NUM_THREADS=1 .venv/bin/python tests/benchmarks/resume_points.py

Data workers change from trial to trial (0, 2, 4), in the killed run and again in the one that continues it. Counted are
trials in which a step's loss is another number (compared as ``float.hex``), or the final weights are other bits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from lifelong_moe.training.loop.module import StageModule
from pipelines.shared.quiet import silence_libraries
from tests.benchmarks.provenance import keep, made_with
from tests.tiny import CONTEXT, SEQUENCES, fork, hashes, kill_self, tiny_config, train, write_config, write_corpora

POINTS = 20
WORKERS = (0, 2, 4)
LOSSES = Path("losses.jsonl")


def watched(kill_stage: str | None, kill_step: int) -> Any:
    """A run that writes down each step's loss, and dies before the step after the given one."""
    original = StageModule.training_step

    def training_step(self: StageModule, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
        if (self.spec.name, self.global_step) == (kill_stage, kill_step):
            kill_self()
        result: Any = original(self, batch, batch_idx)
        with LOSSES.open("a", encoding="utf-8") as file:
            file.write(json.dumps([self.spec.name, self.global_step, float(result["loss"].detach()).hex()]) + "\n")
        return result

    def run() -> None:
        StageModule.training_step = training_step  # type: ignore[method-assign]
        train()

    return run


def losses() -> dict[tuple[str, int], set[str]]:
    """Every loss that a step was seen to have."""
    found: dict[tuple[str, int], set[str]] = {}
    for line in LOSSES.read_text(encoding="utf-8").splitlines():
        stage, step, value = json.loads(line)
        found.setdefault((stage, step), set()).add(value)
    return found


def fresh(workers: int) -> None:
    """Nothing left of the trial before."""
    shutil.rmtree("mlruns", ignore_errors=True)
    LOSSES.unlink(missing_ok=True)
    configure(workers)


def configure(workers: int) -> None:
    """A configuration of two stages a step longer than there are points."""
    config = tiny_config(checkpoint={"every_steps": 3}, trainer={"num_workers": workers})
    config["stage_defaults"]["tokens"] = (POINTS + 1) * SEQUENCES * CONTEXT
    write_config(config)


def main() -> int:
    """Run all trials in a temporary directory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to keep the numbers, JSON")
    options, origin = parser.parse_args(), made_with()
    out = options.out and options.out.absolute()
    os.chdir(tempfile.mkdtemp(prefix="resume-points-"))
    silence_libraries()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    write_corpora(Path())
    fresh(0)
    assert fork(watched(None, 0)).wait() == 0
    expected, weights, bad = losses(), hashes(), 0
    trials = [(stage, step) for stage in ("fruit", "code") for step in range(1, POINTS + 1)]
    for number, (stage, step) in enumerate(trials):
        fresh(WORKERS[number % 3])
        assert fork(watched(stage, step)).wait() == -signal.SIGKILL
        configure(WORKERS[(number + 1) % 3])
        child = fork(watched(None, 0))
        if child.wait() != 0 or hashes() != weights or losses() != expected:
            bad += 1
            print(f"stage {stage}, step {step}: {child.output[-300:]}", file=sys.stderr)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{len(trials)} points in 2 stages, workers 0, 2 and 4 in turn: {bad} with other losses or weights")
    if out:
        keep(out, {"points": len(trials), "stages": 2, "workers": WORKERS, "other_losses_or_weights": bad}, origin)
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
