from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lifelong_moe.config.retention import TrunkTraining
from lifelong_moe.config.run import RunConfig
from lifelong_moe.config.training import FinetuneConfig, OptimConfig, Schedule, Trainable
from lifelong_moe.errors import ConfigError
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel, initialize
from lifelong_moe.plan.architecture import Architecture, Generation
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.plan.planned import trainable_parameters
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.training.loop.optimizer import (
    Rate,
    build_optimizer,
    build_schedule,
    freeze_for_finetuning,
    freeze_trunk,
    parameter_rates,
    phase_parameters,
    rate_factor,
    training_only,
)
from lifelong_moe.training.preparation import unchanging_tensors

Make = Callable[..., LanguageModel]
MakeRun = Callable[..., RunConfig]
Batch = Callable[..., dict[str, Tensor]]
GENTLE, FROZEN, FULL = (f"stage_defaults.trunk.train={train}" for train in ("gentle", "frozen", "full"))
DELTAS = ("model.document_mask=true", "routing.bundles=label", "stage_defaults.trunk.train=deltas")


def test_cosine_by_hand() -> None:
    config = OptimConfig(warmup_fraction=0.2, min_lr_fraction=0.1)
    # Ten steps: two of warm-up at 1/3 and 2/3, then eight of the cosine from 1; half way it is the mean of both ends.
    found = [rate_factor(step, 10, config) for step in range(11)]
    assert found[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert found[6] == pytest.approx(0.55)
    assert found[4] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert found[10] == pytest.approx(0.1)
    assert found[2:] == sorted(found[2:], reverse=True)


def test_constant_by_hand() -> None:
    config = OptimConfig(schedule=Schedule.constant, warmup_fraction=0.1)
    assert [rate_factor(step, 10, config) for step in range(10)] == [0.5] + [1.0] * 9


def test_wsd_by_hand() -> None:
    config = OptimConfig(schedule=Schedule.wsd, warmup_fraction=0.2, decay_fraction=0.4, min_lr_fraction=0.1)
    # Two steps of warm-up, four at the peak, and four from it down to a tenth, 0.9 / 4 lower each.
    found = [rate_factor(step, 10, config) for step in range(11)]
    assert found == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1])
    stable = OptimConfig(schedule=Schedule.wsd, warmup_fraction=0.0, decay_fraction=0.0)
    assert [rate_factor(step, 4, stable) for step in range(4)] == [1.0] * 4
    falling = OptimConfig(schedule=Schedule.wsd, warmup_fraction=0.0, decay_fraction=1.0, min_lr_fraction=0.0)
    assert [rate_factor(step, 4, falling) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_never_zero_and_never_above_the_peak(schedule: Schedule, warmup: float, steps: int) -> None:
    config = OptimConfig(schedule=schedule, warmup_fraction=warmup, min_lr_fraction=0.1)
    assert all(0.1 - 1e-12 <= rate_factor(step, steps, config) <= 1.0 for step in range(steps + 1))


def spec_of(make_run: MakeRun, *overrides: str, stage: int = 1) -> StageSpec:
    """A stage with a peak rate of 0.8."""
    settings = ("optim.lr=0.8", "optim.weight_decay=0.5", "trunk.lr_scale=0.25")
    return stage_specs(make_run(*(f"stage_defaults.{setting}" for setting in settings), *overrides))[stage]


@pytest.fixture
def unfrozen(make_architecture: Callable[..., Architecture]) -> LanguageModel:
    """Four old experts that train on, and two new ones."""
    model = LanguageModel(dataclasses.replace(make_architecture("learned", (4, 2)), frozen=0))
    initialize(model, 0)
    return model


def groups(model: LanguageModel, spec: StageSpec, phase: int = 0) -> dict[str, tuple[float, float]]:
    """Rate and decay of each parameter that the optimizer knows, by name."""
    freeze_trunk(model, spec.trunk)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer, rates = build_optimizer(model, spec, spec.phases()[phase])
    assert len(rates) == len(optimizer.param_groups)
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


def test_a_gentle_trunk(make_run: MakeRun, make_model: Make) -> None:
    found = groups(make_model("learned", (4, 2)), spec_of(make_run, GENTLE))
    assert found["embedding.weight"] == (0.2, 0.5)
    assert found["blocks.1.attention.query.weight"] == (0.2, 0.5)
    assert found["blocks.0.moe_norm.weight"] == found["norm.weight"] == (0.2, 0.0)
    assert found["blocks.0.moe.banks.generations.1.down"] == found["blocks.0.moe.router.rows.1"] == (0.8, 0.5)


@pytest.mark.parametrize("trunk", ["method=sequential", FULL])
def test_a_full_trunk(make_run: MakeRun, make_model: Make, trunk: str) -> None:
    found = groups(make_model("learned", (4, 2)), spec_of(make_run, trunk))
    assert found["embedding.weight"] == found["blocks.1.moe.banks.generations.1.gate_up"] == (0.8, 0.5)
    assert found["norm.weight"] == (0.8, 0.0)


def test_a_frozen_trunk_leaves_the_newest_experts(make_run: MakeRun, make_model: Make) -> None:
    found = groups(make_model("learned", (4, 2)), spec_of(make_run, FROZEN))
    assert set(found.values()) == {(0.8, 0.5)}
    assert {name.split(".moe.")[1] for name in found} == {
        "banks.generations.1.gate_up", "banks.generations.1.down", "router.rows.1",
    }  # fmt: skip


def test_deltas_train_in_the_trunk_s_place(make_run: MakeRun, make_model: Make) -> None:
    model = make_model("labelled_bundles", (4, Generation("s1", 2, delta_rank=3), Generation("s2", 2, delta_rank=3)))
    found = groups(model, spec_of(make_run, *DELTAS))
    of_trunk = {name for name in found if ".moe." not in name}
    # Up and down of four attention matrices in two layers, of embedding and of head: the newest bundle's, number 2.
    assert len(of_trunk) == 2 * (4 * 2 + 2) and all(".deltas.2." in name for name in of_trunk)
    assert {found[name] for name in of_trunk} == {(0.8, 0.5)}


@pytest.mark.parametrize("trunk", ["method=sequential", GENTLE, FULL])
def test_frozen_experts_are_unknown_to_it(make_run: MakeRun, make_model: Make, trunk: str) -> None:
    model = make_model("learned", (4, 2))
    known = set(groups(model, spec_of(make_run, trunk)))
    assert known == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(".banks.generations.0." in name for name in known)
    assert "blocks.0.moe.router.rows.0" not in known


def test_tied_embeddings_are_known_once(make_run: MakeRun, make_model: Make) -> None:
    model, spec = make_model(model={"tie_embeddings": True}), spec_of(make_run, GENTLE)
    optimizer, _ = build_optimizer(model, spec, spec.phases()[0])
    known = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(known) == len(set(known)) and known.count(id(model.embedding.weight)) == 1


def test_nothing_to_train(make_run: MakeRun, make_model: Make) -> None:
    model = make_model()
    model.freeze_generations()
    with pytest.raises(ConfigError, match=r"nothing is left to train: .*grow\.experts above 0"):
        groups(model, spec_of(make_run, FROZEN))


def rates_of(model: LanguageModel, spec: StageSpec, phase: int = 0) -> dict[str, Rate]:
    """Rates of one parameter of each class."""
    rates = parameter_rates(model, spec, spec.phases()[phase])
    assert set(rates) == set(dict(model.named_parameters()))
    block = "blocks.1.moe"
    return {
        "trunk": rates["blocks.1.attention.key.weight"],
        "new expert": rates[f"{block}.banks.generations.1.down"],
        "new rows": rates[f"{block}.router.rows.1"],
        "old expert": rates[f"{block}.banks.generations.0.down"],
        "old rows": rates[f"{block}.router.rows.0"],
    }


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"trunk": Rate(0.25)}),
        (["optim.router_until=0.7"], {"trunk": Rate(0.25), "new rows": Rate(1.0, 0.7)}),
        (
            ["grow.old_lr_scale=0.5", "grow.old_until=0.4", "optim.router_until=0.7"],
            {
                "trunk": Rate(0.25), "new rows": Rate(1.0, 0.7),
                "old expert": Rate(0.5, 0.4), "old rows": Rate(0.5, 0.4),
            },
        ),
        (  # whichever comes first
            ["grow.old_lr_scale=0.5", "grow.old_until=0.9", "optim.router_until=0.7", "trunk.train=full"],
            {"new rows": Rate(1.0, 0.7), "old expert": Rate(0.5, 0.9), "old rows": Rate(0.5, 0.7)},
        ),
    ],
)  # fmt: skip
def test_rates_by_hand(
    make_run: MakeRun, unfrozen: LanguageModel, overrides: list[str], expected: dict[str, Rate]
) -> None:
    spec = spec_of(make_run, *(f"stage_defaults.{override}" for override in overrides))
    found = rates_of(unfrozen, spec)
    if "grow.old_lr_scale=0.5" not in overrides:  # frozen then, and unknown to the optimizer
        del found["old expert"], found["old rows"]
    assert found == {name: expected.get(name, Rate()) for name in found}


def test_the_first_stage_and_one_without_growth_know_no_old_experts(make_run: MakeRun, unfrozen: LanguageModel) -> None:
    settings = ("stage_defaults.optim.router_until=0.7", "stage_defaults.grow.old_lr_scale=0.5")
    first, second = (spec_of(make_run, "method=sequential", *settings, stage=stage) for stage in (0, 1))
    assert set(rates_of(unfrozen, first).values()) == {Rate()}
    found = rates_of(unfrozen, second)
    assert found["old rows"] == found["new rows"] == Rate(1.0, 0.7)
    assert found["old expert"] == found["new expert"] == found["trunk"] == Rate()


def test_rewarming_is_for_later_stages(make_run: MakeRun, make_model: Make) -> None:
    first, second = (spec_of(make_run, GENTLE, "stage_defaults.optim.rewarm=0.5", stage=stage) for stage in (0, 1))
    found = groups(make_model(), first)
    assert found["embedding.weight"] == found["blocks.0.moe.banks.generations.0.down"] == (0.8, 0.5)
    found = groups(make_model("learned", (4, 2)), second)
    assert found["embedding.weight"] == (0.1, 0.5) and found["blocks.0.moe.banks.generations.1.down"] == (0.4, 0.5)


def test_a_review_trains_the_newest_rows(make_run: MakeRun, make_model: Make) -> None:
    review = "stage_defaults.review={fraction: 0.3, lr_scale: 0.5}"
    spec = spec_of(make_run, review, "stage_defaults.optim.rewarm=0.5", "stage_defaults.optim.router_until=0.1")
    model = make_model("learned", (4, 2, 3))
    phase = spec.phases()[1]
    assert set(phase_parameters(model, phase)) == {f"blocks.{i}.moe.router.rows.2" for i in (0, 1)}
    optimizer, rates = build_optimizer(model, spec, phase)
    assert [group["lr"] for group in optimizer.param_groups] == [0.8 * 0.5 * 0.5]
    assert rates == [Rate()]  # it is for the router, whose rows may have settled before


def test_rows_of_a_layer_that_did_not_grow_are_no_rows(make_run: MakeRun, make_model: Make) -> None:
    model = make_model("learned", (4, Generation("s1", 2, layers=(1,))))
    spec = spec_of(make_run, "stage_defaults.review.fraction=0.3")
    train, review = (set(phase_parameters(model, phase)) for phase in spec.phases())
    assert review == {"blocks.1.moe.router.rows.1"}
    assert "blocks.0.moe.router.rows.1" not in train and "blocks.1.moe.router.rows.1" in train


def test_training_only_gives_gradients_to_some_and_back_to_all(make_model: Make, make_batch: Batch) -> None:
    model, batch = make_model("learned", (4, 2)), make_batch()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    chosen = [layer.router.row_generations()[-1] for layer in model.moe_layers()]
    with training_only(model, chosen):  # type: ignore[arg-type]
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {
            f"blocks.{i}.moe.router.rows.1" for i in (0, 1)
        }
        model.head.cross_entropy(
            model(TokenBatch(batch["token_ids"])).hidden_BSD.flatten(0, 1), batch["target_ids"].flatten()
        ).backward()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"blocks.{i}.moe.router.rows.1" for i in (0, 1)
    }
    with pytest.raises(KeyError), training_only(model, []):
        raise KeyError
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def changes(model: LanguageModel, spec: StageSpec, batch: dict[str, Tensor], steps: int) -> dict[str, list[bool]]:
    """Whether each step changed a bit of each parameter."""
    model.train()
    optimizer, rates = build_optimizer(model, spec, spec.phases()[0])
    schedule = build_schedule(optimizer, rates, steps, spec.optim)
    found: dict[str, list[bool]] = {name: [] for name, _ in model.named_parameters()}
    for _ in range(steps):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        output = model(TokenBatch(batch["token_ids"]))
        loss = model.head.cross_entropy(output.hidden_BSD.flatten(0, 1), batch["target_ids"].flatten())
        (loss + sum(r.losses["balance"].value for r in output.routings)).backward()
        optimizer.step()
        schedule.step()
        for name, parameter in model.named_parameters():
            found[name].append(not torch.equal(parameter, before[name]))
    return found


def test_what_has_stopped_stays_the_same_bits(make_run: MakeRun, unfrozen: LanguageModel, make_batch: Batch) -> None:
    """Weight decay, 0.5 here, and moments from before have no effect any more."""
    settings = ("grow.old_lr_scale=0.5", "grow.old_until=0.3", "optim.router_until=0.6", "optim.schedule=constant")
    spec = spec_of(make_run, "stage_defaults.optim.lr=0.01", *(f"stage_defaults.{setting}" for setting in settings))
    found = changes(unfrozen, spec, make_batch(), steps=10)
    for name, moved in found.items():
        if ".rows.0" in name or ".generations.0." in name:
            assert moved == [True] * 3 + [False] * 7, name
        elif ".rows.1" in name:
            assert moved == [True] * 6 + [False] * 4, name
        else:
            assert moved == [True] * 10, name


def test_rows_that_never_train(make_run: MakeRun, make_model: Make, make_batch: Batch) -> None:
    spec = spec_of(make_run, "stage_defaults.optim.router_until=0", "stage_defaults.optim.lr=0.01")
    found = changes(make_model("learned", (4, 2)), spec, make_batch(), steps=3)
    assert not any(any(moved) for name, moved in found.items() if ".router." in name)
    assert all(found["blocks.0.moe.banks.generations.1.down"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lr": 0.0}, "optim.lr=0.0 must be positive"),
        ({"warmup_fraction": 1.5}, "optim.warmup_fraction=1.5 must lie in"),
        ({"min_lr_fraction": -0.1}, "optim.min_lr_fraction=-0.1 must lie in"),
        ({"beta1": 1.0}, "optim.beta1=1.0 must lie in"),
        ({"beta2": -0.1}, "optim.beta2=-0.1 must lie in"),
        ({"rewarm": 0.0}, "optim.rewarm=0.0 must be positive"),
        ({"router_until": -0.1}, "optim.router_until=-0.1 must lie in"),
        ({"decay_fraction": 1.1}, "optim.decay_fraction=1.1 must lie in"),
        ({"batch_tokens": 0}, "optim.batch_tokens=0 must be positive"),
        ({"weight_decay": -1.0}, "optim.weight_decay=-1.0 must not be negative"),
    ],
)
def test_values_out_of_range(keys: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        OptimConfig(**keys)  # type: ignore[arg-type]


SHAPES = {
    "every other layer": ["model.moe_every=2"],
    "shared experts": ["model.shared_experts=1"],
    "both": ["model.moe_every=2", "model.shared_experts=1", "model.shared_mix=learned"],
    "bundles": ["model.document_mask=true", "routing.bundles=label"],
}


@pytest.mark.parametrize("trainable", list(Trainable))
@pytest.mark.parametrize(
    ("shape", "trunk"),
    [
        *itertools.product(SHAPES, [TrunkTraining.frozen]),
        *itertools.product(["every other layer", "shared experts", "both"], [TrunkTraining.gentle]),
        ("bundles", TrunkTraining.deltas),  # a trunk that moves is refused
    ],
)
def test_a_plan_counts_what_trains(make_run: MakeRun, shape: str, trunk: TrunkTraining, trainable: Trainable) -> None:
    run = make_run(*SHAPES[shape], f"stage_defaults.trunk.train={trunk}")
    _, grown = stage_specs(run)
    tuned = dataclasses.replace(grown, grow=None, finetune=FinetuneConfig(trainable=trainable), parent=1)
    parent = grown.architecture(stage_specs(run)[0].architecture(None, 61, 0), 61, 0)
    for spec, before in ((grown, None), (tuned, parent)):
        architecture = parent if before is None else spec.architecture(before, 61, 0)
        model = LanguageModel(architecture)
        freeze_trunk(model, spec.trunk)
        freeze_for_finetuning(model, spec.finetune)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trainable_parameters(spec, architecture) == trained


def test_fine_tuning_splits_by_what_a_layer_is(make_run: MakeRun) -> None:
    spec = stage_specs(make_run(*SHAPES["both"]))[0]
    model = LanguageModel(spec.architecture(None, 61, 0))  # layer 0 is dense, layer 1 has experts and a shared one
    sparse = {"blocks.1.moe.router.rows.0"}
    sparse |= {f"blocks.1.moe.banks.generations.0.{matrix}" for matrix in ("gate_up", "down")}
    of_all = {"blocks.0.moe.shared.gate_up", "blocks.1.moe.shared.down", "blocks.1.moe.mix.weight"}
    everything = {name for name, p in model.named_parameters() if p.numel()}
    assert sparse < everything and of_all < everything
    found = {}
    for trainable in Trainable:
        model.requires_grad_(True)
        freeze_for_finetuning(model, FinetuneConfig(trainable=trainable))
        found[trainable] = {name for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    assert found[Trainable.all] == everything
    assert found[Trainable.moe] == sparse and found[Trainable.non_moe] == everything - sparse
    assert found[Trainable.attention] == {
        f"blocks.{layer}.attention.{name}.weight" for layer in range(2) for name in ("query", "key", "value", "output")
    }


def test_a_teacher_shares_no_dense_layer_that_trains(make_run: MakeRun) -> None:
    first, second = stage_specs(make_run(*SHAPES["both"]))
    model = LanguageModel(first.architecture(None, 61, 0))
    shared = {id(tensor) for tensor in unchanging_tensors(model, second)}
    model.freeze_generations()  # as growth does
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(model.trunk_parameters()) and "blocks.0.moe.shared.down" in trained
    assert {id(p) for p in model.parameters()} - {id(model.get_parameter(name)) for name in trained} == shared
