"""P1, P1b, P5: a whole training step beside transformers' best, and beside the machine's own matrix product.

``as users run it`` leaves each side's allocator as its users get it: ours keeps freed memory, transformers' gives it
back. ``same allocator`` lets both keep it.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

from tests.benchmarks.performance.subjects import DEVICE, Size
from tests.benchmarks.performance.worker import PEAK, Worker, in_turn

IMPLEMENTATIONS = ("eager", "grouped_mm")
SIZES = (Size(experts=8), Size(experts=32), Size(experts=64))
WIDE = Size(experts=32, width=512, expert_width=1024)
GPU = {"layers": 16, "width": 2048, "expert_width": 768, "top_k": 8, "vocab": 32_768, "context": 2048, "sequences": 4}
"""0.9 billion active parameters. With 32 experts both sides together need some 75 GB, by estimate."""


def against(size: Size, implementation: str, rounds: int, *, peer_keeps: bool) -> dict[str, Any]:
    """Transformers' step over ours."""
    with Worker(implementation, size, keeps=peer_keeps) as peer, Worker("ours", size, keeps=True) as ours:
        return in_turn(peer, ours, rounds).json()


def best(size: Size, rounds: int, *, peer_keeps: bool) -> dict[str, Any]:
    """The implementation that is fastest for transformers, and how ours compares with it."""
    found = {name: against(size, name, rounds, peer_keeps=peer_keeps) for name in IMPLEMENTATIONS}
    name = min(found, key=lambda n: found[n]["ratio"])
    return {"peer": name, **found[name], "all": found}


def fraction_of_peak(size: Size, rounds: int) -> dict[str, float]:
    """Model FLOPs a second of a step over those of one large product, taken in turn."""
    with Worker("ours", size, keeps=True) as ours:
        for _ in range(2):
            ours.time()
            ours.time("peak")
        found = [
            size.flops() / ours.time() / (2 * PEAK**3 / min(ours.time("peak") for _ in range(8))) for _ in range(rounds)
        ]
    quartiles = statistics.quantiles(found, n=4)
    return {"value": statistics.median(found), "low": quartiles[0], "high": quartiles[2]}


def goal(found: dict[str, Any], least: float) -> dict[str, Any]:
    """One row of the table."""
    value = found["ratio"]
    return {"value": value, "low": found["low"], "high": found["high"], "goal": f">= {least}", "met": value >= least,
            "unit": "x"}  # fmt: skip


def measure(rounds: int = 9) -> dict[str, Any]:
    """All of it; some minutes."""
    return on_gpu(rounds) if DEVICE == "cuda" else on_cpu(rounds)


def on_gpu(rounds: int) -> dict[str, Any]:
    """Beside transformers' best with 32 experts, beside its loop over experts with 64, and beside one large product."""
    size = Size(experts=32, **GPU)
    users = best(size, rounds, peer_keeps=False)
    eager = against(Size(experts=64, **{**GPU, "layers": 4}), "eager", rounds, peer_keeps=False)
    peak = fraction_of_peak(size, rounds)
    goals = {"P1 as users run it, E 32": goal(users, 1.4), "P1b against eager, E 64": goal(eager, 3.0)}
    goals["P5 share of the matmul peak"] = peak | {"goal": ">= 0.25", "met": peak["value"] >= 0.25, "unit": ""}
    return {"goals": goals, "detail": {"as_users_run_it": users, "e64": {"eager": eager}, "peak": peak}}


def on_cpu(rounds: int) -> dict[str, Any]:
    """The same with 8, 32 and 64 experts, once more where both sides have one allocator, and of a wider model."""
    users = {size.experts: best(size, rounds, peer_keeps=False) for size in SIZES[:2]}
    eager = against(SIZES[2], "eager", 3, peer_keeps=False)
    grouped = against(SIZES[2], "grouped_mm", rounds, peer_keeps=False)
    same, wide = best(SIZES[0], rounds, peer_keeps=True), best(WIDE, max(3, rounds // 2), peer_keeps=True)
    peak = fraction_of_peak(SIZES[0], rounds)
    goals = {f"P1 as users run it, E {experts}": goal(found, 1.15) for experts, found in users.items()}
    goals["P1 as users run it, E 64"] = goal(grouped, 1.15)
    goals["P1 same allocator, E 8"] = goal(same, 1.02)
    goals["P1 same allocator, d 512 E 32"] = goal(wide, 1.15)
    goals["P1b against eager, E 64"] = goal(eager, 6.0)
    goals["P5 share of the matmul peak"] = peak | {"goal": ">= 0.75", "met": peak["value"] >= 0.75, "unit": ""}
    detail = {"as_users_run_it": users, "e64": {"eager": eager, "grouped_mm": grouped}, "same_allocator": same}
    return {"goals": goals, "detail": detail | {"wide": wide, "peak": peak}}


if __name__ == "__main__":
    print(json.dumps(measure()))
