"""One phase in a real Trainer: what a step is made of, and what is never stepped on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn import Parameter
from torch.utils.data import DataLoader

from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.run import RunConfig
from lifelong_moe.errors import CorruptError, DivergedError
from lifelong_moe.model.moe import no_routing
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.ops.losses import distillation_loss
from lifelong_moe.plan.architecture import Generation, first_generation
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.retention.penalty import WeightAnchor, make_anchor
from lifelong_moe.retention.teacher import make_teacher
from lifelong_moe.routing.base import RouterLoss, Routing
from lifelong_moe.training.loop.means import StepMeans
from lifelong_moe.training.loop.module import StageModule, router_losses
from lifelong_moe.training.loop.optimizer import freeze_trunk, phase_parameters, training_only
from lifelong_moe.training.loop.shares import Tally, with_shares

Make = Callable[..., LanguageModel]
Batch = Callable[..., dict[str, Tensor]]
MakeRun = Callable[..., RunConfig]
STEPS = 6


class Snapshots(Callback):
    """Parameters and optimizer state after each step."""

    def __init__(self) -> None:
        self.parameters: list[dict[str, Tensor]] = []
        self.moments: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        self.parameters.append({n: p.detach().clone() for n, p in module.model.named_parameters()})
        state = trainer.optimizers[0].state
        self.moments.append([value.clone() for s in state.values() for value in s.values()])


class BadGradient(Callback):
    """Make one parameter's gradient not finite in some backward passes, counted from 0."""

    def __init__(self, parameter: Tensor, at: set[int], value: float) -> None:
        self.seen = 0

        def hook(grad: Tensor) -> Tensor:
            bad = self.seen in at
            self.seen += 1
            return grad.index_fill(0, torch.tensor([0]), value) if bad else grad

        parameter.register_hook(hook)


def fit(module: StageModule, batches: list[dict[str, Tensor]], *callbacks: Callback, accumulate: int = 1) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=len(batches) // accumulate,
        accumulate_grad_batches=accumulate,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return trainer


def stage_module(
    make_run: MakeRun,
    model: LanguageModel,
    *overrides: str,
    stage: int = 0,
    phase: int = 0,
    teacher: LanguageModel | None = None,
    anchor: WeightAnchor | None = None,
) -> StageModule:
    spec = stage_specs(make_run("stage_defaults.optim.lr=0.01", "stage_defaults.optim.weight_decay=0.5", *overrides))
    module = StageModule(model, spec[stage], spec[stage].phases()[phase], teacher, anchor)
    model.train()
    return module


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", ["trainer.gradient_clip=1.0", "trainer.gradient_clip=0"])
def test_a_bad_gradient_is_dropped_whole(
    make_run: MakeRun, make_model: Make, make_batch: Batch, value: float, clip: str
) -> None:
    model = make_model()
    module, seen = stage_module(make_run, model, clip), Snapshots()
    bad = BadGradient(model.embedding.weight, {2}, value)
    trainer = fit(module, [make_batch(seed=i) for i in range(STEPS)], seen, bad)
    assert trainer.global_step == STEPS and len(seen.parameters) == STEPS
    # Neither gradient nor moments nor weight decay (0.5 here) moved anything in step 2, and only there.
    changed = [not equal(seen.parameters[i], seen.parameters[i - 1]) for i in range(1, STEPS)]
    assert changed == [True, False, True, True, True]
    assert all(torch.equal(a, b) for a, b in zip(seen.moments[1], seen.moments[2], strict=True))
    assert (module.guard.nonfinite_steps, module.guard.nonfinite_in_a_row) == (1, 0)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_a_bad_micro_batch_drops_its_step(make_run: MakeRun, make_model: Make, make_batch: Batch) -> None:
    model = make_model()
    module, seen = stage_module(make_run, model), Snapshots()
    bad = BadGradient(model.embedding.weight, {2}, float("nan"))  # the first half of step 1
    fit(module, [make_batch(seed=i) for i in range(STEPS)], seen, bad, accumulate=2)
    assert len(seen.parameters) == 3
    assert equal(seen.parameters[0], seen.parameters[1]) and not equal(seen.parameters[1], seen.parameters[2])
    assert module.guard.nonfinite_steps == 1


def test_three_in_a_row_is_divergence(make_run: MakeRun, make_model: Make, make_batch: Batch) -> None:
    model = make_model()
    module, seen = stage_module(make_run, model), Snapshots()
    bad = BadGradient(model.embedding.weight, {1, 2, 3}, float("nan"))
    with pytest.raises(DivergedError, match=r"stage english: 3 steps in a row .* \(last: step 3\)") as caught:
        fit(module, [make_batch(seed=i) for i in range(STEPS)], seen, bad)
    assert caught.value.exit_code == 6 and "\n" not in str(caught.value)
    assert equal(dict(model.named_parameters()), seen.parameters[0])  # type: ignore[arg-type]


def test_two_in_a_row_twice_are_not(make_run: MakeRun, make_model: Make, make_batch: Batch) -> None:
    model = make_model()
    module = stage_module(make_run, model)
    fit(module, [make_batch(seed=i) for i in range(STEPS)], BadGradient(model.norm.weight, {0, 1, 3, 4}, float("nan")))
    assert (module.guard.nonfinite_steps, module.guard.nonfinite_in_a_row) == (4, 0)


def test_a_parameter_that_is_not_finite_ends_training(make_run: MakeRun, make_model: Make, make_batch: Batch) -> None:
    model = make_model()
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(DivergedError):
        fit(stage_module(make_run, model), [make_batch(seed=i) for i in range(STEPS)])


def test_gradients_are_clipped_by_norm(make_run: MakeRun, make_model: Make, make_batch: Batch) -> None:
    for limit, expected in (("1.0", [0.6, 0.8]), ("0", [3.0, 4.0]), ("100.0", [3.0, 4.0])):
        module = stage_module(make_run, make_model(), f"trainer.gradient_clip={limit}")
        weight = Parameter(torch.zeros(2))
        weight.grad = torch.tensor([3.0, 4.0])
        module.training_step(make_batch(), 0)
        module.configure_gradient_clipping(torch.optim.SGD([weight], lr=1.0))
        assert weight.grad.tolist() == pytest.approx(expected, abs=1e-5)
        assert module.grad_norm == 5.0


def test_the_loss_is_the_sum_of_its_parts(make_run: MakeRun, make_model: Make, make_batch: Batch) -> None:
    model, batch = make_model(), make_batch()
    teacher = make_teacher(make_model(seed=1), [])
    overrides = [f"stage_defaults.distill.{kv}" for kv in ("weight=3.0", "temperature=2.0", "text=replay")]
    module = stage_module(make_run, model, *overrides, stage=1, teacher=teacher)
    step = module.training_step(batch, 0)
    parts: Any = {name: value.item() for name, value in step["parts"].items()}
    assert set(parts) == {"loss", "balance_loss", "z_loss", "distill_loss"}
    # 2 of 4 sequences are replayed, where spec.replay.fraction lets expect fewer: their KL counts for more.
    share = 2 / (4 * module.spec.replay.fraction)
    distilled = 3.0 * share * parts["distill_loss"]
    routers = 2 * (0.0025 * parts["balance_loss"] + 0.00025 * parts["z_loss"])  # the sum of two layers; parts are means
    expected = parts["loss"] + routers + distilled
    assert step["loss"].item() == pytest.approx(expected, rel=1e-6)

    with torch.no_grad():
        outputs = [m(TokenBatch(batch["token_ids"])) for m in (model, teacher)]
        student, other = (
            m.head.logits(o.hidden_BSD[[1, 3]].flatten(0, 1)) for m, o in zip((model, teacher), outputs, strict=True)
        )
        logits = model.head.logits(outputs[0].hidden_BSD).flatten(0, 1)
    # Rows 1 and 3 are the replayed ones.
    assert parts["distill_loss"] == pytest.approx(float(distillation_loss(student, other, 2.0)), rel=1e-4)
    nats = torch.nn.functional.cross_entropy(logits, batch["target_ids"].flatten())
    assert parts["loss"] == pytest.approx(float(nats), rel=1e-5)
    balance = torch.stack([r.losses["balance"].value for r in outputs[0].routings]).mean()
    assert parts["balance_loss"] == pytest.approx(float(balance), rel=1e-5)


def test_the_measured_runs_keep_their_pressure(make_run: MakeRun, make_model: Make, make_batch: Batch) -> None:
    """Of four layers the defaults' sum is what 0.01 and 0.001 on a mean over layers was, by hand from logits."""
    model, batch, seen = make_model(model={"layers": 4}), make_batch(), []
    for layer in model.moe_layers():
        layer.router.register_forward_pre_hook(lambda router, args: seen.append(router.logits(args[0])))
    hidden_TD = model(TokenBatch(batch["token_ids"])).hidden_BSD.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(model.head.logits(hidden_TD), batch["target_ids"].flatten())
    for logits_TE in seen:
        probs_TE, experts = logits_TE.softmax(1), logits_TE.shape[1]
        chosen_TE = torch.nn.functional.one_hot(logits_TE.topk(2).indices, experts).sum(1)
        balance = experts / 2 * (chosen_TE.float().mean(0) * probs_TE.mean(0)).sum()
        loss = loss + 0.01 / 4 * balance + 0.001 / 4 * logits_TE.exp().sum(1).log().square().mean()
    loss.backward()
    rows = [p for layer in model.moe_layers() for p in layer.router.parameters()]
    expected = [p.grad for p in rows]
    model.zero_grad()
    stage_module(make_run, model).training_step(batch, 0)["loss"].backward()
    assert len(rows) == 4
    for parameter, gradient in zip(rows, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("shape", "routers"), [({"moe_every": 2}, 2), ({"dense_layers": 3}, 1), ({"experts": [2, 4, 3, 2]}, 4)]
)
def test_only_layers_with_a_router_are_summed(
    shape: dict[str, Any], routers: int, make_model: Make, make_batch: Batch
) -> None:
    generation = first_generation("s0", ModelConfig(layers=4, **{"experts": 4, **shape}))
    model = make_model("learned", (generation,), model={"layers": 4, **shape})
    routings = model(TokenBatch(make_batch()["token_ids"])).routings
    with_loss = [r for r in routings if r.losses]
    assert len(with_loss) == routers
    mean, weighted = router_losses(routings)["balance"]
    values = [r.losses["balance"].value.item() for r in with_loss]
    assert mean.item() == pytest.approx(sum(values) / len(values), rel=1e-6)
    assert weighted.item() == pytest.approx(0.0025 * sum(values), rel=1e-6)


def test_a_layer_without_a_loss_has_no_share_in_it() -> None:
    one, other = ({"z": RouterLoss(torch.tensor(v), c)} for v, c in ((3.0, 0.5), (5.0, 0.1)))
    rest = no_routing(torch.zeros(2, 4))
    routings = [Routing(rest.expert_ids_TK, rest.weights_TK, 0, losses) for losses in (one, {}, other)]
    mean, weighted = router_losses(routings)["z"]
    assert (mean.item(), weighted.item()) == pytest.approx((4.0, 2.0))


def test_without_replayed_text_there_is_nothing_to_distil(
    make_run: MakeRun, make_model: Make, make_batch: Batch
) -> None:
    batch = make_batch() | {"replayed": torch.zeros(4, dtype=torch.bool)}
    module = stage_module(make_run, make_model(), stage=1, teacher=make_teacher(make_model(seed=1), []))
    assert "distill_loss" not in module.training_step(batch, 0)["parts"]


def test_the_teacher_is_no_part_of_the_module(make_run: MakeRun, make_model: Make) -> None:
    model = make_model()
    module = stage_module(make_run, model, stage=1, teacher=make_teacher(make_model(seed=1), []))
    assert set(module.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    assert sum(1 for _ in module.parameters()) == sum(1 for _ in model.parameters())


def test_a_checkpoint_holds_exactly_what_trains(make_run: MakeRun, make_model: Make) -> None:
    model = make_model("learned", (4, 2))
    module = stage_module(make_run, model, stage=1)
    for loss in (2.0, math.nan, 2.5, math.nan, math.nan):
        module.guard.judge(loss)
    torch.manual_seed(7)
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    expected = torch.rand(3)
    trained = {f"model.{name}" for name in model.stored_names(trained=True)}
    assert set(checkpoint["state_dict"]) == trained

    torch.manual_seed(99)
    again = stage_module(make_run, make_model("learned", (4, 2), seed=1), stage=1)
    again.on_load_checkpoint(checkpoint)
    torch.rand(1)  # as a loader does that is set up
    again.on_train_batch_start({}, 0)
    assert vars(again.guard) == vars(module.guard) and list(again.guard.losses) == [2.0, 2.5]
    assert (again.guard.nonfinite_steps, again.guard.nonfinite_in_a_row) == (3, 2)
    assert torch.equal(torch.rand(3), expected)

    for broken in (trained - {"model.norm.weight"}, trained | {"model.blocks.0.moe.router.rows.0"}):
        with pytest.raises(CorruptError, match="step checkpoint of stage python does not fit its model"):
            again.on_load_checkpoint(checkpoint | {"state_dict": dict.fromkeys(broken)})


def test_distillation_does_not_depend_on_how_a_step_is_divided(
    make_run: MakeRun, make_model: Make, make_batch: Batch
) -> None:
    """Micro-batches of one sequence, some of them with nothing to distil, average to the whole batch's loss."""
    teacher = make_teacher(make_model(seed=1), [])
    overrides = ["stage_defaults.distill.weight=3.0", "stage_defaults.distill.text=replay"]
    module = stage_module(make_run, make_model(), *overrides, stage=1, teacher=teacher)
    batch = make_batch()

    whole = Tally.of(
        batch["mask"].sum(dim=1), batch["scored"].sum(dim=1), batch["replayed"], batch["ordinal"], module.spec.distill
    )

    def loss(part: dict[str, Any], micro_batches: int) -> Any:
        step: Any = module.training_step(with_shares(part, module.spec, whole, micro_batches), 0)
        return (
            step["loss"] - 2 * 0.0025 * step["parts"]["balance_loss"]
        ).item()  # balance is per micro-batch by nature

    parts = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(4)]
    assert loss(batch, 1) == pytest.approx(sum(loss(part, 4) for part in parts) / 4, rel=1e-5)


def test_a_micro_batch_of_prompts_alone_weighs_nothing(make_run: MakeRun, make_model: Make, make_batch: Batch) -> None:
    """Three of four scored tokens in one half of a step, and none in the other: the mean over the three."""
    module, batch = stage_module(make_run, make_model()), make_batch()
    batch["scored"] = torch.zeros(4, 16, dtype=torch.bool)
    batch["scored"][2, 3:6] = True
    sizes = (batch[name].sum(dim=1) for name in ("mask", "scored"))
    whole = Tally.of(*sizes, batch["replayed"], batch["ordinal"], None)
    halves = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    for half in halves:
        module.training_step(with_shares(half, module.spec, whole, 2), 0)
    module.means.finish_step(torch.tensor(0.0))
    with torch.no_grad():
        logits = module.model.head.logits(module.model(TokenBatch(batch["token_ids"])).hidden_BSD)
    expected = torch.nn.functional.cross_entropy(logits[2, 3:6], batch["target_ids"][2, 3:6])
    assert module.means.values["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_padding_has_no_weight_in_a_step_s_means(make_run: MakeRun, make_model: Make, make_batch: Batch) -> None:
    """One sequence of 4 real tokens and one of 16, a micro-batch each: the z-loss is the mean over 20 tokens."""
    module, batch = stage_module(make_run, make_model()), make_batch(blocks=2)
    batch["mask"][0, 4:] = batch["scored"][0, 4:] = False
    sizes = (batch[name].sum(dim=1) for name in ("mask", "scored"))
    whole = Tally.of(*sizes, batch["replayed"], batch["ordinal"], None)
    alone = []
    for row in range(2):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        step: Any = module.training_step(with_shares(one, module.spec, whole, 2), 0)
        alone.append(float(step["parts"]["z_loss"]))
    module.means.finish_step(torch.tensor(0.0))
    assert module.means.values["z_loss"] == pytest.approx((4 * alone[0] + 16 * alone[1]) / 20, rel=1e-5)
    assert alone[0] != pytest.approx(alone[1], rel=1e-3)


def test_a_step_of_prompts_alone_scores_nothing(make_run: MakeRun, make_model: Make, make_batch: Batch) -> None:
    """No loss to divide by 0, to compare later ones with, or to draw; what else trains goes on."""
    nothing = {"scored": torch.zeros(4, 16, dtype=torch.bool)}
    module = stage_module(make_run, make_model())
    fit(module, [make_batch(seed=0), make_batch(seed=1) | nothing, make_batch(seed=2) | nothing])
    assert (len(module.guard.losses), module.guard.nonfinite_steps) == (1, 0)
    assert set(module.means.values) == {"balance_loss", "z_loss", "imbalance"}
    assert all(bool(torch.isfinite(p).all()) for p in module.model.parameters())


def test_imbalance_by_hand() -> None:
    # Six of eight tokens to one of four experts, where two would be even; and two each. The mean of 3 and 1.
    chosen = ([0] * 6 + [1] * 2, [0, 1, 2, 3] * 2)
    routings = [Routing(torch.tensor(ids).unsqueeze(1), torch.ones(8, 1), 4) for ids in chosen]
    means = StepMeans()
    means.add({"loss": torch.tensor(3.0)}, {}, routings, torch.ones(8, dtype=torch.bool))
    assert means.finish_step(torch.tensor(7.0)) == 7.0 and means.values == {"loss": 3.0, "imbalance": 2.0}
    # Of the last four tokens the first layer sends two to each of two experts: the mean of 2 and 1.
    means.add({"loss": torch.tensor(3.0)}, {}, routings, torch.arange(8) >= 4)
    means.finish_step(torch.tensor(7.0))
    assert means.values["imbalance"] == 1.5


def test_padding_has_no_part_in_a_step(
    make_run: MakeRun, make_model: Make, make_batch: Batch, any_router_kind: str
) -> None:
    """Whatever stands there: in no loss, no count, no gradient, of new text and of what a teacher is asked about."""
    found = []
    for seed in (1, 2):
        batch, other = make_batch(domains=2), make_batch(seed=seed, domains=2)
        batch["mask"][:2, 9:] = batch["scored"][:2, 9:] = False
        for name in ("token_ids", "target_ids", "domain_ids", "teacher_domain_ids"):
            batch[name] = torch.where(batch["mask"], batch[name], other[name])
        model = make_model(any_router_kind, (4,))
        teacher = make_teacher(make_model(any_router_kind, (4,), seed=3), [])
        module = stage_module(make_run, model, stage=1, teacher=teacher)
        torch.manual_seed(0)
        step: Any = module.training_step(batch, 0)
        step["loss"].backward()
        found.append((step["parts"], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (parts, grads), (same_parts, same_grads) = found
    assert "distill_loss" in parts
    for one, same in ((parts, same_parts), (grads, same_grads)):
        assert one.keys() == same.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, same[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_padded_row_counts_as_the_shorter_one(make_run: MakeRun, make_model: Make, make_batch: Batch) -> None:
    """The mean is over real tokens: of 9 alone, or of 9 with padding behind them."""
    model, batch = make_model(), make_batch(blocks=1)
    module = stage_module(make_run, model)
    short = {n: value[:, :9] if value.dim() == 2 else value for n, value in batch.items()}
    batch["mask"][:, 9:] = batch["scored"][:, 9:] = False
    padded, alone = (module.training_step(one, 0)["parts"] for one in (batch, short))
    assert padded.keys() == alone.keys() and padded["loss"].item() > 1
    for name, value in padded.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-6)


def test_loads_and_drops_are_those_of_the_whole_step() -> None:
    # Two micro-batches: all four tokens to expert 0, then all to expert 1; even over both. One of 10 dropped, then 5 of
    # 20: six of 30.
    means = StepMeans()
    for expert, dropped in ((0, [1, 10]), (1, [5, 20])):
        routing = Routing(torch.full((4, 1), expert), torch.ones(4, 1), 2, dropped=torch.tensor(dropped))
        means.add(
            {"loss": torch.tensor(float(expert))}, {"loss": 0.5 + expert}, [routing], torch.ones(4, dtype=torch.bool)
        )
    means.finish_step(torch.tensor(0.0))
    assert means.values == {"loss": 0.75, "imbalance": 1.0, "drop_rate": pytest.approx(0.2)}


def test_loads_and_drops_are_means_over_the_layers_that_have_them() -> None:
    # Loads of 3 and 1, and of 2, 2 and 4; the first layer has no capacity, the others drop 1 of 10 and 9 of 20.
    mask_T = torch.tensor([True] * 4 + [False])
    ids = [torch.tensor([0, 0, 0, 1, 1]), torch.tensor([[0, 2], [1, 2], [0, 2], [1, 2], [0, 1]])]
    routings = [
        Routing(ids[0].unsqueeze(1), torch.ones(5, 1), 2),
        Routing(ids[1], torch.ones(5, 2), 3, dropped=torch.tensor([1, 10])),
        Routing(ids[1], torch.ones(5, 2), 3, dropped=torch.tensor([9, 20])),
    ]
    means = StepMeans()
    means.add({"loss": torch.tensor(0.0)}, {}, routings, mask_T)
    means.finish_step(torch.tensor(0.0))
    assert means.values["imbalance"] == pytest.approx((3 / 2 + 4 / (8 / 3) * 2) / 3)
    assert means.values["drop_rate"] == pytest.approx((0.1 + 0.45) / 2)


def test_means_of_padding_alone_are_numbers() -> None:
    nobody = torch.zeros(2, dtype=torch.bool)
    routing = Routing(torch.tensor([[0], [1]]), torch.ones(2, 1), 2, dropped=torch.tensor([0, 0]))
    means = StepMeans()
    means.add({"loss": torch.tensor(0.0)}, {}, [routing], nobody)
    means.finish_step(torch.tensor(0.0))
    assert means.values == {"loss": 0.0, "imbalance": 0.0, "drop_rate": 0.0}


def test_a_penalty_is_part_of_the_loss(make_run: MakeRun, make_model: Make, make_batch: Batch) -> None:
    model, batch = make_model(), make_batch()
    old = {name: p.detach() - 0.5 for name, p in model.named_parameters()}
    plain = stage_module(make_run, model, "method=l2", stage=1).training_step(batch, 0)
    pulled = stage_module(make_run, model, "method=l2", stage=1, anchor=make_anchor(model, old, 0.1))
    step = pulled.training_step(batch, 0)
    expected = 0.1 / 2 * 0.25 * sum(p.numel() for p in model.parameters())
    assert step["parts"]["penalty"].item() == pytest.approx(expected, rel=1e-5)
    assert step["loss"].item() == pytest.approx(plain["loss"].item() + expected, rel=1e-6)
    assert not step["parts"]["penalty"].requires_grad and step["loss"].requires_grad


REVIEW = ("stage_defaults.review={fraction: 0.3, old_loss: 0.5}", "stage_defaults.distill.text=replay")


def test_a_review_has_a_loss_of_its_own(make_run: MakeRun, make_model: Make, make_batch: Batch) -> None:
    model, batch = make_model("learned", (4, 2)), make_batch()
    teacher = make_teacher(make_model(seed=1), [])
    step = stage_module(make_run, model, *REVIEW, stage=1, phase=1, teacher=teacher).training_step(batch, 0)
    parts: Any = {name: value.item() for name, value in step["parts"].items()}
    assert set(parts) == {"loss", "old_loss", "z_loss"}  # neither balance nor teacher
    expected = parts["loss"] + 0.5 * parts["old_loss"] + 2 * 0.00025 * parts["z_loss"]
    assert step["loss"].item() == pytest.approx(expected, rel=1e-6)
    # Surprise of rows 1 and 3, the replayed ones, at the old experts' probability; the mean of two layers.
    seen = []
    for layer in model.moe_layers():
        layer.router.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(TokenBatch(batch["token_ids"][[1, 3]]))
        surprise = [
            -(x_TD @ torch.cat(layer.router.row_generations()).t()).softmax(-1)[:, :4].sum(-1).log().mean()
            for layer, x_TD in zip(model.moe_layers(), seen, strict=True)
        ]
    assert parts["old_loss"] == pytest.approx(float(torch.stack(surprise).mean()), rel=1e-4)


def test_without_old_loss_a_review_balances_and_still_asks_no_teacher(
    make_run: MakeRun, make_model: Make, make_batch: Batch
) -> None:
    model, teacher = make_model("learned", (4, 2)), make_teacher(make_model(seed=1), [])
    override = "stage_defaults.review={fraction: 0.3, old_loss: 0.0}"
    module = stage_module(make_run, model, override, "stage_defaults.distill.text=replay", stage=1, phase=1,
                          teacher=teacher)  # fmt: skip
    assert set(module.training_step(make_batch(), 0)["parts"]) == {"loss", "balance_loss", "z_loss"}


def review(module: StageModule, batches: list[dict[str, Tensor]]) -> None:
    """What a stage does in a review."""
    with training_only(module.model, phase_parameters(module.model, module.phase).values()):
        fit(module, batches)


def share_of_new_experts(model: LanguageModel, batch: dict[str, Tensor], replayed: bool) -> float:
    rows = batch["replayed"] if replayed else ~batch["replayed"]
    with torch.no_grad():
        counts = torch.stack([routing.counts_E for routing in model(TokenBatch(batch["token_ids"][rows])).routings])
    return float(counts[:, 4:].sum() / counts.sum())


def test_a_review_trains_the_new_rows_and_nothing_else(make_run: MakeRun, make_model: Make, make_batch: Batch) -> None:
    model = make_model("learned", (4, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    module = stage_module(make_run, model, *REVIEW, stage=1, phase=1)
    review(module, [make_batch(seed=i) for i in range(3)])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"blocks.{i}.moe.router.rows.1" for i in (0, 1)}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    # A step checkpoint holds the rest of what the stage trained, too.
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == {f"model.{name}" for name in model.stored_names(trained=True)}


def test_a_review_sends_old_text_back_to_old_experts(make_run: MakeRun, make_model: Make, make_batch: Batch) -> None:
    shares = {}
    for old_loss in (0.0, 2.0):
        model, batch = make_model("learned", (4, 2)), make_batch(blocks=8)
        # Old and new text that can be told apart.
        for key in ("token_ids", "target_ids"):
            batch[key] = batch[key] % 30 + 1 + 30 * batch["replayed"].long().unsqueeze(1)
        before = share_of_new_experts(model, batch, replayed=True)
        override = f"stage_defaults.review={{fraction: 0.3, old_loss: {old_loss}, lr_scale: 10}}"
        module = stage_module(make_run, model, override, "stage_defaults.optim.weight_decay=0", stage=1, phase=1)
        review(module, [batch] * 40)
        shares[old_loss] = share_of_new_experts(model, batch, replayed=True)
        new = share_of_new_experts(model, batch, replayed=False)
    assert before > 0.15 and shares[2.0] < 0.5 * before and shares[2.0] < 0.5 * shares[0.0]
    assert new > 2 * shares[2.0]  # new text keeps its experts


def test_deltas_change_their_bundle_s_tokens_alone(make_run: MakeRun, make_model: Make, make_batch: Batch) -> None:
    born = tuple(Generation(f"s{g}", 2, delta_rank=3) for g in (1, 2))
    model = make_model("labelled_bundles", (4, *born))
    settings = ("model.document_mask=true", "routing.bundles=label", "stage_defaults.trunk.train=deltas")
    module = stage_module(make_run, model, *settings, "stage_defaults.distill.weight=0", stage=1)
    freeze_trunk(model, module.spec.trunk)
    probe = make_batch(seed=9)

    def logits(group: int) -> Tensor:
        groups = torch.full_like(probe["token_ids"], group)
        with torch.no_grad():
            return model.head.logits(model(TokenBatch(probe["token_ids"], domain_ids_BS=groups)).hidden_BSD, groups)

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = [logits(group) for group in range(3)]
    fit(module, [make_batch(seed=i, domains=3) for i in range(3)])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == model.stored_names(trained=True)
    assert all(".deltas.2." in name or ".rows.2" in name or ".experts.6." in name or ".experts.7." in name
               for name in changed)  # fmt: skip
    assert torch.equal(logits(0), scores[0]) and torch.equal(logits(1), scores[1])
    assert float((logits(2) - scores[2]).abs().max()) > 0.1
