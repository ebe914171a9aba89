"""One training step on a pretended GPU, of any router: what it waits for, launches and casts."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from lifelong_moe.config.model import ExpertsImplementation
from lifelong_moe.model.int8 import round_frozen
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Generation
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.retention.teacher import make_teacher
from lifelong_moe.training.loop.module import StageModule
from lifelong_moe.training.loop.shares import with_shares
from tests.conftest import build_batch, build_model, build_run
from tests.pretended_gpu import Log, Pretended, pretended_gpu

SHAPE = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "expert_width": 16, "context": 32}
KINDS = {"default": "bundles", "competing": "dense", "grown": "learned", "shared": "learned"}
"""Other kinds than routers alone, and their routers: the default method, competing experts, a model that has grown, and
one whose shared experts are frozen."""


def born(kind: str, generations: int = 3, rank: int = 4) -> tuple[Generation | int, ...]:
    """Generations of a kind's model; the default method's have experts, router rows and low-rank changes each."""
    if kind == "default":
        later = (Generation(f"s{i}", 4, delta_rank=rank) for i in range(1, generations))
        return (Generation("s0", 8), *later)
    return (8, 4) if kind in ("grown", "shared") else (8,)


@dataclass(frozen=True)
class Case:
    """What a step is taken of."""

    kind: str
    precision: str
    distils: bool = False
    how: ExpertsImplementation = ExpertsImplementation.auto
    generations: tuple[Generation | int, ...] | None = None
    """None: those of the kind."""
    newest_alone: bool = False
    """Whether all of the batch's text is the newest generation's; else each generation has some."""


@dataclass(frozen=True)
class Step:
    """What a step took, and what took it."""

    log: Log
    model: LanguageModel
    teacher: LanguageModel | None
    optimizer: Optimizer


def taken(case: Case) -> Step:
    """One step: forward, backward, clipping, optimizer and routers."""
    generations = case.generations or born(case.kind)
    model, teacher = build(case, generations), None
    if case.distils:
        teacher = build(case, generations[:-1] if case.kind == "default" else (8,))
    spec = stage_specs(build_run())[1]
    spec = replace(
        spec,
        model=model.architecture.model,
        routing=model.architecture.routing,
        distill=spec.distill if case.distils else None,
        grow=None,
    )
    batch = build_batch(4, 32, domains=len(generations))
    if case.newest_alone:
        batch["domain_ids"].fill_(len(generations) - 1)
    batch = with_shares(batch, spec)
    dtype = torch.bfloat16 if case.precision == "bf16-true" else torch.float32
    with pretended_gpu() as log:
        model.to("cuda:0", dtype)
        if teacher is not None:
            teacher = make_teacher(teacher, ()).to("cuda:0", dtype)
        if case.precision == "auto":
            round_frozen(model, teacher)
        for layer in model.moe_layers():
            layer.banks.implementation = case.how
        module = StageModule(model.train(), spec, spec.phases()[0], teacher)
        module.to("cuda:0")
        module.on_fit_start()
        optimizer = module.configure_optimizers()["optimizer"]
        moved = {k: v.to("cuda:0", non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        log.clear()
        mixed = torch.autocast("cuda", dtype=torch.bfloat16)
        with mixed if case.precision in ("auto", "bf16-mixed") else contextlib.nullcontext():
            loss = module.training_step(moved, 0)["loss"]
        loss.backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        for layer in model.moe_layers():
            layer.router.end_step(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(isinstance(p, Pretended) and (p.grad is None or isinstance(p.grad, Pretended)) for p in trained)
    assert any(p.grad is not None for p in trained)
    return Step(log, model, teacher, optimizer)


def build(case: Case, generations: tuple[Generation | int, ...]) -> LanguageModel:
    """A kind's model, of which only the newest generation trains if it has older ones that are frozen whole."""
    masked = case.distils or case.kind in ("document", "default") or "bundles" in case.kind
    shape = (
        SHAPE | ({"document_mask": True} if masked else {}) | ({"shared_experts": 1} if case.kind == "shared" else {})
    )
    routing = {"competitive": True} if case.kind == "competing" else {}
    model = build_model(KINDS.get(case.kind, case.kind), generations, model=shape, routing=routing)
    if case.kind in ("default", "shared"):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name, place in model.places().items():
            if place.generation == len(generations) - 1:
                model.get_parameter(name).requires_grad_(True)
    return model
