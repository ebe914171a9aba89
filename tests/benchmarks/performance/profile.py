"""Where time goes, the processor's or the GPU's, by kind of work: in training steps and in decoding."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lifelong_moe.model.sampling import sample_batch
from lifelong_moe.training.loop.execution import keep_freed_memory
from tests.benchmarks.performance.inference import BATCHES, EXPERTS, SIZE, build, build_prompts
from tests.benchmarks.performance.step import WIDE
from tests.benchmarks.performance.subjects import DEVICE, REFERENCE, Size, our_step

TIMES, FEW = 3, 16
"""Repetitions, and tokens to decode: a profile of many small operators takes gigabytes."""
HEAD_WIDTH = 64
KINDS = {
    "attention": ("scaled_dot_product", "flash_attention", "CausalAttention", "bmm"),
    "expert matrices": ("mm",),  # grouped ones too
    "head: softmax and losses": ("_LinearLoss", "amax", "scatter_add", "gather", "logsumexp"),
    "dispatch and combine": ("index_select", "sort", "searchsorted", "_GatherTokens", "_WeightAndSum", "topk"),
    "activations": ("silu", "gelu"),
    "optimizer and clipping": ("_fused_adamw", "linalg_vector_norm", "_foreach"),
}
"""A kind of work, and what names of operators contain; all others are "elementwise and the rest"."""
HEAD, PROJECTIONS = "head matrix", "attention's matrices"


def kind_of(name: str, shapes: list[list[int]], size: Size) -> str:
    """What an operator call belongs to; matrix products and softmax by their shapes."""
    sides = {side for shape in shapes for side in shape if isinstance(side, int)}
    if "softmax" in name:
        if size.vocab in sides:
            return "head: softmax and losses"
        return "dispatch and combine" if shapes[0][-1] in (size.experts, size.top_k) else "attention"
    if name in ("aten::mm", "aten::addmm_", "aten::addmm"):
        if size.vocab in sides:
            return HEAD
        if HEAD_WIDTH in sides and size.experts != HEAD_WIDTH:
            return "attention"
        if size.experts in sides:
            return "dispatch and combine"
        return PROJECTIONS if size.tokens in sides else "expert matrices"
    return next((kind for kind, parts in KINDS.items() if any(p in name for p in parts)), "elementwise and the rest")


def shares(size: Size, action: Callable[[], Any]) -> tuple[dict[str, float], float]:
    """Of the time of an action each kind's share, largest first, and seconds of it all; on a GPU of its kernels."""
    cuda = DEVICE == "cuda"
    for _ in range(2):
        action()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, record_shapes=True) as found:
        for _ in range(TIMES):
            action()
    times: dict[str, float] = {}
    for event in found.key_averages(group_by_input_shape=True):
        if event.device_type == DeviceType.CPU:  # a kernel's time is also its operator's
            kind = kind_of(event.key, event.input_shapes, size)
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            times[kind] = times.get(kind, 0.0) + spent
    total = sum(times.values())
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return {kind: round(spent / total, 4) for kind, spent in ordered}, round(total / TIMES / 1e6, 4)


def measure() -> dict[str, Any]:
    """A step of the reference, one of what misses its goal (P1), and decoding that does (P12)."""
    torch.set_num_threads(1)
    keep_freed_memory()
    found = {"step": shares(REFERENCE, our_step(REFERENCE))}
    if DEVICE == "cpu":
        found["step, d 512, 32 experts"] = shares(WIDE, our_step(WIDE))
    batch, experts = BATCHES[-1], EXPERTS[-1]
    with torch.no_grad():
        model, prompts = build(experts), [prompt[:8] for prompt in build_prompts(batch)]
        size = replace(SIZE, experts=experts, sequences=batch, context=1)
        found[f"decoding, batch {batch}, {experts} experts"] = shares(
            size, lambda: sample_batch(model, prompts, max_new_tokens=FEW, temperature=0)
        )
    kinds = {what: kinds for what, (kinds, _) in found.items()}
    return {"goals": {}, "detail": {"shares": kinds, "seconds": {what: s for what, (_, s) in found.items()}}}


if __name__ == "__main__":
    print(json.dumps(measure()))
