"""FLOPs of a stage against what torch counts while its own step runs, for every method and kind of stage."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lifelong_moe.config.run import RunConfig
from lifelong_moe.model.transformer import LanguageModel, initialize
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.flops import loop_flops, stage_flops
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.plan.phase import Phase
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.retention.generated import generate_blocks
from lifelong_moe.retention.penalty import fisher_diagonal
from lifelong_moe.retention.teacher import make_teacher
from lifelong_moe.routing.routers.cluster import TokenClusterRouter
from lifelong_moe.training.loop.execution import isolated_documents
from lifelong_moe.training.loop.module import StageModule
from lifelong_moe.training.loop.optimizer import freeze_for_finetuning, freeze_trunk, phase_parameters, training_only
from lifelong_moe.training.preparation import unchanging_tensors

MakeRun = Callable[..., RunConfig]
VOCAB, CONTEXT = 96, 32
SHAPE = {"layers": 2, "width": 48, "heads": 4, "kv_heads": 2, "expert_width": 40, "experts": 4, "context": CONTEXT}
DELTAS = ("routing.bundles=cluster", "model.document_mask=true", "stage_defaults.trunk={train: deltas, rank: 12}")

aten = torch.ops.aten


def _attention(query: Tensor, key: Tensor, *_: Any, is_causal: bool) -> int:
    """Both products over the pairs that count; a causal one's fused kernel leaves out the other half."""
    batch, heads, length, width = query.shape
    pairs = length * key.shape[2] / 2 if is_causal else length * key.shape[2]
    return round(2 * 2 * batch * heads * width * pairs)


def _forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **_: Any) -> int:
    return _attention(query, key, is_causal=args[1] if len(args) > 1 else False)


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, *args: Any, **_: Any
) -> int:
    return 2 * _attention(query, key, is_causal=args[1])


def _in_place(into: torch.Size, first: torch.Size, second: torch.Size, **_: Any) -> int:
    return 2 * math.prod(first) * second[-1]


_forward._get_raw = _backward._get_raw = True  # type: ignore[attr-defined]
MORE = {
    aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
    aten.addmm_: _in_place,  # in place, which torch's own table leaves out
    aten.baddbmm_: _in_place,
}


def counted(action: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False, custom_mapping=MORE) as counter:
        action()
    return counter.get_total_flops()


def planned(make_run: MakeRun, *overrides: str) -> tuple[list[StageSpec], list[Architecture]]:
    specs = stage_specs(
        make_run(
            "stage_defaults.optim.batch_tokens=512",
            "stage_defaults.tokens=10240",
            "stage_defaults.replay.fraction=0",
            "stage_defaults.distill.weight=0",
            *overrides,
            model=SHAPE,
        )
    )
    made: list[Architecture] = []
    for spec in specs:
        made.append(spec.architecture(None if spec.parent is None else made[spec.parent], VOCAB, 0))
    return specs, made


def fill(model: LanguageModel) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() > 1 and tensor.numel():
                tensor.normal_(std=0.2, generator=generator)
        model.embedding.weight.normal_(std=3, generator=generator)  # so different that tokens use experts alike
        for layer in model.moe_layers():
            if isinstance(layer.router, TokenClusterRouter):
                for centroids in layer.router.centroids():
                    centroids.normal_(generator=generator)
                layer.router.hashing = False


def prepared(spec: StageSpec, parent: Architecture | None, after: Architecture) -> tuple[LanguageModel, Any]:
    """A stage's model, frozen and grown as a stage does it, and its teacher."""
    if parent is not None and len(parent.generations) == 1:  # what tells generations apart is this stage's to say
        parent = dataclasses.replace(parent, routing=spec.routing)
    model = LanguageModel(after if parent is None or spec.student is not None else parent)
    initialize(model, 0)
    if parent is None:
        fill(model)
        return model, None
    if spec.student is not None:
        teacher = LanguageModel(parent)
        fill(teacher)
        fill(model)
        return model, teacher.requires_grad_(False).eval()
    if spec.continues is not None:
        model.freeze_generations(model.architecture.born_in(spec.continues))
    freeze_trunk(model, spec.trunk)
    freeze_for_finetuning(model, spec.finetune)
    teacher = make_teacher(model, unchanging_tensors(model, spec)) if spec.distill else None
    generation = spec.generation()
    if generation is not None:
        assert spec.grow is not None
        if spec.grow.freezes:
            model.freeze_generations()
        model.add_generation(generation)
    model.architecture = after
    fill(model)
    return model, teacher


def batch_of(spec: StageSpec, phase: Phase, after: Architecture) -> dict[str, Tensor]:
    """Full blocks of one document each, of which the phase's share is old text."""
    generator = torch.Generator().manual_seed(1)
    rows = spec.global_batch // spec.accumulate
    ids = torch.randint(1, VOCAB, (rows, CONTEXT + 1), generator=generator)
    zeros, old = torch.zeros(rows, CONTEXT, dtype=torch.int64), round(rows * phase.replay_fraction)
    replayed = torch.arange(rows) < old
    own = len(after.generations) - 1 if after.continued is None else after.continued
    groups = torch.where(replayed.unsqueeze(1), zeros, own)
    return {
        "token_ids": ids[:, :-1],
        "target_ids": ids[:, 1:],
        "document_ids": zeros,
        "domain_ids": groups,
        "teacher_domain_ids": torch.randint(0, max(1, own), zeros.shape, generator=generator),
        "mask": torch.ones_like(zeros, dtype=torch.bool),
        "scored": torch.ones_like(zeros, dtype=torch.bool),
        "replayed": replayed,
        "ordinal": torch.where(replayed, torch.arange(rows), torch.arange(rows) - old),
    }


def measured(spec: StageSpec, parent: Architecture | None, after: Architecture) -> float:
    """What torch counts in one micro-batch of each phase, times their number."""
    total, (model, teacher) = 0.0, prepared(spec, parent, after)
    model.train()
    for phase in spec.phases():
        module, batch = StageModule(model, spec, phase, teacher), batch_of(spec, phase, after)
        models = [m for m in (model, teacher) if m is not None]
        with (
            isolated_documents(models if spec.finetune else []),
            training_only(model, phase_parameters(model, phase).values()),
        ):
            one = counted(lambda m=module, b=batch: m.training_step(b, 0)["loss"].backward())
        total += one * phase.steps * spec.accumulate
    return total


OLD = "stage_defaults.grow.old_lr_scale=0.5"
FROZEN = "stage_defaults.trunk.train=frozen"
TAUGHT = ("stage_defaults.distill.weight=1", "stage_defaults.distill.text=new")
ATTENTION = "model.document_mask=true"
CASES: dict[str, tuple[str, ...]] = {
    "everything trains": ("method=sequential",), "static": ("method=static_moe",),
    "replay": ("method=replay", "stage_defaults.replay.fraction=0.25"),
    "teacher on new text": ("method=lwf", *TAUGHT),
    "teacher on half of the new text": ("method=lwf", *TAUGHT, "stage_defaults.distill.fraction=0.5"),
    "teacher on old text": ("stage_defaults.distill.weight=1", "stage_defaults.replay.fraction=0.25"),
    "joint": ("method=joint",), "unrestrained": ("method=unrestrained",), "l2": ("method=l2",),
    "gentle trunk": ("stage_defaults.trunk.train=gentle",), "full trunk": ("stage_defaults.trunk.train=full",),
    "frozen trunk": (FROZEN,),
    "frozen trunk, taught": (FROZEN, *TAUGHT),
    "frozen trunk, growth above": (FROZEN, *TAUGHT, "stages[1].grow.layers=[1]"),
    "old experts train too": (OLD,),
    "bundles": (*DELTAS[:2], FROZEN),
    "bundles, replay": ("routing.bundles=cluster", ATTENTION, FROZEN, "stage_defaults.replay.fraction=0.25"),
    "deltas": DELTAS,
    "deltas in two micro-batches": (*DELTAS, "trainer.accumulate_grad_batches=2"),
    "tied": ("model.tie_embeddings=true",), "tied, frozen": ("model.tie_embeddings=true", FROZEN),
    "low-rank experts": ("stage_defaults.grow.rank=3",),
    "low-rank experts, frozen trunk": ("stage_defaults.grow.rank=3", FROZEN),
    "low-rank experts, no gate": ("stage_defaults.grow.rank=2", "model.activation=relu", FROZEN),
    "low-rank bundles, replay": (*DELTAS, "stage_defaults.grow.rank=2", "stage_defaults.replay.fraction=0.25"),
    "tied deltas": (*DELTAS, "model.tie_embeddings=true"),
    "deltas, replay": (*DELTAS, "stage_defaults.replay.fraction=0.25"),
    "deltas, taught": (*DELTAS, *TAUGHT),
    "deltas by label": ("routing.mode=label", ATTENTION, DELTAS[2]),
    "review": (
        "routing.bundles=none", "stage_defaults.review.fraction=0.25", "stage_defaults.review.replay_fraction=0.5",
        "stage_defaults.replay.fraction=0.25",
    ),
    "continues": (DELTAS[0], ATTENTION, FROZEN, "stages[1].continues=english", "stages[1].grow.experts=0"),
    "student": (*TAUGHT, "stages[1].distill.student=[1]", "stage_defaults.grow.experts=0"),
    "hash": ("routing.mode=hash",), "label": ("routing.mode=label",), "noise": ("routing.mode=noisy_topk",),
    "clusters of embeddings": ("routing.mode=cluster", "routing.level=token", "routing.features=embedding", OLD),
    "sigmoid": ("routing.score=sigmoid", "routing.bias_rate=0.01"),
    "switch, nothing dropped": ("routing={mode: switch, top_k: 1, renormalize: false, capacity: {factor: 9}}", OLD),
    "gshard, nothing dropped": (
        "routing={mode: gshard, top_k: 2, second: all, capacity: {factor: 9}, allow_noncausal: true}", OLD,
    ),
    "hierarchical": (
        "routing={mode: hierarchical, top_k: 4, expert_groups: 2, top_groups: 2}", "stage_defaults.grow.experts=4", OLD,
    ),
    "base": ("routing={mode: base, top_k: 1, renormalize: false, allow_noncausal: true}", OLD),
    "expert choice": ("routing={mode: expert_choice, allow_noncausal: true}", OLD),
    "vmoe, nothing dropped": (
        "routing={mode: vmoe, top_k: 2, capacity: {factor: 9, priority: batch}, allow_noncausal: true}", OLD,
    ),
    "competing experts": ("routing={mode: dense, competitive: true}", "stage_defaults.grow.experts=0", *TAUGHT),
    "dense mixture": ("routing.mode=dense",), "top one": ("routing.top_k=1", "routing.renormalize=false"),
    "shared experts": ("model.shared_experts=2", "model.shared_mix=learned"),
    "shared experts, frozen": ("model.shared_experts=1", FROZEN),
    "dense layers": ("model.layers=4", "model.moe_every=2", "model.dense_width=72", FROZEN),
    "no gate": ("model.activation=relu",), "soft cap": ("model.attention_softcap=30",),
    "normalized heads, frozen": ("model.qk_norm=head", "model.sandwich_norms=true", FROZEN),
    "wide heads": ("model.head_width=20",),
}  # fmt: skip
PAIRS = (
    *("distributions.python.builtin=null", "distributions.python.files=p.jsonl", "distributions.python.answer_field=a"),
    *("stages[1].kind=finetune", "stage_defaults.grow.experts=0", "stage_defaults.trunk.train=full"),
)
DENSE = ("model.layers=4", "model.moe_every=2", "model.shared_experts=1")
TRAINABLE = "stages[1].finetune.trainable="
FINETUNED = {
    "all": (f"{TRAINABLE}all",),
    "non_moe": (f"{TRAINABLE}non_moe",),
    "moe": (f"{TRAINABLE}moe",),
    "attention, with dense layers": (f"{TRAINABLE}attention", *DENSE),
    "moe above dense layers": (f"{TRAINABLE}moe", "model.layers=4", "model.dense_layers=2"),
    "taught": (f"{TRAINABLE}moe", *TAUGHT),
    "dropout within experts": ("stages[1].finetune.expert_dropout=0.4", *TAUGHT),
}


def check(make_run: MakeRun, *overrides: str) -> None:
    specs, made = planned(make_run, *overrides)
    for spec, after in zip(specs, made, strict=True):
        parent = None if spec.parent is None else made[spec.parent]
        found = measured(spec, parent, after)
        assert loop_flops(spec, after, parent) == pytest.approx(found, rel=0.02), spec.name


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES.keys())
def test_what_is_counted_is_what_runs(make_run: MakeRun, overrides: tuple[str, ...]) -> None:
    check(make_run, *overrides)


def test_what_a_pass_costs_however_many_tokens_it_has_is_counted_by_the_pass(make_run: MakeRun) -> None:
    """Products of low-rank changes with the weights that they change: four micro-batches make them four times."""
    found, said = [], []
    for micro_batches in (1, 4):
        (_, spec), (parent, after) = planned(make_run, *DELTAS, f"trainer.accumulate_grad_batches={micro_batches}")
        found.append(measured(spec, parent, after))
        said.append(loop_flops(spec, after, parent))
    assert found[1] > 1.001 * found[0]
    assert said[1] - said[0] == pytest.approx(found[1] - found[0], rel=0.02)


@pytest.mark.parametrize("overrides", FINETUNED.values(), ids=FINETUNED.keys())
def test_what_fine_tuning_leaves_alone_is_not_counted(make_run: MakeRun, overrides: tuple[str, ...]) -> None:
    check(make_run, *PAIRS, *overrides)


MEASURED: dict[str, tuple[str, ...]] = {
    "everything": ("method=ewc",),
    "frozen trunk": ("stage_defaults.penalty.kind=ewc", FROZEN, OLD),
    "a part": (*PAIRS, f"{TRAINABLE}moe", "stage_defaults.penalty.kind=ewc"),
}


@pytest.mark.parametrize("overrides", MEASURED.values(), ids=MEASURED.keys())
def test_what_weights_are_measured_on_is_what_runs(make_run: MakeRun, overrides: tuple[str, ...]) -> None:
    specs, made = planned(make_run, *overrides, "stage_defaults.penalty.fisher_tokens=320")
    spec, (parent, after) = specs[1], made
    model = LanguageModel(parent)
    fill(model)
    freeze_trunk(model, spec.trunk)
    freeze_for_finetuning(model, spec.finetune)
    whole = dataclasses.replace(spec, optim=dataclasses.replace(spec.optim, batch_tokens=320), accumulate=1)
    batch = batch_of(whole, spec.phases()[0], parent)
    with isolated_documents([model] if spec.finetune else []):
        found = counted(lambda: fisher_diagonal(model, batch))
    assert spec.fisher_measured_tokens == 320
    assert stage_flops(spec, after, parent) - loop_flops(spec, after, parent) == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("overrides", [(), (*DELTAS, "routing.chunk_tokens=1")], ids=["plain", "deltas"])
def test_what_the_old_model_writes_is_what_runs(make_run: MakeRun, overrides: tuple[str, ...]) -> None:
    replay = "stage_defaults.replay={fraction: 0.25, source: generated}"
    three = "stages=[{data: english}, {data: python}, {data: english, name: again}]"
    specs, made = planned(make_run, *overrides, three, replay)
    spec, parent, after = specs[2], made[1], made[2]
    model, blocks = LanguageModel(parent), spec.written_blocks[0]
    fill(model)

    def domain_ids_of(ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return ids % 2 if parent.has_deltas else ids * 0  # half of the text is each generation's

    kwargs: Any = {"context": CONTEXT, "seed": 0, "domain_ids_of": domain_ids_of}
    found = counted(lambda: generate_blocks(model, blocks, **kwargs))
    assert stage_flops(spec, after, parent) - loop_flops(spec, after, parent) == pytest.approx(found, rel=0.02)
