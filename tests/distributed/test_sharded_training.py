"""Training with shards (``trainer.strategy=fsdp``) takes the steps of one process, in float64 to ten decimals."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lifelong_moe.config.model import ExpertsImplementation
from lifelong_moe.errors import TryAgainError
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Generation
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.loop import fit
from lifelong_moe.training.loop.module import StageModule, router_losses
from lifelong_moe.training.ranks.sharding import ShardedStrategy, UnusedParameters, shard_model
from tests.conftest import ROUTER_KINDS
from tests.divided import MakeModel, MakeRun, second_stage, take_steps, take_steps_in_ranks
from tests.forked import run_forked
from tests.tiny import kill_self, tiny_config, train, wait_for_checkpoint, write_config

pytestmark = [
    pytest.mark.usefixtures("forked"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
]


BORN = Generation("s0", 4), Generation("s1", 2, delta_rank=2)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in float32 by contract is so here, too, or rounding would hide what is compared."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("kind", "case", "ranks"),
    [
        ("learned", "answers, distilled, and replay", 2),
        ("learned", "review", 4),
        ("bundles", "replay, distilled", 2),
    ],
)
def test_steps_are_those_of_one_process(
    make_run: MakeRun, make_model: MakeModel, tmp_path: Path, kind: str, case: str, ranks: int
) -> None:
    def make(_: str, generations: tuple[int, ...], **settings: Any) -> LanguageModel:
        if kind == "learned":
            return make_model(kind, generations, **settings)
        # Changes of the trunk as well; the teacher lacks the newest.
        born = *BORN, Generation("s2", 2, delta_rank=2)
        model = make_model(kind, born[: len(generations) + 1], **settings)
        for parameter in model.trunk_parameters().values():
            parameter.requires_grad_(False)
        return model

    begin = second_stage(make_run, make, case, kind, balance_loss=0.5)
    module, _ = begin()
    frozen = {name: one for name, one in module.model.state_dict().items() if f"model.{name}" in module.frozen}
    assert frozen
    found, curves = take_steps_in_ranks(begin, 2, ranks, tmp_path, strategy="fsdp")
    one, watch = take_steps(begin, 2)
    assert found.keys() == one.keys()
    assert curves == [pytest.approx(curve, abs=1e-10) for curve in watch.curves]
    for name, tensor in one.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-8, atol=1e-10)
    assert all(torch.equal(found[name], tensor) for name, tensor in frozen.items())


def gradients(
    model: LanguageModel, batches: Sequence[tuple[int, int]], unused: UnusedParameters | None = None
) -> dict[str, Any]:
    """Those of a step of micro-batches, each given by a seed and a domain; None where nothing has used a parameter."""
    for seed, domain in batches:
        ids = torch.randint(1, 60, (2, 17), generator=torch.Generator().manual_seed(seed))
        domains_BS = torch.full((2, 16), domain)
        output = model(TokenBatch(ids[:, :-1], domain_ids_BS=domains_BS))
        targets_T, hidden_TD = ids[:, 1:].flatten(), output.hidden_BSD.flatten(0, 1)
        loss = model.head.cross_entropy(hidden_TD, targets_T, domains_BS.flatten())
        loss = loss + sum(weighted for _, weighted in router_losses(output.routings).values())
        if unused is not None:
            unused.begin(loss)
        loss.backward()
        if unused is not None:
            unused.end()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    found = {name: parameter.grad for name, parameter in trained.items()}
    return {name: one.full_tensor() if isinstance(one, DTensor) else one for name, one in found.items()}


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    ("born", "domains"),
    [
        ((*BORN, Generation("s2", 2, (0,), delta_rank=2)), (2, 0, 0, 2)),
        ((*BORN, Generation("s2", 2, (0,), delta_rank=2)), (0, 1, 1, 0)),
        ((*BORN, Generation("s2", 2, (1,), tokens=4, rank=2)), (2, 0, 0, 2)),
    ],
    ids=["used by one rank", "used by none", "nothing trains in the lowest block"],
)
def test_ranks_reduce_the_same_gradients(
    make_model: MakeModel, tmp_path: Path, born: tuple[Generation, ...], domains: Sequence[int]
) -> None:
    batches = list(enumerate(domains))

    def made() -> LanguageModel:
        model = make_model("labelled_bundles", born).double().eval()
        for parameter in model.trunk_parameters().values():
            parameter.requires_grad_(False)
        return model

    def work(rank: int) -> list[float]:
        model = made()
        shard_model(model, init_device_mesh("cpu", (2,)))
        for trains in (True, False):
            held = [p for p in model.parameters() if p.requires_grad == trains]
            assert sum(p.to_local().numel() for p in held) == pytest.approx(sum(p.numel() for p in held) / 2, rel=0.05)
        found = gradients(model, batches[2 * rank :][:2], UnusedParameters(model))
        if rank == 0:
            save_file({name: one for name, one in found.items() if one is not None}, tmp_path / "found")
        return [name for name, one in found.items() if one is None]

    unused = run_forked(2, work, tmp_path)
    expected, found = gradients(made(), batches), load_file(tmp_path / "found")
    assert unused == [name for name, one in expected.items() if one is None]
    for name, one in found.items():
        torch.testing.assert_close(2 * one, expected[name], rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("in_float64")
def test_each_router_has_the_mean_of_the_gradients_of_all_ranks(make_model: MakeModel, tmp_path: Path) -> None:
    def work(rank: int) -> list[str]:
        wrong = []
        for kind in (*ROUTER_KINDS, "recomputed", "readable"):
            plain, sharded = (make_model(kind if kind in ROUTER_KINDS else "learned", (4, 4)).double() for _ in (0, 1))
            sharded.recompute(kind == "recomputed")
            for layer in sharded.moe_layers() if kind == "readable" else ():
                layer.banks.implementation = ExpertsImplementation.readable
            shard_model(sharded, init_device_mesh("cpu", (2,)))
            torch.manual_seed(rank)  # some draw noise
            gradients(plain, [(rank, 0)])
            torch.manual_seed(rank)
            found = gradients(sharded, [(rank, 0)], UnusedParameters(sharded))
            for name, parameter in plain.named_parameters():
                mean = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                dist.all_reduce(mean)
                # Parameters that are frozen, or that nobody used, have none.
                one = torch.zeros_like(mean) if (given := found.get(name)) is None else given
                if not torch.allclose(one, mean / 2, rtol=1e-9, atol=1e-11):
                    wrong.append(f"{kind} {name}")
        return wrong

    assert run_forked(2, work, tmp_path) == []


@pytest.mark.parametrize(
    ("parts", "ways"),
    # As it began it ends in the same bits: test_resumed.py.
    [(1, ((1, "auto"), (4, "fsdp"), (2, "ddp"))), (2, ((1, "auto"), (4, "fsdp")))],
    ids=["shards", "and divided experts"],
)
def test_a_stage_goes_on_with_other_numbers_of_processes(
    lab: Path, monkeypatch: pytest.MonkeyPatch, parts: int, ways: Sequence[tuple[int, str]]
) -> None:
    config = tiny_config(trainer={"devices": 2, "strategy": "fsdp", "expert_parallel": parts})
    config["evaluate"]["watch"] = 0.5
    config["stage_defaults"]["distill"] = {"weight": 1.0, "text": "new", "fraction": 0.5}
    write_config(config)
    original, shard, whole = StageModule.training_step, ShardedStrategy.configure_ddp, []

    def configure_ddp(self: ShardedStrategy) -> None:
        whole[:] = (weakref.ref(parameter) for parameter in self.model.parameters() if parameter.requires_grad)
        shard(self)

    def training_step(self: StageModule, batch: Any, batch_idx: int) -> Any:
        gc.collect()
        assert whole and all(one() is None for one in whole)  # frozen ones may be the teacher's, too
        if (self.spec.name, self.global_step, dist.get_rank()) == ("code", 6, 1):
            wait_for_checkpoint(4)
            kill_self()
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(fit, "keep_freed_memory", None)  # what a block has let go, goes back to the system
        patch.setattr(ShardedStrategy, "configure_ddp", configure_ddp)
        patch.setattr(StageModule, "training_step", training_step)
        with pytest.raises(TryAgainError):
            train()
    shutil.copytree("mlruns", "stopped")
    found = []
    for number, strategy in ways:
        shutil.rmtree("mlruns")
        shutil.copytree("stopped", "mlruns")
        settings = f"trainer.devices={number}", f"trainer.strategy={strategy}", "trainer.expert_parallel=1"
        _, printed = train("tiny.yaml", *settings)
        assert "code: continuing from step-0-00000004" in printed
        found.append(newest())
    shutil.rmtree("mlruns")
    train("tiny.yaml", "trainer.devices=1", "trainer.expert_parallel=1")
    expected = newest()
    for one in found:
        assert {name: (t.shape, t.dtype) for name, t in one.items()} == {
            name: (t.shape, t.dtype) for name, t in expected.items()
        }
        # Rounding of float32, of which AdamW makes more where a gradient is almost 0.
        apart = torch.cat([(one[name] - expected[name]).flatten() for name in expected]).norm()
        assert apart / torch.cat([tensor.flatten() for tensor in expected.values()]).norm() < 1e-5


def newest() -> dict[str, Tensor]:
    """What the last stage consists of."""
    store, head = StageStore(Path("mlruns")), json.loads(Path("mlruns/runs/tiny/head.json").read_text())
    return store.tensors(store.get(head["stages"][-1]))
