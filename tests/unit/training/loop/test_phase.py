"""The pieces of a phase: what Lightning is told, who is warned of collapse, and what is said when memory is full."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from lifelong_moe.config.routing.base import Features, Level
from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.training.callbacks.checkpoint import SafeCheckpointIO
from lifelong_moe.training.callbacks.collapse import collapse_warning
from lifelong_moe.training.loop import measure
from lifelong_moe.training.loop import phase as phases
from lifelong_moe.training.loop.fit import _out_of_memory
from lifelong_moe.training.loop.phase import _sample_assignments
from lifelong_moe.training.loop.trainer import _strategy, build_trainer
from tests.conftest import routing_of

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU is chosen where there is no GPU")


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    """Lightning turns determinism on for the process."""
    yield
    torch.use_deterministic_algorithms(False)


@no_cuda
@pytest.mark.parametrize(
    ("settings", "deterministic"),
    [({}, True), ({"accelerator": "cpu"}, True), ({"deterministic": False}, False), ({"deterministic": True}, True)],
)
def test_the_trainer_leaves_to_us_what_is_ours(settings: dict[str, Any], deterministic: bool) -> None:
    trainer = build_trainer(TrainerConfig(accumulate_grad_batches=3, **settings), 7)
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert (trainer.max_steps, trainer.max_epochs, trainer.accumulate_grad_batches) == (7, -1, 3)
    assert trainer.progress_bar_callback is None and trainer.checkpoint_callback is None and trainer.logger is None
    assert trainer.log_every_n_steps == 1
    assert [type(callback).__name__ for callback in trainer.callbacks] == []  # type: ignore[attr-defined]


@no_cuda
def test_what_this_machine_cannot_do_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^trainer: "):
        build_trainer(TrainerConfig(accelerator="cuda"), 1)


def test_ranks_work_together_by_gloo_and_one_process_alone() -> None:
    assert [_strategy(TrainerConfig(strategy=name), SafeCheckpointIO())[0] for name in ("auto", "ddp", "fsdp")] == [
        "auto"
    ] * 3
    strategy, plugins = _strategy(TrainerConfig(devices=2), SafeCheckpointIO())
    assert isinstance(strategy, DDPStrategy) and strategy.process_group_backend == "gloo" and len(plugins) == 2
    assert strategy._ddp_kwargs == {"find_unused_parameters": True, "forward_sync_buffers": False}


@no_cuda
@pytest.mark.parametrize("more", [{}, {"NTASKS_PER_NODE": "4"}])
def test_one_process_is_alone_in_a_job_of_slurms_with_more_tasks(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, str]
) -> None:
    job = {"JOB_ID": "20017", "JOB_NAME": "run", "NTASKS": "4", "PROCID": "0", "NODEID": "0", "LOCALID": "0"}
    for name, value in (job | more).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    trainer = build_trainer(TrainerConfig(accelerator="cpu"), 1)
    assert (trainer.world_size, trainer.global_rank) == (1, 0)


@pytest.mark.parametrize(
    ("routing", "every", "warns"),
    [
        ({}, 10, True), ({}, None, False), ({"mode": "relu"}, 10, True), ({"mode": "hash"}, 10, False),
        ({"mode": "dense"}, 10, False), ({"mode": "expert_choice", "allow_noncausal": True}, 10, False),
    ],
)  # fmt: skip
def test_collapse_is_looked_for_where_routers_train_and_tokens_choose(
    routing: dict[str, Any], every: int | None, warns: bool
) -> None:
    spec: Any = SimpleNamespace(name="code", routing=routing_of(**routing))
    found = collapse_warning(spec, every)
    assert [(one.stage, one.top_k, one.every_steps) for one in found] == [("code", spec.routing.top_k, every)] * warns


@pytest.mark.parametrize(("accumulate", "more"), [(1, 2), (2, 3), (3, 4), (4, 6), (6, 12), (12, None)])
def test_a_full_memory_is_answered_by_the_next_number_of_micro_batches(accumulate: int, more: int | None) -> None:
    model = SimpleNamespace(context=32)
    spec: Any = SimpleNamespace(name="code", global_batch=12, accumulate=accumulate, model=model)
    said = str(_out_of_memory(spec))
    assert f"micro-batches of {12 // accumulate} sequences of context 32" in said
    assert ("Set model.context or" in said) is (more is None)
    assert more is None or f"Set trainer.accumulate_grad_batches={more}, " in said


@pytest.mark.parametrize(
    "other", [{"mode": "learned"}, {"level": Level.document}, {"features": Features.embedding}], ids=str
)
def test_assignments_are_compared_only_where_fixed_centroids_look_at_hidden_states(other: dict[str, Any]) -> None:
    clustered: dict[str, Any] = {"mode": "cluster", "level": Level.token, "features": Features.hidden}
    spec: Any = SimpleNamespace(routing=routing_of(**(other if "mode" in other else clustered | other)))
    nothing: Any = None
    assert _sample_assignments(nothing, spec, nothing) is None


def test_the_new_expert_that_is_chosen_least_counts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two layers with two new experts each, beside one that does not grow."""
    loads = [[1, 127, 0, 0], [60, 48, 18, 2], [80, 44, 1, 3]]
    generation = SimpleNamespace(experts_in=lambda layer: 0 if layer == 0 else 2)
    model: Any = SimpleNamespace(architecture=SimpleNamespace(generations=[None, generation]))
    seen = [SimpleNamespace(counts_E=torch.tensor(load)) for load in loads]
    monkeypatch.setattr(measure, "observe", lambda *_: seen)
    monkeypatch.setattr(measure, "new_text_sample", lambda *_: None)
    for least, warnings in ((1 / 128, 0), (1 / 64, 1)):
        grow = SimpleNamespace(experts=2, sample_tokens=1, min_share=least)
        spec: Any = SimpleNamespace(name="code", grow=grow, model=SimpleNamespace(layers=3))
        assert measure._new_expert_share(model, spec, spec) == 1 / 128
        assert len(caplog.messages) == warnings


@pytest.mark.parametrize("teacher", [None, SimpleNamespace(architecture="its teacher's")])
def test_speed_in_flops_is_that_of_a_step_on_average(monkeypatch: pytest.MonkeyPatch, teacher: Any) -> None:
    flops = {("ours", None): 900, ("ours", "its teacher's"): 1200}
    monkeypatch.setattr(phases, "loop_flops", lambda spec, after, before: flops[after, before])
    models: Any = SimpleNamespace(model=SimpleNamespace(architecture="ours"), teacher=teacher)
    spec = SimpleNamespace(steps=30, optim=SimpleNamespace(batch_tokens=640))
    environment = SimpleNamespace(trainer=TrainerConfig(log_every_n_steps=7))
    stage = SimpleNamespace(spec=spec, environment=environment)
    meter = phases._meter(models, SimpleNamespace(stage=stage, rollbacks=SimpleNamespace(count=2)))  # type: ignore[arg-type]
    assert (meter.step_tokens, meter.step_flops) == (640, 30.0 if teacher is None else 40.0)
    assert (meter.every_steps, meter.rollbacks) == (7, 2)
