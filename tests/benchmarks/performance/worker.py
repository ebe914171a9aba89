"""A process that holds one subject and times it on request, so that two with different allocators can take turns.

Each line it reads names what to time; each line it writes is that one time in seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import asdict
from typing import Any

import torch

from lifelong_moe.training.loop.execution import keep_freed_memory
from tests.benchmarks.performance.clock import Ratio, ratio, timed
from tests.benchmarks.performance.subjects import DEVICE, DTYPE, Size, our_step, peer_step

PEAK = 8192 if DEVICE == "cuda" else 1024
"""Rows and columns of the matrices whose product is the measured peak."""


class Worker:
    """The parent's end. Use it in a ``with`` block."""

    def __init__(self, kind: str, size: Size, *, keeps: bool) -> None:
        what = json.dumps({"kind": kind, "size": asdict(size), "keeps": keeps})
        command = [sys.executable, "-m", "tests.benchmarks.performance.worker", what]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def time(self, what: str = "step") -> float:
        """Seconds of one step, or of one product of two matrices (``peak``)."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(what, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker ended: exit code {self.process.wait()}")
        return float(answer)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()


def in_turn(above: Worker, below: Worker, rounds: int, warmup: int = 2) -> Ratio:
    """Compare the steps of two workers."""
    for _ in range(warmup):
        above.time()
        below.time()
    times = [(above.time(), below.time()) for _ in range(rounds)]
    return ratio([a for a, _ in times], [b for _, b in times])


def main() -> None:
    """The child's end."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    what = json.loads(sys.argv[1])
    if what["keeps"]:
        keep_freed_memory()
    size, kind = Size(**what["size"]), what["kind"]
    step = our_step(size) if kind == "ours" else peer_step(size, kind)
    first, second = torch.randn(2, PEAK, PEAK).to(DEVICE, DTYPE)
    for line in sys.stdin:
        action = step if line.strip() == "step" else lambda: first @ second
        print(timed(action), flush=True)


if __name__ == "__main__":
    main()
