"""Two things timed in turn, so that what else the machine does falls on both: a ratio with its spread.

On a CPU a time is the process's own processor time on one thread; on CUDA it is wall time between synchronizations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Ratio:
    """How two times compare, over rounds that took each of them once."""

    ratio: float
    """Median over rounds."""
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    rounds: int
    seconds: tuple[float, float]
    """Median of the time above the line, and of the one below."""

    def json(self) -> dict[str, Any]:
        """As plain data, four digits."""
        found = asdict(self)
        return {k: [round(s, 6) for s in v] if k == "seconds" else round(v, 4) for k, v in found.items()}


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Compare times taken in turn, round by round."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return Ratio(
        statistics.median(ratios),
        quartiles[0],
        quartiles[2],
        len(ratios),
        (statistics.median(above), statistics.median(below)),
    )


def timed(action: Callable[[], Any]) -> float:
    """Seconds that an action takes: of processor time, or of wall time on a CUDA device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        began = time.perf_counter()
        action()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.process_time()
    action()
    return time.process_time() - began


def paired(above: Callable[[], Any], below: Callable[[], Any], rounds: int, warmup: int = 2) -> Ratio:
    """Time two actions in turn."""
    for _ in range(warmup):
        above()
        below()
    times = [(timed(above), timed(below)) for _ in range(rounds)]
    return ratio(*zip(*times, strict=True))
