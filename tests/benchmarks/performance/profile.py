"""Where a training step goes: the processor's or the GPU's time by kind of work, of the reference model."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lifelong_moe.training.execution import keep_freed_memory
from tests.benchmarks.performance.subjects import DEVICE, REFERENCE, Size, our_step

STEPS = 3
HEAD_WIDTH = 64
KINDS = {
    "expert matrices": ("mm",),  # grouped ones too
    "attention": ("scaled_dot_product", "flash_attention", "CausalAttention", "bmm"),
    "head: softmax and losses": ("_LinearLoss", "amax", "scatter_add", "gather", "logsumexp"),
    "dispatch and combine": (
        "index_select",
        "sort",
        "searchsorted",
        "_GatherTokens",
        "_WeightAndSum",
        "addcmul",
        "topk",
    ),
    "activations": ("silu", "gelu"),
    "optimizer and clipping": ("_fused_adamw", "linalg_vector_norm", "_foreach"),
}
"""A kind of work, and what names of operators contain; all others are "elementwise and the rest"."""
HEAD, PROJECTIONS = "head matrix", "attention's matrices"


def kind_of(name: str, shapes: list[list[int]], size: Size) -> str:
    """What an operator call belongs to; matrix products and softmax by their shapes."""
    sides = {side for shape in shapes for side in shape if isinstance(side, int)}
    if "softmax" in name:
        return "head: softmax and losses" if size.vocab in sides else "attention"
    if name in ("aten::mm", "aten::addmm_", "aten::addmm"):
        if size.vocab in sides:
            return HEAD
        if HEAD_WIDTH in sides:
            return "attention"
        if size.experts in sides:
            return "dispatch and combine"
        return PROJECTIONS if size.tokens in sides else "expert matrices"
    return next((kind for kind, parts in KINDS.items() if any(p in name for p in parts)), "elementwise and the rest")


def measure() -> dict[str, Any]:
    """Shares of the time of some steps, largest first."""
    size, cuda = REFERENCE, DEVICE == "cuda"
    torch.set_num_threads(1)
    keep_freed_memory()
    step = our_step(size)
    step()
    step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, record_shapes=True) as found:
        for _ in range(STEPS):
            step()
    times: dict[str, float] = {}
    for event in found.key_averages(group_by_input_shape=True):
        if event.device_type == DeviceType.CPU:  # a kernel's time is also its operator's
            kind = kind_of(event.key, event.input_shapes, size)
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            times[kind] = times.get(kind, 0.0) + spent
    total = sum(times.values())
    ordered = sorted(times, key=lambda kind: -times[kind])
    detail = {"names": ordered, "shares": [round(times[kind] / total, 4) for kind in ordered]}
    return {"goals": {}, "detail": detail | {"step_seconds": total / STEPS / 1e6}}


if __name__ == "__main__":
    print(json.dumps(measure()))
