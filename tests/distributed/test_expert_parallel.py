"""Training with experts spread over processes takes the steps of one process, in float64 to ten decimals."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from lifelong_moe.config.growth import FrozenWeights
from lifelong_moe.config.model import ExpertsImplementation
from lifelong_moe.config.run import RunConfig
from lifelong_moe.data.tokens.blocks import BlockDataset
from lifelong_moe.errors import TryAgainError
from lifelong_moe.model.int8 import hold_frozen
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.ops import collectives
from lifelong_moe.ops.collectives import num_ranks
from lifelong_moe.plan.architecture import Generation
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.callbacks.checkpoint import SafeCheckpointIO
from lifelong_moe.training.loop.module import StageModule, router_losses
from lifelong_moe.training.ranks import experts, supervise
from lifelong_moe.training.ranks.experts import place_experts
from tests.conftest import ROUTER_KINDS
from tests.divided import MakeModel, MakeRun, Watch, second_stage, take_steps, take_steps_in_ranks
from tests.forked import run_forked
from tests.tiny import fork, kill_self, tiny_config, train, wait_for_checkpoint, write_config

pytestmark = [
    pytest.mark.usefixtures("forked"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
]


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in float32 by contract is so here, too, or rounding would hide what is compared."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def gradients(model: LanguageModel, seed: int) -> dict[str, Tensor | None]:
    """Those of a micro-batch."""
    ids = torch.randint(1, 60, (2, 17), generator=torch.Generator().manual_seed(seed))
    domains_BS = torch.zeros((2, 16), dtype=torch.int64)
    output = model(TokenBatch(ids[:, :-1], domain_ids_BS=domains_BS))
    hidden_TD = output.hidden_BSD.flatten(0, 1)
    loss = model.head.cross_entropy(hidden_TD, ids[:, 1:].flatten(), domains_BS.flatten())
    (loss + sum(weighted for _, weighted in router_losses(output.routings).values())).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def compare_gradients(make: Callable[[str], LanguageModel], kinds: Sequence[str], rtol: float, atol: float) -> None:
    """Of models whole and spread, in a rank."""
    rank = dist.get_rank()
    for kind in kinds:
        whole, spread = make(kind), make(kind)
        placed = place_experts(spread, dist.group.WORLD)  # type: ignore[arg-type]
        torch.manual_seed(rank)  # some draw noise
        expected = gradients(whole, rank)
        torch.manual_seed(rank)
        found = gradients(spread, rank)
        here = {one.name for one in placed.values()}
        for name, gradient in expected.items():
            # Frozen parameters, and those that nobody used, have none.
            one = torch.zeros_like(whole.get_parameter(name)) if gradient is None else gradient
            if name in here:
                dist.all_reduce(one)
                one = one[rank :: num_ranks()]
            mine = torch.zeros_like(one) if (given := found[name]) is None else given
            torch.testing.assert_close(mine, one, rtol=rtol, atol=atol, msg=lambda text: f"{kind} {name}: {text}")  # noqa: B023


@pytest.mark.usefixtures("in_float64")
def test_each_router_has_the_gradients_of_all_ranks(make_model: MakeModel, tmp_path: Path) -> None:
    def make(kind: str) -> LanguageModel:
        model = make_model(kind if kind in ROUTER_KINDS else "learned", (4, 4)).double()
        model.recompute(kind == "recomputed")
        for layer in model.moe_layers() if kind == "readable" else ():
            layer.banks.implementation = ExpertsImplementation.readable
        return model

    kinds = (*ROUTER_KINDS, "recomputed", "readable")
    run_forked(2, lambda rank: compare_gradients(make, kinds, 1e-9, 1e-11), tmp_path)


@pytest.mark.parametrize("ranks", [2, 4])
def test_experts_in_one_kernel_have_the_gradients_of_all_ranks(
    make_model: MakeModel, tmp_path: Path, ranks: int
) -> None:
    def make(trained: str) -> LanguageModel:
        # The rows of the generation that trains come first in the kernel.
        model = make_model("learned", (4, 4, 4), model={"width": 32, "expert_width": 32})
        model.freeze_generations(int(trained))
        for layer in model.moe_layers():
            layer.banks.implementation = ExpertsImplementation.grouped_mm
        return model

    run_forked(ranks, lambda rank: compare_gradients(make, ("0", "1", "2"), 1e-4, 1e-6), tmp_path)


def assert_divided(trainer: Trainer, module: StageModule, parts: int, experts: Sequence[int]) -> None:
    """Each rank has its part of each generation's experts and of their moments, and no more."""
    moments = trainer.optimizers[0].state
    for layer in module.model.moe_layers():
        assert [len(generation) for generation in layer.banks.born] == [number // parts for number in experts]
        for generation in layer.banks.born:
            for parameter in generation.parameters():
                assert len(parameter) == len(generation) and parameter.untyped_storage().nbytes() == parameter.nbytes
                assert (parameter in moments) == (parameter.grad is not None) == parameter.requires_grad
                for name in ("exp_avg", "exp_avg_sq") if parameter in moments else ():
                    assert moments[parameter][name].shape == parameter.shape


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    "setting",
    [
        ("learned", "replay, distilled", 2, 2, "ddp"),
        ("learned", "answers, distilled, and replay", 2, 1, "ddp"),
        ("learned", "review", 2, 2, "ddp"),
        ("learned", "replay, distilled", 4, 1, "ddp"),
        ("learned", "penalty", 2, 2, "ddp"),
        ("learned", "penalty", 4, 1, "ddp"),
        ("bundles", "replay, distilled", 2, 2, "ddp"),
        ("bundles", "replay, distilled", 4, 1, "ddp"),
        ("learned", "answers, distilled, and replay", 2, 2, "fsdp"),
        ("learned", "review", 4, 1, "fsdp"),
        ("bundles", "replay, distilled", 2, 2, "fsdp"),
        ("bundles", "replay, distilled", 4, 1, "fsdp"),
    ],
    ids=str,
)
def test_steps_are_those_of_one_process(
    make_run: MakeRun,
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: tuple[str, str, int, int, str],
) -> None:
    kind, case, ranks, accumulate, strategy = setting

    def make(_: str, generations: tuple[int, ...], **settings: Any) -> LanguageModel:
        if kind == "learned":
            return make_model(kind, generations, **settings)
        # Changes of the trunk as well; the teacher lacks the newest.
        born = Generation("s0", 4), Generation("s1", 2, delta_rank=2), Generation("s2", 2, delta_rank=2)
        model = make_model(kind, born[: len(generations) + 1], **settings)
        for parameter in model.trunk_parameters().values():
            parameter.requires_grad_(False)
        return model

    def clipped(*overrides: str) -> RunConfig:
        return make_run(*overrides, "trainer.gradient_clip=0.01")

    begin = second_stage(clipped, make, case, kind, balance_loss=0.5)
    module, _ = begin()
    frozen = {name: one for name, one in module.model.state_dict().items() if f"model.{name}" in module.frozen}
    assert frozen
    one, watch = take_steps(begin, accumulate)
    numbers = [generation.experts for generation in module.model.architecture.generations]

    def on_before_zero_grad(_: Watch, trainer: Trainer, module: StageModule, *args: Any) -> None:
        if trainer.global_step and "review" not in case:
            assert_divided(trainer, module, 2, numbers)
        # What is outside of blocks is whole here, between forward and backward pass.
        others = [p for name, p in module.model.blocks.named_parameters() if ".moe.banks." not in name]
        assert all(isinstance(parameter, DTensor) == (strategy == "fsdp") for parameter in others)

    monkeypatch.setattr(Watch, "on_before_zero_grad", on_before_zero_grad)
    found, curves = take_steps_in_ranks(begin, accumulate, ranks, tmp_path, expert_parallel=2, strategy=strategy)
    assert found.keys() == one.keys()
    assert all(curve["grad_norm"] > module.spec.gradient_clip for curve in watch.curves)
    assert curves == [pytest.approx(curve, rel=1e-10, abs=1e-10) for curve in watch.curves]
    for name, tensor in one.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-8, atol=1e-10)
    assert all(torch.equal(found[name], tensor) for name, tensor in frozen.items())


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("kind", [FrozenWeights.half, FrozenWeights.int8])
def test_frozen_experts_may_be_held_in_fewer_bits(
    make_run: MakeRun, make_model: MakeModel, tmp_path: Path, kind: FrozenWeights
) -> None:
    begin = second_stage(make_run, make_model, "answers")

    def held() -> tuple[StageModule, BlockDataset]:
        module, dataset = begin()
        for parameter in module.model.parameters():
            if not parameter.requires_grad:  # so that 16 bits lose nothing
                parameter.copy_(parameter.bfloat16())
        assert hold_frozen(module.model, kind) > 0
        return module, dataset

    curves = run_forked(2, lambda rank: take_steps(held, 2, 2, expert_parallel=2)[1].curves, tmp_path)
    assert curves == [pytest.approx(curve, rel=1e-10, abs=1e-10) for curve in take_steps(held, 2)[1].curves]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_experts_may_be_all_that_trains(
    make_run: MakeRun, make_model: MakeModel, tmp_path: Path, strategy: str
) -> None:
    def make(kind: str, generations: tuple[int, ...], **settings: Any) -> LanguageModel:
        model = make_model(kind, generations, **settings)
        for parameter in model.trunk_parameters().values():
            parameter.requires_grad_(False)
        return model

    begin = second_stage(make_run, make, "new text, half of it distilled", "hash")
    found, curves = take_steps_in_ranks(begin, 2, 2, tmp_path, expert_parallel=2, strategy=strategy)
    one, watch = take_steps(begin, 2)
    assert curves == [pytest.approx(curve, rel=1e-5) for curve in watch.curves]
    for name, tensor in one.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_stage_goes_on_with_other_numbers_of_processes(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(trainer={"devices": 2, "expert_parallel": 2})
    config["evaluate"]["watch"] = 0.5
    config["stage_defaults"]["distill"] = {"weight": 1.0, "text": "new", "fraction": 0.5}
    write_config(config)
    original, place, whole = StageModule.training_step, experts.place_experts, []

    def placing(model: LanguageModel, group: dist.ProcessGroup) -> Any:
        banks = [p for name, p in model.named_parameters() if ".moe.banks." in name and p.requires_grad]
        whole[:] = map(weakref.ref, banks)
        return place(model, group)

    def training_step(self: StageModule, batch: Any, batch_idx: int) -> Any:
        gc.collect()
        # Nothing keeps what others have; frozen experts may be the teacher's, too.
        assert num_ranks() == 1 or (whole and all(one() is None for one in whole))
        if (self.spec.name, self.global_step, num_ranks() - 1) == ("code", 6, rank()):
            wait_for_checkpoint(4)
            kill_self()
        return original(self, batch, batch_idx)

    def stopped(*overrides: str) -> Path:
        """Where the second stage was killed after its first checkpoint."""
        with monkeypatch.context() as patch:
            patch.setattr(StageModule, "training_step", training_step)
            patch.setattr(experts, "place_experts", placing)
            if overrides:  # one process is the main one
                assert fork(lambda: train("tiny.yaml", *overrides)).wait() == -signal.SIGKILL
            else:
                with pytest.raises(TryAgainError):
                    train()
        return Path("mlruns").rename(f"stopped{len(overrides)}")

    spread, alone = stopped(), stopped(*processes(1))
    tensors = [tensors_of(root) for root in (spread, alone)]
    assert [{name: (t.shape, t.dtype) for name, t in one.items()} for one in tensors[:1]] == [
        {name: (t.shape, t.dtype) for name, t in one.items()} for one in tensors[1:]
    ]
    found = []
    ways = (  # as it began it ends in the same bits: test_resumed.py
        (spread, 1, 1, "ddp"),
        (spread, 4, 2, "fsdp"),
        (spread, 2, 1, "fsdp"),
        (alone, 2, 2, "ddp"),
        (alone, 4, 2, "ddp"),
        (alone, 2, 2, "fsdp"),
    )
    for root, number, parts, strategy in ways:
        shutil.copytree(root, "mlruns")
        _, printed = train("tiny.yaml", *processes(number, parts), f"trainer.strategy={strategy}")
        assert "code: continuing from step-0-00000004" in printed
        found.append(newest())
        shutil.rmtree("mlruns")
    train("tiny.yaml", *processes(1))
    expected = newest()
    for one in found:
        assert {name: (t.shape, t.dtype) for name, t in one.items()} == {
            name: (t.shape, t.dtype) for name, t in expected.items()
        }
        # Rounding of float32, of which AdamW makes more where a gradient is almost 0.
        apart = torch.cat([(one[name] - expected[name]).flatten() for name in expected]).norm()
        assert apart / torch.cat([tensor.flatten() for tensor in expected.values()]).norm() < 1e-5


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_rows_travel_in_the_numbers_of_the_experts(
    make_run: MakeRun, make_model: MakeModel, tmp_path: Path, precision: str
) -> None:
    begin = second_stage(make_run, make_model, "replay, distilled", balance_loss=0.5)

    def in_float32() -> tuple[StageModule, BlockDataset]:
        module, dataset = begin()
        return module.float(), dataset

    def curves(**settings: Any) -> list[dict[str, float]]:
        return take_steps_in_ranks(in_float32, 2, 2, tmp_path, precision=precision, **settings)[1]

    spread, whole = curves(expert_parallel=2), curves()
    # In bf16-true the norm of gradients is such a number, too.
    assert spread[0] == pytest.approx(whole[0], rel=1e-4 if precision == "bf16-mixed" else 2**-8)
    # Weights are stepped by gradients whose sums are rounded in another order.
    assert spread == [pytest.approx(curve, rel=0.02) for curve in whole]


def test_a_rank_that_hangs_ends_all(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tiny_config(("fruit",), trainer={"devices": 2, "expert_parallel": 2}))
    exchange = collectives.all_to_all_single_autograd

    def hang(*args: Any) -> Any:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return exchange(*args)

    monkeypatch.setattr(collectives, "all_to_all_single_autograd", hang)
    monkeypatch.setattr(supervise, "TIMEOUT_SECONDS", 2.0)
    monkeypatch.setattr(supervise, "GRACE_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(TryAgainError, match=r"^training process 1 of 2 did not answer .* within 2 s; "):
        train()
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("overrides", [("stage_defaults.grow.frozen_weights=int8",), ("method=ewc",)], ids=str)
def test_runs_are_those_of_one_process(lab: Path, overrides: tuple[str, ...]) -> None:
    config = tiny_config()
    config["stage_defaults"]["distill"] = {"weight": 1.0, "text": "new", "fraction": 0.5}
    path, found = write_config(config), []
    for settings in (processes(2, 2), processes(1)):
        report, _ = train(path, *settings, *overrides)
        found.append(torch.tensor(report["loss_nats_per_token"]))
        shutil.rmtree("mlruns")
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def processes(number: int, parts: int = 1) -> tuple[str, str]:
    """Overrides."""
    return f"trainer.devices={number}", f"trainer.expert_parallel={parts}"


def rank() -> int:
    """Of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def tensors_of(root: Path) -> dict[str, Tensor]:
    """Those of the newest step checkpoint that name parameters."""
    (path,) = sorted(root.glob("work/*/step-0-00000004"))
    return SafeCheckpointIO().load_checkpoint(path)["state_dict"]


def newest() -> dict[str, Tensor]:
    """What the last stage consists of."""
    store, head = StageStore(Path("mlruns")), json.loads(Path("mlruns/runs/tiny/head.json").read_text())
    return store.tensors(store.get(head["stages"][-1]))
