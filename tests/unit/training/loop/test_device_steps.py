"""A training step on a pretended GPU: every router, precision, mask and teacher, and how often the host has to wait.

Each wait empties the device's queue: what the host prepares next cannot overlap with what is computed. The bounds are
what a step takes today; a change that needs more fails here, and one that needs fewer lowers the number. The goal, one
wait an optimizer step, is reached by the default method.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lifelong_moe.config.model import ExpertsImplementation
from lifelong_moe.config.run import RunConfig
from lifelong_moe.config.training import PRECISIONS
from lifelong_moe.model.deltas import join_changes
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.ops.document_attention import starts_of
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.training.loop.module import StageModule
from tests.conftest import ROUTER_KINDS, build_batch
from tests.device_step import SHAPE, Case, born, build, taken

ROOT = Path(__file__).parents[4]

WAITS: dict[str, dict[str, int]] = json.loads((ROOT / "docs/results/waits.json").read_text())["waits"]
"""The most of a step, and of one with a teacher, in bfloat16 and two layers: a step's means are one. Routers that
take more leave it to the device which places there are, or how many. docs/performance.md shows them."""  # fmt: skip
LAUNCHES: dict[str, dict[str, dict[str, int]]] = json.loads((ROOT / "docs/results/launches.json").read_text())[
    "default"
]
"""Kernels of a step of the default method, by its text and the number of its generations, made by
tests/benchmarks/launches.py."""
SLICED = 2
"""More in float32, and for a teacher as many again: experts in slices read each layer's counts."""


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", WAITS)
def test_no_step_mixes_devices_or_waits_more_than_it_did(kind: str, precision: str) -> None:
    log = taken(Case(kind, precision)).log
    assert log.num_waits <= WAITS[kind]["step"] + SLICED * (precision == "32-true"), log.waits


@pytest.mark.parametrize("precision", ["32-true", "auto", "bf16-mixed"])
@pytest.mark.parametrize("kind", WAITS)
def test_nor_does_one_with_a_teacher(kind: str, precision: str) -> None:
    log = taken(Case(kind, precision, distils=True)).log
    assert log.num_waits <= WAITS[kind]["step_with_teacher"] + 2 * SLICED * (precision == "32-true"), log.waits


@pytest.mark.parametrize("how", [*ExpertsImplementation])
@pytest.mark.parametrize("kind", ["default", "grown", "shared"])
def test_with_auto_what_trains_is_float32_and_what_is_frozen_is_bfloat16_and_never_cast(
    kind: str, how: ExpertsImplementation
) -> None:
    step = taken(Case(kind, "auto", distils=kind != "grown", how=how))
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
def test_rounded_once_or_in_each_pass_gives_the_same_bits(kind: str) -> None:
    models = [taken(Case(kind, precision, distils=True)).model for precision in ("auto", "bf16-mixed")]
    ours, theirs = ({n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in models)
    assert ours and ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("way", LAUNCHES)
def test_launches_do_not_depend_on_how_many_generations_there_are(way: str) -> None:
    distils, newest_alone = "teacher" in way, "newest" in way
    for number, known in LAUNCHES[way].items():
        case = Case("default", "auto", distils, generations=born("default", int(number), 1), newest_alone=newest_alone)
        log = taken(case).log
        assert log.launches <= known["side by side"] < known["apart"] or newest_alone, (number, log.launches)
        assert log.num_waits == 1


def test_on_a_cpu_and_after_a_stage_nothing_is_laid_side_by_side(
    make_model: Callable[..., LanguageModel], make_run: Callable[..., RunConfig]
) -> None:
    model = make_model("bundles", born("default"), model=SHAPE)
    spec = stage_specs(make_run())[1]
    module = StageModule(model, spec, spec.phases()[0])
    module.on_fit_start()
    assert not any(matrix.deltas.joined for matrix in model.delta_matrices())
    join_changes(model.delta_matrices())
    assert all(matrix.deltas.joined for matrix in model.delta_matrices())
    module.on_fit_end()
    assert not any(matrix.deltas.joined for matrix in model.delta_matrices())


def test_every_kind_is_in_the_table() -> None:
    assert WAITS.keys() - ROUTER_KINDS.keys() == {"default", "competing"} and not ROUTER_KINDS.keys() - WAITS.keys()


def test_what_the_host_knows_beforehand_is_what_it_would_ask_for() -> None:
    generations = born("default")
    model = build(Case("default", "32-true"), generations)
    # Also a domain that no generation is of, which counts as the first.
    batch = TokenBatch.of(build_batch(4, 32, domains=len(generations) + 1))
    assert batch.domain_ids_BS is not None and batch.document_ids_BS is not None
    counts, starts = tuple(torch.bincount(batch.domain_ids_BS.flatten()).tolist()), starts_of(batch.document_ids_BS)
    asked, known = model(batch), model(replace(batch, document_starts=starts, domain_counts=counts))
    assert torch.equal(asked.hidden_BSD, known.hidden_BSD)
    hidden_TD, domains_T = asked.hidden_BSD.flatten(0, 1), batch.domain_ids_BS.flatten()
    targets_T = batch.ids_BS.flatten()
    losses = [model.head.cross_entropy(hidden_TD, targets_T, domains_T, one) for one in (None, counts)]
    assert torch.equal(*losses)
    assert torch.equal(*(model.head.logits(hidden_TD, domains_T, one) for one in (None, counts)))
