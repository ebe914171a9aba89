"""Whole stages on a GPU that is not there: nothing that trains or reads text stays on the CPU, and a kill costs no bit.

What is compared are the CPU's kernels with themselves: that tensors are where they belong, and that the device's own
random numbers go on. That a real GPU computes the same is for ``make gpu-check``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lifelong_moe.errors import TryAgainError
from lifelong_moe.evaluation import reading
from lifelong_moe.growth import grow as growth
from lifelong_moe.model.int8 import round_frozen
from lifelong_moe.retention import generated
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training import preparation
from lifelong_moe.training import stage as training
from lifelong_moe.training.callbacks.checkpoint import STATE, checkpoints
from lifelong_moe.training.callbacks.progress import StepCheckpoint
from lifelong_moe.training.loop import module as loop_module
from tests.pretended_gpu import GENERATOR, Pretended, pretended_gpu
from tests.tiny import CONTEXT, SEQUENCES, hashes, tiny_config, train, working_in, write_config, write_corpora

pytestmark = pytest.mark.filterwarnings(
    # Of torch's loader, which asks for an accelerator beneath what is pretended.
    "ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning"
)
STEPS = 4
GPU = {"accelerator": "gpu", "log_every_n_steps": 2}


@pytest.fixture(autouse=True)
def _in(tmp_path: Path) -> Iterator[None]:
    with working_in(tmp_path):
        write_corpora(tmp_path)
        yield


def configure(stages: tuple[str, ...] = ("fruit", "code"), **sections: Any) -> dict[str, Any]:
    """Stages of a few steps."""
    config = tiny_config(stages, trainer=GPU, checkpoint={"every_steps": 2}, evaluate={"tokens": 100}, **sections)
    config["stage_defaults"] |= {"tokens": STEPS * SEQUENCES * CONTEXT}
    config["stage_defaults"]["grow"] |= {"sample_tokens": 64}
    return config


def watch(patch: pytest.MonkeyPatch, where: Any, name: str, model: int = 0) -> list[bool]:
    """Whether the model that a function is given stands on the device, each time that it is called."""
    original, found = getattr(where, name), []

    def watched(*args: Any, **kwargs: Any) -> Any:
        found.append(isinstance(args[model].embedding.weight, Pretended))
        return original(*args, **kwargs)

    patch.setattr(where, name, watched)
    return found


def test_growth_fisher_generated_text_and_evaluation_run_on_the_device_that_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    holds = {"fraction": 0.25, "source": "generated"}, {"weight": 1.0, "kind": "ewc", "fisher_tokens": 32}
    path = write_config(configure(stage_defaults=dict(zip(("replay", "penalty"), holds, strict=True))))
    asked = {
        "growth": watch(monkeypatch, preparation, "grow"),
        "its check": watch(monkeypatch, growth, "check_noop"),
        "Fisher": watch(monkeypatch, preparation, "fisher_diagonal"),
        "generated text": watch(monkeypatch, generated, "_fill"),
        "evaluation": watch(monkeypatch, reading, "_arrays"),
    }
    with pretended_gpu():
        report, _ = train(path)
    assert len(report["stages"]) == 2
    assert all(found and all(found) for found in asked.values()), asked


@pytest.mark.parametrize(("precision", "rank"), [("bf16-mixed", 16), ("auto", 2)])
def test_the_default_method_runs_there_whole(monkeypatch: pytest.MonkeyPatch, precision: str, rank: int) -> None:
    """Bundles, low-rank changes of the trunk, a mixture of generations; in the GPU's own precision."""
    config = configure()
    config["trainer"]["precision"] = precision
    holds = {key: config["stage_defaults"][key] for key in ("tokens", "optim")} | {"trunk": {"rank": rank}}
    config |= {"method": "lifelong", "stage_defaults": holds, "routing": {"top_k": 2}}
    read, joined = watch(monkeypatch, reading, "_arrays"), []
    part = loop_module.part_changes

    def parted(matrices: Iterable[Any]) -> None:
        found = [*matrices]
        joined.extend(bool(one.deltas.joined) for one in found if one.deltas)
        part(found)

    monkeypatch.setattr(loop_module, "part_changes", parted)
    with pretended_gpu():
        report, _ = train(write_config(config))
    assert report["stages"][-1]["name"] == "code" and read and all(read)
    # For attention's matrices, of width 32, those of rank 16 are too wide to be laid side by side.
    assert any(joined) and all(joined) == (rank == 2)


def test_with_auto_precision_a_stage_goes_on_bit_for_bit_and_old_generations_keep_their_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configure()
    config["trainer"]["precision"] = "auto"
    config["stage_defaults"]["distill"] = {"weight": 1.0}
    path, rounded = write_config(config), []
    monkeypatch.setattr(training, "round_frozen", lambda *models: rounded.append(round_frozen(*models)))
    with pretended_gpu():
        train(path)
        assert rounded and all(rounded)  # something was frozen, and took half the memory
        expected = hashes()
        store, head = StageStore(Path("mlruns")), json.loads(Path("mlruns/runs/tiny/head.json").read_text())
        stages = [store.get(key) for key in head["stages"]]
        first, second = (load_file(one.path / "model.safetensors") for one in stages)
        borrowed = store.holders(stages[1])
        # Of the first stage nothing was stored again; what the second trained is stored as it was trained.
        assert any(".experts.0." in name for name in borrowed) and not borrowed.keys() & second.keys()
        assert {one.dtype for one in [*first.values(), *second.values()]} == {torch.float32}
        assert any(not torch.equal(one, one.bfloat16().float()) for one in second.values())
        Path("mlruns").rename("whole")
        with monkeypatch.context() as patch, pytest.raises(TryAgainError):
            stop_after(patch, 2 * STEPS - 1)
            train(path)
        train(path)
    assert hashes() == expected


def test_with_auto_precision_a_cpu_computes_the_bits_of_float32() -> None:
    config, found = configure(), []
    config["trainer"]["accelerator"] = "cpu"
    for precision in ("32-true", "auto"):
        config["trainer"]["precision"] = precision
        train(write_config(config))
        found.append(hashes())
        Path("mlruns").rename(precision)
    assert len(found[0]) == 2 and found[0] == found[1]


def stop_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Ask for an end, as SIGTERM does, after so many steps of this process."""
    original, taken = StepCheckpoint.on_train_batch_end, []

    def stopping(self: StepCheckpoint, *args: Any) -> None:
        taken.append(1)
        self.interrupt.requested = self.interrupt.requested or len(taken) == steps
        original(self, *args)

    patch.setattr(StepCheckpoint, "on_train_batch_end", stopping)


@pytest.mark.parametrize(
    "routing",
    [
        {"mode": "switch", "top_k": 1, "renormalize": False, "jitter": 0.3, "capacity": {"factor": 1.0}},
        {"mode": "noisy_topk", "top_k": 2, "load_loss": 0.1},
    ],
    ids=["jitter", "noise"],
)
def test_a_stage_that_draws_on_the_device_goes_on_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, routing: dict[str, Any]
) -> None:
    path = write_config(configure(("fruit",), routing=routing, model={"experts": 4}))
    with pretended_gpu():
        train(path)
        expected = hashes()
        Path("mlruns").rename("whole")
        with monkeypatch.context() as patch, pytest.raises(TryAgainError):
            stop_after(patch, STEPS - 1)
            train(path)
        (work,) = (one for one in Path("mlruns/work").iterdir() if one.is_dir())
        states = json.loads((checkpoints(work)[-1] / STATE).read_text())["random_states"]
        assert [sorted(one) for one in states] == [["cpu", "cuda"]]
        torch.manual_seed(321)  # another process begins with other numbers, also on the device
        train(path)
        assert hashes() == expected
        # With a generator that does not go on the weights are others: the stage does draw there.
        Path("mlruns").rename("cut")
        monkeypatch.setattr(GENERATOR, "state", GENERATOR.state)
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device=None: None)
        with monkeypatch.context() as patch, pytest.raises(TryAgainError):
            stop_after(patch, STEPS - 1)
            train(path)
        train(path)
        assert hashes() != expected
