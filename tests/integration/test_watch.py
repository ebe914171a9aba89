"""Whole runs that are watched for forgetting: what is said and logged, and that nothing else is different."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.comparison import load_comparison
from lifelong_moe.training.callbacks.logger import Row
from lifelong_moe.training.callbacks.progress import StepCheckpoint
from lifelong_moe.training.callbacks.watch import ForgettingWatch
from lifelong_moe.training.loop.context import StageRun
from pipelines.compare.compare import compare
from pipelines.run.record import MlflowRecord
from pipelines.shared.output import silent
from tests.checkpoints import config_of, write_checkpoint
from tests.retrain_lab import arrive, make_base, tick
from tests.tiny import fork, hashes, kill_self, tiny_config, train, write_config

needs_fork = pytest.mark.skipif(torch.cuda.is_available(), reason="autograd does not survive a fork once CUDA is there")
EVEN = {"top_k": 1, "renormalize": False}
NAIVE = {"method": "sequential", "stage_defaults": {"optim": {"lr": 1e-2, "batch_tokens": 128}}}
BUNDLES = {
    "model": {"document_mask": True},
    "stage_defaults": {
        "trunk": {"train": "deltas", "rank": 2}, "replay": {"fraction": 0.0}, "distill": {"weight": 0.0},
    },
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "naive": NAIVE,
    "lifelong": {},
    "noisy": {"routing": {"mode": "noisy_topk", "top_k": 2, "load_loss": 0.1}, "model": {"experts": 4}},
    "switch": {"routing": {**EVEN, "mode": "switch", "jitter": 0.3, "capacity": {"factor": 1.0}}},
    "relu": {"routing": {**EVEN, "mode": "relu"}},
    "biased": {"routing": {**EVEN, "score": "sigmoid", "bias_rate": 0.01}},
    "bundles": {
        **BUNDLES,
        "routing": {**EVEN, "bundles": "cluster", "mixture": None, "chunk_tokens": 4, "clusters": 2},
    },
    "labels": {**BUNDLES, "routing": {**EVEN, "bundles": "label"}},
    "int8": {
        "routing": {**EVEN, "bundles": "label"},
        "stage_defaults": {**BUNDLES["stage_defaults"], "grow": {"experts": 2, "frozen_weights": "int8"}},
        "model": {"document_mask": True},
    },
    "bf16": {"routing": {**EVEN, "mode": "switch", "jitter": 0.3}, "trainer": {"precision": "bf16-mixed"}},
    "review": {"stage_defaults": {"review": {"fraction": 0.5}}},
    "accumulating": {"trainer": {"accumulate_grad_batches": 2}},
}


def configure(watch: float, name: str = "tiny", stages: tuple[str, ...] = ("fruit", "code"), **sections: Any) -> str:
    """Write a run whose looks may cost so much of a stage; returns its file."""
    config = tiny_config(stages, run=name, **sections)
    config["evaluate"]["watch"] = watch
    return write_config(config, f"{name}.yaml")


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Row]]:
    """What was sent to MLflow under ``watch…/``, sorted, since the last call."""
    sent: list[Row] = []
    monkeypatch.setattr(MlflowRecord, "curves", lambda self, run_id, rows: sent.extend(rows))

    def call() -> list[Row]:
        found = sorted(row for row in sent if row[0].startswith("watch"))
        sent.clear()
        return found

    return call


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if "above the stage's start" in line]


def test_a_naive_run_is_warned_of_what_falls_while_it_falls(
    lab: Path, curves: Callable[[], list[Row]], caplog: pytest.LogCaptureFixture
) -> None:
    train(configure(1.0, stages=("fruit", "code", "sea"), **NAIVE))
    first, *others = warned(caplog)
    assert first.startswith("stage code, ") and " on fruit; KL from the old model on code is " in first
    assert int(first.split(", ")[1].split(" ")[0]) < 100
    assert any(line.startswith("stage sea, ") and "on code" in line for line in others)
    keys = {(key, step) for key, _, step in curves()}
    assert {key for key, _ in keys} == {
        *(f"watch_bits_per_byte/{name}" for name in ("fruit", "code", "sea")), "watch/kl_nats_per_token",
    }  # fmt: skip
    # Three texts are read in each look of the second stage, four in each of the third: five looks and three.
    assert sorted(step for key, step in keys if key == "watch_bits_per_byte/fruit") == sorted({0, 2, 4, 6, 8, 10, 3, 9})


@pytest.mark.parametrize("mode", MODES)
def test_what_is_trained_does_not_depend_on_it(
    lab: Path, mode: str, curves: Callable[[], list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(configure(0.0, **MODES[mode]))
    expected, keys = hashes(), json.loads(Path("mlruns/runs/tiny/head.json").read_text())["stages"]
    assert curves() == []
    shutil.rmtree("mlruns")
    report, _ = train(configure(1.0, **MODES[mode]))
    assert hashes() == expected and json.loads(Path("mlruns/runs/tiny/head.json").read_text())["stages"] == keys
    found = curves()
    curves = {"watch_bits_per_byte/fruit", "watch_bits_per_byte/code", "watch/kl_nats_per_token"}
    assert {key for key, _, _ in found} >= curves
    assert len({step for _, _, step in found}) > 3
    # Under frozen generations the old text is predicted as before, and the new text is not.
    if mode == "labels":
        assert len({value for key, value, _ in found if key == "watch_bits_per_byte/fruit"}) == 1
        assert max(value for key, value, _ in found if key == "watch/kl_nats_per_token") > 0.001
    assert len(report["stages"]) == 2


def test_a_run_whose_old_weights_are_frozen_is_quiet(lab: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(configure(1.0, **MODES["labels"]))
    assert warned(caplog) == []


def test_a_mixture_reads_old_text_with_what_is_frozen(lab: Path, curves: Callable[[], list[Row]]) -> None:
    train(configure(1.0, **{**BUNDLES, "routing": {**EVEN, "bundles": "cluster", "clusters": 2}}))
    assert curves() == []


@pytest.mark.parametrize("method", ["joint", "unrestrained"])
def test_without_a_model_before_there_is_nothing_to_forget(
    lab: Path, method: str, curves: Callable[[], list[Row]]
) -> None:
    train(configure(1.0, method=method))
    found = {key for key, _, _ in curves()}
    # The chain of `unrestrained` is naive training, and its models from scratch continue nothing.
    looks = {"watch_bits_per_byte/fruit", "watch_bits_per_byte/code", "watch/kl_nats_per_token"}
    assert found == (looks if method != "joint" else set())


def test_a_short_stage_affords_no_look(lab: Path, curves: Callable[[], list[Row]]) -> None:
    train(configure(0.02, **NAIVE))
    assert curves() == []


def interrupted(path: str, step: int) -> None:
    """A run that gets SIGKILL in its second stage, right before it saves a step."""

    def action() -> None:
        original = StepCheckpoint.on_train_batch_end

        def on_train_batch_end(self: StepCheckpoint, trainer: Any, module: Any, *rest: Any) -> None:
            if (module.spec.name, module.phase.name, trainer.global_step) == ("code", "train", step):
                kill_self()
            original(self, trainer, module, *rest)

        StepCheckpoint.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign]
        train(path)

    assert fork(action).wait() == -signal.SIGKILL


@needs_fork
@pytest.mark.parametrize("mode", ["naive", "review"])
def test_a_killed_stage_goes_on_with_the_same_numbers(
    lab: Path, mode: str, curves: Callable[[], list[Row]], caplog: pytest.LogCaptureFixture
) -> None:
    path = configure(1.0, **MODES[mode])
    train(path)
    expected, weights = curves(), hashes()
    assert max(step for _, _, step in expected) > 8
    shutil.rmtree("mlruns")
    # In the review's case before its phase, whose looks compare with the stage's start too.
    interrupted(path, 10 if mode == "naive" else 5)
    train(path)
    at = 8 if mode == "naive" else 4
    assert curves() == [row for row in expected if row[2] > at] and hashes() == weights


@needs_fork
def test_with_another_setting_a_killed_stage_goes_on_unwatched(
    lab: Path, curves: Callable[[], list[Row]], caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(configure(1.0, **NAIVE), 10)
    train(configure(0.6, **NAIVE))
    assert curves() == [] and "not watched" not in caplog.text


@needs_fork
def test_two_processes_say_and_log_it_once(
    lab: Path, curves: Callable[[], list[Row]], capfd: pytest.CaptureFixture[str]
) -> None:
    train(configure(1.0, **NAIVE))
    expected, weights = curves(), hashes()
    shutil.rmtree("mlruns")
    capfd.readouterr()
    train(configure(1.0, **{**NAIVE, "trainer": {"devices": 2}}))
    found = curves()
    # Of processes whose gradients are added in another order; the start is the same bits.
    assert [(key, step) for key, _, step in found] == [(key, step) for key, _, step in expected]
    assert [value for _, value, _ in found] == pytest.approx([value for _, value, _ in expected], abs=1e-3)
    assert len(weights) == 2


def test_a_comparison_logs_it_in_silence(
    lab: Path, curves: Callable[[], list[Row]], caplog: pytest.LogCaptureFixture
) -> None:
    configure(1.0, **NAIVE)
    Path("compare.yaml").write_text(yaml.safe_dump({"compare": "c", "base": "tiny.yaml", "arms": {"a": []}}))
    compare(load_comparison("compare.yaml"), [], False, silent())
    assert warned(caplog) == [] and curves() != []
    # And speaks again afterwards.
    assert not logging.getLogger("lifelong_moe.training.callbacks.watch").disabled


def test_a_distribution_that_is_learned_again_is_the_stage_s_own(lab: Path, curves: Callable[[], list[Row]]) -> None:
    config = tiny_config(("fruit", "code"), **NAIVE)
    config["evaluate"]["watch"] = 1.0
    config["stages"] = [{"data": "fruit"}, {"data": "code"}, {"data": "fruit"}]
    write_config(config)
    train("tiny.yaml", "stages[1].tokens=128")
    # The second stage, of one step, affords no look.
    assert {key for key, _, _ in curves()} == {
        "watch_bits_per_byte/fruit", "watch_bits_per_byte/code", "watch/kl_nats_per_token",
    }  # fmt: skip


def test_text_that_is_gone_is_watched_by_what_was_kept(lab: Path, curves: Callable[[], list[Row]]) -> None:
    config = tiny_config(("fruit",), **NAIVE)
    train(write_config(config))
    (lab / "fruit.jsonl").unlink()
    shutil.rmtree("data", ignore_errors=True)
    train(configure(1.0, **NAIVE))
    assert "watch_bits_per_byte/fruit" in {key for key, _, _ in curves()}


@pytest.mark.parametrize("bundles", [False, True])
def test_of_a_checkpoint_whose_text_is_not_there_only_the_divergence_is_known(
    lab: Path, bundles: bool, curves: Callable[[], list[Row]]
) -> None:
    pytest.importorskip("transformers", reason="checkpoints are made by the extra `transformers`")
    write_checkpoint("llama")
    config = config_of(bundles=bundles)
    config["evaluate"]["watch"] = 1.0
    config["stages"] = config["stages"][:1]
    train(write_config(config))
    assert {key for key, _, _ in curves()} == {"watch_bits_per_byte/fruit", "watch/kl_nats_per_token"}
    config["stages"].append({"data": "code"})
    train(write_config(config))
    assert {key for key, _, _ in curves()} == {
        "watch_bits_per_byte/fruit", "watch_bits_per_byte/code", "watch/kl_nats_per_token",
    }  # fmt: skip


def test_fine_tuning_is_watched_on_answers_and_on_what_came_before(lab: Path, curves: Callable[[], list[Row]]) -> None:
    rows = [{"prompt": f"{number} apple", "answer": "pear plum"} for number in range(200)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = tiny_config(("fruit",))
    keys = {"text_field": "prompt", "answer_field": "answer", "heldout_fraction": 0.2}
    config["distributions"]["pairs"] = {"files": "pairs.jsonl", **keys}
    config["stages"].append({"data": "pairs", "kind": "finetune", "finetune": {"patience": 2, "every_steps": 4}})
    config["evaluate"]["watch"] = 1.0
    train(write_config(config))
    assert {key for key, _, _ in curves()} == {
        "watch_bits_per_byte/fruit", "watch_bits_per_byte/pairs", "watch/kl_nats_per_token",
    }  # fmt: skip


def test_a_tick_watches_what_the_served_model_knows(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_base(lab, evaluate={"watch": 0.1})
    seen: list[tuple[str, list[str]]] = []
    original = ForgettingWatch.on_train_start

    def on_train_start(self: ForgettingWatch, *rest: Any) -> None:
        seen.append((self.watched.stage, list(self.watched.texts)))
        original(self, *rest)

    monkeypatch.setattr(ForgettingWatch, "on_train_start", on_train_start)
    arrive("sea")
    tick()
    name = next(iter(seen))[0]
    assert (name, ["fruit", "code", name]) in seen


def test_what_was_dropped_is_not_known_and_a_derived_stage_teaches_nothing() -> None:
    def stage(name: str, **made: str) -> Any:
        return SimpleNamespace(name=name, derived=made or None, spec=SimpleNamespace(learns=(name,)))

    chain = [stage("base", derived="import"), *map(stage, ("old", "fruit", "code", "sea"))]
    chain += [stage("sea", derived="drop", stage="fruit"), stage("sea", derived="consolidate", stage="code")]
    run = StageRun(
        planned=SimpleNamespace(spec=SimpleNamespace(learns=("sea",))),  # type: ignore[arg-type]
        parent=SimpleNamespace(key="k"),  # type: ignore[arg-type]
        data=SimpleNamespace(heldout=dict.fromkeys(["base", "fruit", "code", "sea"])),  # type: ignore[arg-type]
        environment=SimpleNamespace(store=SimpleNamespace(chain=lambda key: chain)),  # type: ignore[arg-type]
    )
    # Of the old one no held-out text is left, and the last one is the stage's own.
    assert run.known == ["code"]


@pytest.mark.parametrize("value", ["-0.1", "1.5", ".nan", "null"])
def test_a_share_lies_between_nothing_and_all(lab: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.watch"):
        train(configure(0.0), f"evaluate.watch={value}")
    assert not Path("mlruns").exists()
