"""A comparison in MLflow, killed, diverging, and worked on by several processes."""

from __future__ import annotations

import io
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

import pipelines.compare.compare as story
from lifelong_moe.config.load import LoadedConfig, read_config
from lifelong_moe.errors import DivergedError, LockedError, TryAgainError
from lifelong_moe.plan.comparison import load_comparison
from lifelong_moe.training.callbacks.progress import StepCheckpoint
from pipelines.compare.compare import compare
from tests.tiny import fork, tiny_config, write_config

needs_fork = pytest.mark.skipif(torch.cuda.is_available(), reason="autograd does not survive a fork once CUDA is there")


def start(*overrides: str, only: list[str] | None = None) -> tuple[dict[str, Any], str]:
    """Compare in this process; returns ``comparison.json`` and what was printed."""
    printed = io.StringIO()
    found = compare(load_comparison("compare.yaml", overrides), only or [], False, Console(file=printed, width=200))
    return found, printed.getvalue()


@pytest.fixture
def setup(lab: Path) -> Callable[..., None]:
    """Write a comparison of two arms."""

    def call(stages: tuple[str, ...] = ("fruit", "code"), **sections: Any) -> None:
        write_config(tiny_config(stages, **sections))
        raw = {"compare": "c", "base": "tiny.yaml", "arms": {"naive": ["method=sequential"], "lifelong": []}}
        Path("compare.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))

    return call


def statuses(found: dict[str, Any]) -> dict[str, str]:
    return {run["run"]: run["status"] for arm in found["arms"] for run in arm["runs"]}


def recorded(lab: Path) -> dict[str, Any]:
    """MLflow's runs by name."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{(lab / 'mlruns/mlflow.db').absolute()}")
    experiment = client.get_experiment_by_name("lifelong-moe")
    assert experiment is not None
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def test_one_parent_with_the_arms_under_it(lab: Path, template: Path, setup: Callable[..., None]) -> None:
    from mlflow import MlflowClient

    (lab / "mlruns").mkdir()
    shutil.copy(template, lab / "mlruns/mlflow.db")
    setup(tracking={"enabled": True})
    found, printed = start("stage_defaults.grow.noise=0.02")
    assert "MLflow: http://127.0.0.1:5000/#/experiments/" in printed
    client = MlflowClient(f"sqlite:///{(lab / 'mlruns/mlflow.db').absolute()}")
    experiment = client.get_experiment_by_name("lifelong-moe")
    assert experiment is not None

    def runs() -> dict[str, Any]:
        return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}

    def logged() -> dict[str, int]:
        return {
            name: sum(len(client.get_metric_history(run.info.run_id, key)) for key in run.data.metrics)
            for name, run in runs().items()
        }

    first, points = runs(), logged()
    parent = first["c"]
    arms = {"c.naive.s0": found["arms"][0], "c.lifelong.s0": found["arms"][1]}
    assert {run.info.status for run in first.values()} == {"FINISHED"}
    assert {n for n, run in first.items() if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id} == set(arms)
    for name, arm in arms.items():
        known = {f"compare/{k}": v for k, v in arm["runs"][0]["numbers"].items() if v is not None}
        seen = {key: value for key, value in first[name].data.metrics.items() if key.startswith("compare/")}
        assert seen == pytest.approx(known)
    assert parent.data.params["budget"] == "tokens" and parent.data.params["arms.naive"] == "method=sequential"
    assert parent.data.params["overrides"] == '["stage_defaults.grow.noise=0.02"]'
    grown, trained_on = (first[f"c.{arm}.s0 · 1 code"].data.params for arm in ("lifelong", "naive"))
    assert (grown["grow.experts"], grown["grow.noise"], trained_on["grow.experts"]) == ("2", "0.02", "0")
    for name in arms:
        kept = lab / "mlruns/artifacts" / first[name].info.run_id / "artifacts/config.yaml"
        assert read_config(kept).config.run == name
    assert "### Results" in parent.data.tags["mlflow.note.content"]
    artifacts = lab / "mlruns/artifacts" / parent.info.run_id / "artifacts"
    stored = {str(path.relative_to(artifacts)) for path in artifacts.rglob("*") if path.is_file()}
    assert stored == {f"figures/{n}.png" for n in ("pareto", "curves", "leak")} | {"comparison.md", "comparison.json"}

    again, _ = start("stage_defaults.grow.noise=0.02")
    assert again == found
    assert {run.info.run_id for run in runs().values()} == {run.info.run_id for run in first.values()}
    assert logged() == points
    assert {run.info.status for run in runs().values()} == {"FINISHED"}


def test_an_arm_that_gets_more_numbers_keeps_its_end(lab: Path, template: Path, setup: Callable[..., None]) -> None:
    (lab / "mlruns").mkdir()
    shutil.copy(template, lab / "mlruns/mlflow.db")
    setup(tracking={"enabled": True})
    start()
    before = recorded(lab)
    assert "compare/oracle_gap" not in before["c.naive.s0"].data.metrics
    start("arms.joint=[method=joint]")
    after = recorded(lab)
    assert "compare/oracle_gap" in after["c.naive.s0"].data.metrics
    assert {n: r.info.end_time for n, r in after.items() if n in before and n != "c"} == {
        n: r.info.end_time for n, r in before.items() if n != "c"
    }
    for name in ("c.naive.s0", "c.lifelong.s0"):
        metrics = after[name].data.metrics
        for ours, theirs in (("tokens", "tokens"), ("active_flops", "flops"), ("seconds", "seconds")):
            assert metrics[f"compare/{ours}"] == metrics[f"cost/{theirs}"]


def test_equal_flops(setup: Callable[..., None]) -> None:
    setup(stage_defaults=tiny_config()["stage_defaults"] | {"distill": {"text": "new"}})
    found, _ = start("budget=flops")
    naive, lifelong = (arm["runs"][0]["numbers"] for arm in found["arms"])
    assert lifelong["active_flops"] <= naive["active_flops"] and lifelong["tokens"] < naive["tokens"]
    reports = [json.loads(Path(f"mlruns/runs/c.{arm}.s0/report.json").read_text()) for arm in ("naive", "lifelong")]
    ours, theirs = (report["stages"] for report in reports)
    assert ours[0]["key"] == theirs[0]["key"]  # what begins alike stays shared
    assert theirs[1]["active_flops"] <= ours[1]["active_flops"]


def test_an_arm_that_diverges_does_not_stop_the_others(
    lab: Path, template: Path, setup: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (lab / "mlruns").mkdir()
    shutil.copy(template, lab / "mlruns/mlflow.db")
    setup(("fruit",), tracking={"enabled": True})
    trains = story.run

    def run(loaded: LoadedConfig, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if loaded.config.run == "c.naive.s0":
            raise DivergedError("stage fruit: no finite gradient; nothing was committed.")
        return trains(loaded, *args, **kwargs)

    monkeypatch.setattr(story, "run", run)
    with pytest.raises(DivergedError, match=r"1 of 2 runs diverged: c\.naive\.s0; the others are compared"):
        start()
    found = json.loads(Path("mlruns/comparisons/c/comparison.json").read_text())
    assert statuses(found) == {"c.naive.s0": "failed", "c.lifelong.s0": "committed"}
    assert found["arms"][0]["runs"][0]["reason"].startswith("stage fruit: no finite gradient")
    shown = {"c": "FAILED", "c.lifelong.s0": "FINISHED", "c.lifelong.s0 · 0 fruit": "FINISHED"}
    assert {name: run.info.status for name, run in recorded(lab).items()} == shown
    monkeypatch.setattr(story, "run", trains)
    found, _ = start()
    assert set(statuses(found).values()) == {"committed"}
    assert found["arms"][0]["runs"][0]["reason"] is None
    assert {run.info.status for run in recorded(lab).values()} == {"FINISHED"}


def test_locked_runs_come_last_and_are_waited_for(setup: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    setup(("fruit",))
    trains, begun, waits = story.run, [], []

    def run(loaded: LoadedConfig, *args: Any, **kwargs: Any) -> dict[str, Any]:
        begun.append(loaded.config.run)
        if begun[-1] == "c.naive.s0" and len(begun) < 5:
            raise LockedError("run c.naive.s0 is being worked on by process 1; try again later.")
        return trains(loaded, *args, **kwargs)

    monkeypatch.setattr(story, "run", run)
    monkeypatch.setattr(story, "_wait", lambda jobs: waits.append(len(begun)))
    found, printed = start()
    assert begun == ["c.naive.s0", "c.lifelong.s0", *["c.naive.s0"] * 3]
    assert waits == [3, 4]  # once it was all that was left
    assert set(statuses(found).values()) == {"committed"} and "waiting for them" in printed


@needs_fork
def test_two_processes_share_the_work(lab: Path, setup: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    setup()
    monkeypatch.setattr(story, "WAIT_SECONDS", 0.2)
    children = [fork(lambda: start()) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0], [child.output for child in children]
    assert len(list((lab / "mlruns/stages").iterdir())) == 3
    found, printed = start()
    assert set(statuses(found).values()) == {"committed"} and "training" not in printed.partition("Results")[0]


@needs_fork
@pytest.mark.parametrize(
    ("number", "code", "told"),
    [
        (signal.SIGTERM, TryAgainError.exit_code, "TryAgainError: stopped by SIGTERM"),
        (signal.SIGINT, 130, "interrupted: stopped by Ctrl-C"),
    ],
)
@pytest.mark.parametrize("function", ["run", "_wait"])
def test_a_signal_stops_it(
    lab: Path,
    setup: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    number: signal.Signals,
    code: int,
    told: str,
) -> None:
    setup(("fruit",))

    def terminated(*args: Any, **kwargs: Any) -> None:
        signal.raise_signal(number)

    def locked(*args: Any, **kwargs: Any) -> None:
        raise LockedError("run is being worked on by process 1; try again later.")

    monkeypatch.setattr(story, "run", locked)
    monkeypatch.setattr(story, function, terminated)
    child = fork(start)
    assert child.wait() == code, child.output
    assert child.output.splitlines()[-1].startswith(told)


@needs_fork
def test_ctrl_c_saves_what_an_arm_has_trained(
    lab: Path, setup: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup(("fruit",))
    original = StepCheckpoint.on_train_batch_end

    def on_train_batch_end(self: StepCheckpoint, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 6:
            signal.raise_signal(signal.SIGINT)
        original(self, trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(StepCheckpoint, "on_train_batch_end", on_train_batch_end)
        child = fork(start)
        assert child.wait() == 130, child.output
    assert child.output.splitlines()[-1].startswith("interrupted: stopped after step 6, which is checkpointed; run")
    found, printed = start()
    assert "fruit: continuing from step-0-00000006" in printed and set(statuses(found).values()) == {"committed"}
