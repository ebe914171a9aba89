"""P3, P4, P7: what growth and holding on to old text cost a step, and what frozen experts cost in memory."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch

from lifelong_moe.config.parts import Part
from lifelong_moe.config.retention import DistillConfig
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.retention.teacher import make_teacher
from lifelong_moe.training.loop.execution import keep_freed_memory
from tests.benchmarks.performance.clock import Ratio, paired
from tests.benchmarks.performance.goals import judged
from tests.benchmarks.performance.subjects import DEVICE, REFERENCE, Size, our_step

REPLAYED = REFERENCE.sequences // 4
"""The default ``replay.fraction`` of 0.25."""
MOST_GROWTH, MOST_DISTILLED = (1.10, 1.12) if DEVICE == "cuda" else (1.0, 1.15)


def growth(rounds: int) -> Ratio:
    """64 experts of which the 4 newest train, over 4 that all train; everything else trains in both."""
    size = replace(REFERENCE, experts=4)
    return paired(our_step(size, model=size.model((4,) * 16, frozen=15)), our_step(size), rounds)


def grown_with_teacher(size: Size) -> tuple[LanguageModel, LanguageModel]:
    """A model in its second stage, of two generations, and its teacher, which shares all that is frozen."""
    parent, model = size.model((4,)), size.model((4, 4), frozen=1)
    state = parent.state_dict()
    model.load_state_dict(state, strict=False)
    teacher = make_teacher(parent, [])
    for mine, theirs in zip(model.moe_layers(), teacher.moe_layers(), strict=True):
        theirs.banks.generations[0] = mine.banks.generations[0]
    return model, teacher


def distillation(rounds: int) -> Ratio:
    """A second stage's step with the default distillation and replay, over a plain step of the same model's size."""
    size = REFERENCE
    model, teacher = grown_with_teacher(size)
    lifelong = our_step(size, model=model, teacher=teacher, distill=DistillConfig(), replayed=REPLAYED)
    return paired(lifelong, our_step(size), rounds)


def same_model(rounds: int) -> Ratio:
    """The same with and without distillation on the same frozen model: what distillation alone adds."""
    size = REFERENCE
    model, teacher = grown_with_teacher(size)
    lifelong = our_step(size, model=model, teacher=teacher, distill=DistillConfig(), replayed=REPLAYED)
    return paired(lifelong, our_step(size, model=size.model((4, 4), frozen=1)), rounds)


def frozen_memory() -> dict[str, Any]:
    """Bytes of gradients, optimizer state and teacher that belong to frozen experts, after a step."""
    size = REFERENCE
    model, teacher = grown_with_teacher(size)
    our_step(size, model=model, teacher=teacher, distill=DistillConfig(), replayed=REPLAYED)()
    frozen = [p for p in model.parameters_of(Part.expert).values() if not p.requires_grad]
    of_teacher = {id(p) for p in teacher.parameters()}
    gradients = sum(p.grad is not None for p in frozen)
    copies = sum(id(p) not in of_teacher for p in frozen)
    bytes_each = sum(p.numel() * p.element_size() for p in frozen)
    return {"frozen_tensors": len(frozen), "gradients": gradients, "copies": copies, "frozen_bytes": bytes_each}


def measure(rounds: int = 9) -> dict[str, Any]:
    """All of it; some minutes."""
    torch.set_num_threads(1)
    keep_freed_memory()
    grown, taught, alone, memory = growth(rounds), distillation(rounds), same_model(rounds), frozen_memory()
    clean = memory["gradients"] == memory["copies"] == 0
    goals = {
        "P3 4 to 64 experts": judged(*spread(grown), f"<= {MOST_GROWTH}", "x"),
        "P4 default distillation over plain": judged(*spread(taught), f"<= {MOST_DISTILLED}", "x"),
        "P7 frozen experts: gradients and copies": {
            "value": memory["gradients"] + memory["copies"], "goal": "<= 0", "met": clean, "unit": "tensors",
        },
    }  # fmt: skip
    detail = {"growth": grown.json(), "distillation": taught.json(), "distillation_alone": alone.json()}
    return {"goals": goals, "detail": detail | {"memory": memory}}


def spread(found: Ratio) -> tuple[float, float, float]:
    """Median and quartiles."""
    return found.ratio, found.low, found.high


if __name__ == "__main__":
    print(json.dumps(measure()))
