"""How a step's cost grows: with experts, with frozen stages, with sequence length, with the model's size."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lifelong_moe.plan.cost import count_parameters
from lifelong_moe.training.loop.execution import keep_freed_memory
from tests.benchmarks.performance.clock import timed
from tests.benchmarks.performance.subjects import DEVICE, REFERENCE, Step, our_step

EXPERTS = (4, 8, 16, 32, 64, 128)
STAGES = (0, 1, 2, 3, 5, 7, 9, 11, 13, 15)
CONTEXTS = (64, 128, 256, 512, 1024, 2048)
PARTS = (0.25, 0.5, 1, 2)
"""Of the reference's widths."""


def taken(steps: list[Step], rounds: int) -> list[float]:
    """The shortest time of each step, all in turn."""
    for step in steps:
        step()
    times = [[timed(step) for step in steps] for _ in range(rounds)]
    return [min(found) for found in zip(*times, strict=True)]


def in_child(frozen: int, rounds: int) -> list[float]:
    """Seconds and peak bytes with so many frozen stages of 4 experts and 4 experts that train, in a new process."""
    module = "tests.benchmarks.performance.growth_curves"
    command = [sys.executable, "-m", module, "--frozen", str(frozen), "--rounds", str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def frozen_stages(frozen: int, rounds: int) -> list[float]:
    """The child's work."""
    size = replace(REFERENCE, experts=4)
    [seconds] = taken([our_step(size, model=size.model((4,) * (frozen + 1), frozen=frozen))], rounds)
    return [seconds, torch.cuda.max_memory_allocated() if DEVICE == "cuda" else peak_bytes()]


def peak_bytes() -> int:
    """Most memory that this process had, in RAM; ``ru_maxrss`` would begin with what its parent had."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def measure(rounds: int = 4) -> dict[str, Any]:
    """All four curves, each point a fresh model; context at equal tokens a step, and likewise the model's size."""
    torch.set_num_threads(1)
    keep_freed_memory()
    base, tokens = REFERENCE, REFERENCE.tokens
    two = replace(base, experts=2)
    experts = [[e, *taken([our_step(replace(base, experts=e)), our_step(two)], rounds)] for e in EXPERTS]
    stages = [[n, *in_child(n, rounds)] for n in STAGES]
    lengths = [replace(base, context=s, sequences=tokens // s) for s in CONTEXTS]
    context = [[size.context, *taken([our_step(size)], rounds)] for size in lengths]
    sizes = []
    for part in PARTS:
        size = replace(base, width=int(base.width * part), expert_width=int(base.expert_width * part))
        sizes.append([count_parameters(size.architecture()).active, *taken([our_step(size)], rounds)])
    detail = {"experts": experts, "frozen_stages": stages, "context": context, "model_size": sizes}
    return {"goals": {}, "detail": detail}


def main() -> None:
    """Measure all, or be the child of one point."""
    if "--frozen" in sys.argv:
        torch.set_num_threads(1)
        keep_freed_memory()
        print(json.dumps(frozen_stages(int(sys.argv[2]), int(sys.argv[4]))))
    else:
        print(json.dumps(measure()))


if __name__ == "__main__":
    main()
