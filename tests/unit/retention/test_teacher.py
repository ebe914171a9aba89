from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

from lifelong_moe.config.growth import ExpertInit, GrowConfig
from lifelong_moe.config.retention import (
    DistillConfig,
    DistillText,
    PenaltyConfig,
    ReplayConfig,
    ReviewConfig,
    TrunkConfig,
)
from lifelong_moe.growth.grow import grow
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.ops.losses import distillation_loss
from lifelong_moe.plan.architecture import Generation
from lifelong_moe.retention.teacher import distilled_rows, make_teacher, shared_blocks

Make = Callable[..., LanguageModel]
Batch = Callable[..., dict[str, Tensor]]


def expert_parameters(model: LanguageModel) -> list[Tensor]:
    return [p for layer in model.moe_layers() for p in layer.parameters()]


def logits(model: LanguageModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        hidden = model(TokenBatch(batch["token_ids"], domain_ids_BS=batch["domain_ids"])).hidden_BSD
        return model.head.logits(hidden.flatten(0, 1))


def test_it_shares_what_cannot_change_and_copies_the_rest(make_model: Make) -> None:
    model = make_model(model={"tie_embeddings": True})
    shared = expert_parameters(model)
    teacher = make_teacher(model, shared)
    theirs = {name: p.data_ptr() for name, p in teacher.named_parameters()}
    for name, parameter in model.named_parameters():
        assert (theirs[name] == parameter.data_ptr()) is (".moe." in name), name
    assert teacher.head.weight is teacher.embedding.weight
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for name, p in model.named_parameters() if ".moe." not in name)


def test_growth_and_training_leave_the_teacher_alone(make_model: Make, make_batch: Batch, router_kind: str) -> None:
    model, batch = make_model(router_kind), make_batch()
    teacher = make_teacher(model, expert_parameters(model))
    before = logits(teacher, batch)
    grow(model, Generation("new", 2), GrowConfig(experts=2, init=ExpertInit.random), batch, seed=0)
    assert all(layer.router.generations == [4] and len(layer.banks) == 4 for layer in teacher.moe_layers())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert torch.equal(logits(teacher, batch), before)


def test_no_divergence_before_the_first_step(make_model: Make, make_batch: Batch, router_kind: str) -> None:
    model, batch = make_model(router_kind).eval(), make_batch()
    teacher = make_teacher(model, expert_parameters(model))
    grow(model, Generation("new", 2), GrowConfig(experts=2), batch, seed=0)
    with ExitStack() as held:
        for layer in model.moe_layers():
            held.enter_context(layer.router.masking_newest())
        student = logits(model, batch)
    assert float(distillation_loss(student, logits(teacher, batch), 2.0)) == pytest.approx(0.0, abs=1e-6)


def test_frozen_lower_blocks_are_shared(make_model: Make, make_batch: Batch) -> None:
    model, batch = make_model(model={"layers": 3}), make_batch()
    for module in (model.embedding, model.blocks[0], model.blocks[1]):
        module.requires_grad_(False)
    teacher = make_teacher(model, [p for p in model.parameters() if not p.requires_grad])
    assert shared_blocks(model, teacher) == 2
    with torch.no_grad():
        model.blocks[2].attention.query.weight.add_(1.0)
        below = model(TokenBatch(batch["token_ids"]), split=2).below_BSD
        whole = teacher(TokenBatch(batch["token_ids"])).hidden_BSD
        assert torch.equal(teacher(TokenBatch(batch["token_ids"]), split=2, below_BSD=below).hidden_BSD, whole)
    grow(model, Generation("new", 2, layers=(2,)), GrowConfig(experts=2), batch, seed=0)
    assert shared_blocks(model, teacher) == 2  # rows for no expert change nothing
    model.blocks[1].moe_norm.requires_grad_(True)
    assert shared_blocks(model, teacher) == 1
    grow(model, Generation("newer", 2), GrowConfig(experts=2), batch, seed=0)
    assert shared_blocks(model, teacher) == 0
    model.embedding.requires_grad_(True)
    assert shared_blocks(model, teacher) == 0


@pytest.mark.parametrize("kind", ["label", "gshard", "bundles", "switch", "noisy"])
def test_blocks_that_may_route_otherwise_are_not(make_model: Make, kind: str) -> None:
    model = make_model(kind).requires_grad_(False)
    assert shared_blocks(model, make_teacher(model, list(model.parameters()))) == 0


NEW_OLD = torch.tensor([False, True, False, True, False, True])
ORDINAL = torch.tensor([0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize(
    ("text", "fraction", "expected"),
    [
        (DistillText.replay, 1.0, [1, 3, 5]),
        (DistillText.new, 1.0, [0, 2, 4]),
        (DistillText.replay, 0.5, [3]),  # every second one of its kind, wherever batches begin
        (DistillText.new, 0.01, []),
    ],
)
def test_which_sequences_are_distilled_on(text: DistillText, fraction: float, expected: list[int]) -> None:
    assert distilled_rows(NEW_OLD, ORDINAL, DistillConfig(text=text, fraction=fraction)).tolist() == expected


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.3, 1.0])
def test_the_share_is_exact_over_a_stage(fraction: float) -> None:
    config, ordinals = DistillConfig(text=DistillText.new, fraction=fraction), torch.arange(1000)
    new = torch.zeros(1000, dtype=torch.bool)
    assert len(distilled_rows(new, ordinals, config)) == round(1000 * fraction)


def test_nothing_to_distil_on() -> None:
    none = torch.zeros(4, dtype=torch.bool)
    ordinals = torch.arange(4)
    assert distilled_rows(none, ordinals, DistillConfig(text=DistillText.replay)).tolist() == []
    assert distilled_rows(~none, ordinals, DistillConfig(text=DistillText.new)).tolist() == []


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrunkConfig(lr_scale=0.0), r"trunk\.lr_scale=0\.0 must lie in \(0, 1\]"),
        (lambda: DistillConfig(weight=-1.0), r"distill\.weight=-1\.0 must not be negative"),
        (lambda: DistillConfig(temperature=0.0), r"distill\.temperature=0\.0 must be positive"),
        (lambda: DistillConfig(fraction=0.0), r"distill\.fraction=0\.0 must lie in \(0, 1\]"),
        (lambda: ReplayConfig(fraction=1.0), r"replay\.fraction=1\.0 must lie in \[0, 1\)"),
        (lambda: ReplayConfig(buffer_tokens=0), r"replay\.buffer_tokens=0 must be positive"),
        (lambda: TrunkConfig(rank=0), r"trunk\.rank=0 must be at least 1"),
        (lambda: PenaltyConfig(weight=-1.0), r"penalty\.weight=-1\.0 must not be negative"),
        (lambda: PenaltyConfig(fisher_tokens=0), r"penalty\.fisher_tokens=0 must be positive"),
        (lambda: ReviewConfig(fraction=1.0), r"review\.fraction=1\.0 must lie in \[0, 1\)"),
        (lambda: ReviewConfig(replay_fraction=1.0), r"review\.replay_fraction=1\.0 must lie between 0 and 1"),
        (lambda: ReviewConfig(old_loss=-1.0), r"review\.old_loss=-1\.0 must not be negative"),
        (lambda: ReviewConfig(lr_scale=0.0), r"review\.lr_scale=0\.0 must be positive"),
    ],
)
def test_values_out_of_range(build: Callable[[], object], message: str) -> None:
    with pytest.raises(Exception, match=message):
        build()
