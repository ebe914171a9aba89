"""A training step on a pretended GPU: every router, precision, mask and teacher, and how often the host has to wait.

Each wait empties the device's queue: what the host prepares next cannot overlap with what is computed. The bounds are
what a step takes today; a change that needs more fails here, and one that needs fewer lowers the number. The goal, one
wait an optimizer step, is reached by the default method.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from lifelong_moe.config.model import ExpertsImplementation
from lifelong_moe.config.run import RunConfig
from lifelong_moe.config.training import PRECISIONS
from lifelong_moe.model.int8 import round_frozen
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.ops.document_attention import starts_of
from lifelong_moe.plan.architecture import Generation
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.retention.teacher import make_teacher
from lifelong_moe.training.loop.module import StageModule
from lifelong_moe.training.loop.shares import with_shares
from tests.conftest import ROUTER_KINDS
from tests.pretended_gpu import Log, Pretended, pretended_gpu

Make = Callable[..., LanguageModel]
Batch = Callable[..., dict[str, Tensor]]
MakeRun = Callable[..., RunConfig]
ROOT = Path(__file__).parents[4]

SHAPE = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "expert_width": 16, "context": 32}
OLD = (Generation("s0", 8), Generation("s1", 4, delta_rank=4))
DEFAULT = (*OLD, Generation("s2", 4, delta_rank=4))
"""Generations of the default method: experts, router rows and low-rank changes each."""

WAITS: dict[str, dict[str, int]] = json.loads((ROOT / "docs/results/waits.json").read_text())["waits"]
"""The most of a step, and of one with a teacher, in bfloat16 and two layers: a step's means are one. Routers that
take more leave it to the device which places there are, or how many. docs/performance.md shows them."""  # fmt: skip
SLICED = 2
"""More in float32, and for a teacher as many again: experts in slices read each layer's counts."""


@dataclass(frozen=True)
class Step:
    """What a step took, and what took it."""

    log: Log
    model: LanguageModel
    teacher: LanguageModel | None
    optimizer: Optimizer


def taken(
    make_model: Make,
    make_batch: Batch,
    make_run: MakeRun,
    kind: str,
    precision: str,
    distils: bool,
    how: ExpertsImplementation = ExpertsImplementation.auto,
) -> Step:
    """One step: forward, backward, clipping, optimizer and routers."""
    masked = distils or kind in ("document", "default") or "bundles" in kind
    model = _model(make_model, kind, masked, {"default": DEFAULT, "grown": (8, 4), "shared": (8, 4)}.get(kind, (8,)))
    teacher = _model(make_model, kind, masked, OLD if kind == "default" else (8,)) if distils else None
    spec = stage_specs(make_run())[1]
    spec = replace(
        spec,
        model=model.architecture.model,
        routing=model.architecture.routing,
        distill=spec.distill if distils else None,
        grow=None,
    )
    batch = with_shares(make_batch(4, 32, domains=len(model.architecture.generations)), spec)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    with pretended_gpu() as log:
        model.to("cuda:0", dtype)
        if teacher is not None:
            teacher = make_teacher(teacher, ()).to("cuda:0", dtype)
        if precision == "auto":
            round_frozen(model, teacher)
        for layer in model.moe_layers():
            layer.banks.implementation = how
        module = StageModule(model.train(), spec, spec.phases()[0], teacher)
        module.to("cuda:0")
        module.on_fit_start()
        optimizer = module.configure_optimizers()["optimizer"]
        moved = {k: v.to("cuda:0", non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        log.clear()
        mixed = torch.autocast("cuda", dtype=torch.bfloat16)
        with mixed if precision in ("auto", "bf16-mixed") else contextlib.nullcontext():
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


def _model(make_model: Make, kind: str, masked: bool, generations: tuple[Generation | int, ...]) -> LanguageModel:
    router = {"default": "bundles", "competing": "dense", "grown": "learned", "shared": "learned"}.get(kind, kind)
    routing = {"competitive": True} if kind == "competing" else {}
    shape = SHAPE | ({"document_mask": True} if masked else {}) | ({"shared_experts": 1} if kind == "shared" else {})
    model = make_model(router, generations, model=shape, routing=routing)
    if kind in ("default", "shared"):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name, place in model.places().items():
            if place.generation == len(generations) - 1:
                model.get_parameter(name).requires_grad_(True)
    return model


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", WAITS)
def test_no_step_mixes_devices_or_waits_more_than_it_did(
    make_model: Make, make_batch: Batch, make_run: MakeRun, kind: str, precision: str
) -> None:
    log = taken(make_model, make_batch, make_run, kind, precision, distils=False).log
    assert log.num_waits <= WAITS[kind]["step"] + SLICED * (precision == "32-true"), log.waits


@pytest.mark.parametrize("precision", ["32-true", "auto", "bf16-mixed"])
@pytest.mark.parametrize("kind", WAITS)
def test_nor_does_one_with_a_teacher(
    make_model: Make, make_batch: Batch, make_run: MakeRun, kind: str, precision: str
) -> None:
    log = taken(make_model, make_batch, make_run, kind, precision, distils=True).log
    assert log.num_waits <= WAITS[kind]["step_with_teacher"] + 2 * SLICED * (precision == "32-true"), log.waits


@pytest.mark.parametrize("how", [*ExpertsImplementation])
@pytest.mark.parametrize("kind", ["default", "grown", "shared"])
def test_with_auto_what_trains_is_float32_and_what_is_frozen_is_bfloat16_and_never_cast(
    make_model: Make, make_batch: Batch, make_run: MakeRun, kind: str, how: ExpertsImplementation
) -> None:
    step = taken(make_model, make_batch, make_run, kind, "auto", distils=kind != "grown", how=how)
    frozen = set()
    for model in (step.model, *([] if step.teacher is None else [step.teacher])):
        for name, parameter in model.named_parameters():
            # Not a router's rows, nor the embedding's, which begins the residual stream.
            multiplies = "rows" not in name and name != "embedding.weight" and parameter.dim() > 1
            rounded = multiplies and not parameter.requires_grad
            assert parameter.dtype == (torch.bfloat16 if rounded else torch.float32), name
            assert parameter.grad is None or parameter.grad.dtype == torch.float32
            if parameter.dim() > 1 and not parameter.requires_grad and parameter.numel():
                frozen.add(parameter.untyped_storage().data_ptr())
    moments = [one for state in step.optimizer.state.values() for key, one in state.items() if key != "step"]
    assert moments and all(one.dtype == torch.float32 for one in moments)
    assert frozen and not frozen & step.log.cast
    # Only routers multiply in float32, each generation's rows: the student's in both passes, the teacher's in one.
    rows = SHAPE["layers"] * len(step.model.architecture.generations)
    assert 0 < step.log.products[torch.float32] <= 4 * rows < 2 * step.log.products[torch.bfloat16]


@pytest.mark.parametrize("kind", ["grown", "shared"])
def test_rounded_once_or_in_each_pass_gives_the_same_bits(
    make_model: Make, make_batch: Batch, make_run: MakeRun, kind: str
) -> None:
    models = [
        taken(make_model, make_batch, make_run, kind, precision, distils=True).model
        for precision in ("auto", "bf16-mixed")
    ]
    ours, theirs = ({n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in models)
    assert ours and ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_every_kind_is_in_the_table() -> None:
    assert WAITS.keys() - ROUTER_KINDS.keys() == {"default", "competing"} and not ROUTER_KINDS.keys() - WAITS.keys()


def test_what_the_host_knows_beforehand_is_what_it_would_ask_for(make_model: Make, make_batch: Batch) -> None:
    model = _model(make_model, "default", True, DEFAULT)
    # Also a domain that no generation is of, which counts as the first.
    batch = TokenBatch.of(make_batch(4, 32, domains=len(DEFAULT) + 1))
    assert batch.domain_ids_BS is not None and batch.document_ids_BS is not None
    counts, starts = tuple(torch.bincount(batch.domain_ids_BS.flatten()).tolist()), starts_of(batch.document_ids_BS)
    asked, known = model(batch), model(replace(batch, document_starts=starts, domain_counts=counts))
    assert torch.equal(asked.hidden_BSD, known.hidden_BSD)
    hidden_TD, domains_T = asked.hidden_BSD.flatten(0, 1), batch.domain_ids_BS.flatten()
    targets_T = batch.ids_BS.flatten()
    losses = [model.head.cross_entropy(hidden_TD, targets_T, domains_T, one) for one in (None, counts)]
    assert torch.equal(*losses)
    assert torch.equal(*(model.head.logits(hidden_TD, domains_T, one) for one in (None, counts)))
