"""What a whole run leaves in MLflow, however often it is repeated or killed; and runs without MLflow."""

from __future__ import annotations

import errno
import io
import json
import math
import shutil
import signal
import socket
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from lifelong_moe.config.load import read_config
from lifelong_moe.errors import DivergedError, TryAgainError
from lifelong_moe.plan.stages import stage_need
from pipelines.cli import exit_code
from pipelines.shared.workspace import prepare
from pipelines.upkeep.sync import sync
from tests.known_stages import train_all_stages
from tests.tiny import fork, tiny_config, train, write_config

pytestmark = pytest.mark.usefixtures("known_stages")


@pytest.fixture
def config(lab: Path, template: Path) -> dict[str, Any]:
    """A two-stage run that is recorded in an empty database."""
    (lab / "mlruns").mkdir()
    shutil.copy(template, lab / "mlruns/mlflow.db")
    config = tiny_config(tracking={"enabled": True})
    write_config(config)
    return config


def client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{Path('mlruns/mlflow.db').absolute()}")


def runs() -> tuple[list[Any], list[Any]]:
    """Parents and their children, oldest first."""
    asked = client()
    experiment = asked.get_experiment_by_name("lifelong-moe")
    found = asked.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    return parents, [run for run in found if "mlflow.parentRunId" in run.data.tags]


def points(run: Any, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client().get_metric_history(run.info.run_id, key)]


def contexts(run: Any) -> dict[str, set[str]]:
    return {
        given.dataset.name: {tag.value for tag in given.tags if tag.key == "mlflow.data.context"}
        for given in client().get_run(run.info.run_id).inputs.dataset_inputs
    }


def artifacts(run: Any) -> set[str]:
    root = Path("mlruns/artifacts") / run.info.run_id / "artifacts"
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


FIGURES = {"figures/loss_matrix.png", "figures/curves.png", "figures/expert_load.png"}
MODEL = {"MLmodel", "requirements.txt", "conda.yaml", "python_env.yaml", "data/pointer.json"}
"""Files of a registered version, in a folder of its stage's name."""


def of_stage(directory: str) -> set[str]:
    """Artifacts of a stage's run."""
    return {f"models/{directory}/{name}" for name in MODEL}


def test_two_stages(lab: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    train_all_stages(monkeypatch)  # curves of each step come to MLflow
    planned = prepare(read_config("tiny.yaml"))
    report, printed = train()
    left = sum(path.stat().st_size for path in Path("mlruns").rglob("*") if path.is_file())
    assert left <= sum(stage_need(stage, planned.config).stays for stage in planned.plan)  # database and figures too
    (parent,), children = runs()
    assert "MLflow: http://127.0.0.1:5000/#/experiments/" in printed
    assert [run.info.run_name for run in (parent, *children)] == ["tiny", "tiny · 0 fruit", "tiny · 1 code"]
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert [run.data.tags["lifelong.stage_key"] for run in children] == [stage["key"] for stage in report["stages"]]
    for j, name in enumerate(report["distributions"]):
        losses = [(i, row[j]) for i, row in enumerate(report["bits_per_byte"])]
        assert points(parent, f"heldout_bits_per_byte/{name}") == losses
        assert [step for step, _ in points(parent, f"routing_entropy_nats/{name}")] == [0, 1]
    lost, rise = report["forgetting_bits_per_byte"]["fruit"], 100 * math.expm1(report["forgetting"]["fruit"])
    # Only what can be another value than 0: not before the second stage, and not of what the last one learned.
    for kind in ("forgetting_bits_per_byte/fruit", "all/forgetting_worst_bits_per_byte"):
        assert points(parent, kind) == [(1, lost)]
    for kind in ("forgetting_percent/fruit", "all/forgetting_mean_percent"):
        assert points(parent, kind) == [(1, pytest.approx(rise))]
    leak = 100 * report["routing"]["fruit"]["leak"]
    assert points(parent, "routing_leak_percent/fruit") == [(1, leak)]
    assert {key for key in parent.data.metrics if "forgetting" in key and "code" in key} == set()
    assert "routing_leak_percent/code" not in parent.data.metrics
    assert points(parent, "size/experts_per_layer") == [(0, 2.0), (1, 4.0)]
    forward = report["forward_transfer_bits_per_byte"]
    assert points(parent, "all/forward_transfer_bits_per_byte") == [(1, forward)]
    for child in children:
        speeds = ("train_speed/tokens_per_second", "train_speed/tflops_per_second")
        for key in ("train/loss_nats_per_token", "train/learning_rate", "train/grad_norm", *speeds):
            assert [step for step, _ in points(child, key)] == [4, 8, 12], key
        training = report["stages"][children.index(child)]["training"]
        final, index = training["final"]["train/loss"], children.index(child)
        rate, tera = training["flops_per_second"], points(child, "train_speed/tflops_per_second")[-1][1]
        assert 1e12 * tera == pytest.approx(rate)
        for key, shown in (("energy_joules", "usage/joules"), ("joules_per_token", "usage/joules_per_token")):
            assert points(child, shown) == ([(index, training[key])] if key in training else [])
        assert points(child, "train/loss_nats_per_token")[-1] == (12, pytest.approx(final))
    assert [stage["active_flops"] for stage in report["stages"]] == [
        p.flops for p in prepare(read_config("tiny.yaml")).plan
    ]
    for key, name in (("tokens", "tokens"), ("active_flops", "flops"), ("seconds", "seconds")):
        own = [float(stage[key]) for stage in report["stages"]]
        assert [points(child, f"usage/{name}") for child in children] == [[(0, own[0])], [(1, own[1])]]
        assert points(parent, f"cost/{name}") == [(0, own[0]), (1, own[0] + own[1])]
    # What is a stage's alone would be taken for the run's there.
    assert not [key for key in parent.data.metrics if key.startswith("usage/")]
    assert not points(parent, "train/loss_nats_per_token")
    # A stage's page begins with its curves, and repeats nothing of the run's.
    sections = [sorted({key.rpartition("/")[0] for key in child.data.metrics}) for child in children]
    known = ["train", "train_speed", "usage", "watch", "watch_bits_per_byte"]
    assert all(found[:3] == known[:3] and set(found) <= set(known) for found in sections)
    # The run's page has the loss of all stages in a row, by the tokens so far: 128 a step, 1,536 in the first stage.
    curves = [points(child, "train/loss_nats_per_token") for child in children]
    assert points(parent, "over_tokens/train_loss_nats_per_token") == [
        (1536 * stage + 128 * step, loss) for stage, curve in enumerate(curves) for step, loss in curve
    ]
    means = [(1536 * (i + 1), pytest.approx(sum(row) / 2)) for i, row in enumerate(report["bits_per_byte"])]
    assert points(parent, "over_tokens/heldout_mean_bits_per_byte") == means
    assert parent.data.params["routing.mode"] == "learned" and parent.data.params["model.width"] == "32"
    assert children[1].data.params["experts_per_layer"] == "4"
    assert contexts(parent) == {"fruit": {"training"}, "code": {"training"}}
    assert contexts(children[0]) == {"fruit": {"training"}}
    assert contexts(children[1]) == {"code": {"training"}, "fruit": {"replay"}}
    assert artifacts(parent) == FIGURES | {"config.yaml", "report.json"}
    for child, stage in zip(children, report["stages"], strict=True):
        assert artifacts(child) == of_stage(f"{stage['name']}-{stage['key'][:16]}")
    stored = json.loads((lab / f"mlruns/artifacts/{parent.info.run_id}/artifacts/report.json").read_text())
    assert stored == report
    for run in (parent, *children):
        note = run.data.tags["mlflow.note.content"]
        assert "| after | fruit | code |" in note and "tiny" in note
    assert "So far: tiny could forget nothing" in children[0].data.tags["mlflow.note.content"]
    verdict = parent.data.tags["mlflow.note.content"].splitlines()[0]
    assert (
        verdict.startswith(("tiny kept fruit", "tiny lost", "tiny improved fruit")) and "it learned code to" in verdict
    )
    versions = sorted(client().search_model_versions("name = 'lifelong-moe.tiny'"), key=lambda v: int(v.version))
    assert [version.tags["stage_key"] for version in versions] == [stage["key"] for stage in report["stages"]]
    assert [version.run_id for version in versions] == [run.info.run_id for run in children]
    assert all((Path(version.source) / "MLmodel").is_file() for version in versions)
    assert versions[1].tags["parent_key"] == report["stages"][0]["key"]
    assert versions[1].tags["weights_sha256"] == report["stages"][1]["weights_sha256"]


def test_settings_are_shown_as_they_were_in_effect(lab: Path, config: dict[str, Any]) -> None:
    config["stages"][1] |= {"grow": {"init": "random", "experts": 3}, "optim": {"rewarm": 2.0}}
    train(write_config(config))
    train("tiny.yaml", "run=naive", "method=sequential")
    (parent, naive), (first, second, _, trained_on) = runs()
    for key, at_first, at_second in (
        ("stage", "0", "1"),
        ("grow.experts", "0", "3"),  # the first stage has nothing to grow from
        ("replay.fraction", "0.0", "0.25"),
        ("replay.distributions", "[]", '["fruit"]'),
        ("optim.lr", "0.003", "0.003"),  # of stage_defaults
        ("lr", "0.003", "0.006"),  # the peak, rewarmed
        ("optim.beta2", "0.95", "0.95"),  # a default
        ("model.rope_base", "10000.0", "10000.0"),
        ("routing.top_k", "1", "1"),
        ("trainer.precision", "32-true", "32-true"),
        ("tokens_trained", "1536", "1536"),
    ):
        assert (first.data.params[key], second.data.params[key]) == (at_first, at_second), key
    assert second.data.params["grow.init"] == "random" and second.data.params["grow.noise"] == "0.01"
    assert second.data.params["distill.temperature"] == "2.0"
    for key, off in (("grow.experts", "0"), ("replay.fraction", "0.0"), ("distill.weight", "0.0")):
        assert trained_on.data.params[key] == off  # whatever the configuration says: the method takes none of it
    shown = parent.data.params
    assert (shown["stages.1.grow.experts"], shown["stage_defaults.grow.experts"]) == ("3", "2")
    assert shown["num_stages"] == "2"
    assert (shown["model.width"], shown["evaluate.batch_tokens"], shown["method"]) == ("32", "8192", "lifelong")
    assert naive.data.params["method"] == "sequential"
    for run in (parent, naive, first, second, trained_on):
        assert not [key for key in run.data.params if key.endswith("_") or "._" in key]
    file = lab / f"mlruns/artifacts/{parent.info.run_id}/artifacts/config.yaml"
    assert read_config(file).config == read_config("tiny.yaml").config
    whole = yaml.safe_load(file.read_text())
    assert whole["stages"][1]["grow"]["experts"] == 3 and whole["stages"][1]["grow"]["noise"] == 0.01
    assert whole["stages"][0]["grow"]["experts"] == 2 and whole["stages"][0]["optim"]["lr"] == 3.0e-3


def test_repeating_adds_nothing_and_another_arm_adds_its_own(lab: Path, config: dict[str, Any]) -> None:
    train()
    before = (lab / "mlruns/mlflow.db").read_bytes()
    train()
    assert (lab / "mlruns/mlflow.db").read_bytes() == before
    train("tiny.yaml", "run=naive", "method=sequential")
    parents, children = runs()
    assert [run.info.run_name for run in parents] == ["tiny", "naive"]
    assert [run.info.run_name for run in children][2:] == ["naive · 0 fruit", "naive · 1 code"]
    # A shared stage has no curves of its own: its page links to that of the run which trained it.
    page = f"#/experiments/{children[0].info.experiment_id}/runs/{children[0].info.run_id}"
    assert f"trained by [tiny]({page}) and shared" in children[2].data.tags["mlflow.note.content"]
    over = points(parents[1], "over_tokens/train_loss_nats_per_token")
    assert [step for step, _ in over] == [1536, 2048, 2560, 3072]
    assert over[0][1] == points(children[0], "train/loss_nats_per_token")[-1][1]
    assert not points(children[2], "train/loss_nats_per_token") and points(children[3], "train/loss_nats_per_token")
    config["stages"].append({"data": "fruit"})
    train(write_config(config))
    parents, children = runs()
    assert len(parents) == 2 and [run.info.run_name for run in children][4:] == ["tiny · 2 fruit-2"]
    assert [step for step, _ in points(parents[0], "heldout_bits_per_byte/code")][-1] == 2


def test_what_is_only_added_to_keeps_its_end(lab: Path, config: dict[str, Any]) -> None:
    """MLflow shows the time from a run's start to its end as its duration."""

    def ends() -> dict[str, tuple[str, int]]:
        return {run.info.run_name: (run.info.status, run.info.end_time) for found in runs() for run in found}

    train()
    before = ends()
    config["distributions"]["sea"] = {"files": "sea.jsonl", "heldout_fraction": 0.1}
    config["evaluate"]["also"] = ["sea"]
    train(write_config(config))
    (parent,), _ = runs()
    assert ends() == before and [step for step, _ in points(parent, "heldout_bits_per_byte/sea")] == [0, 1]
    config["stages"].append({"data": "fruit"})
    train(write_config(config))
    after = ends()
    assert {name: after[name] for name in before if name != "tiny"} == {n: e for n, e in before.items() if n != "tiny"}
    assert after["tiny"][0] == "FINISHED" and after["tiny"][1] > before["tiny"][1]  # more was trained in it


def test_costs_are_told_to_a_run_of_an_earlier_version(lab: Path, config: dict[str, Any]) -> None:
    """A finished one too: it is started again, trains nothing, and keeps its end."""
    report, _ = train()
    record = lab / "mlruns/runs/tiny"
    head = json.loads((record / "head.json").read_text())
    kept = {path: json.loads(path.read_text()) for path in (record / "logged").iterdir()}
    # Such a version noted in the head what it had logged, and had another key for all of it.
    head["mlflow"]["content"] = "0" * 64
    head["mlflow"]["logged"] = {
        one["stage"]: {key: value for key, value in one["metrics"].items() if "cost/" not in key}
        for one in kept.values()
    }
    (record / "head.json").write_text(json.dumps(head))
    shutil.rmtree(record / "logged")
    with sqlite3.connect(lab / "mlruns/mlflow.db") as database:
        for table in ("metrics", "latest_metrics"):
            database.execute(f"DELETE FROM {table} WHERE key LIKE 'cost/%'")
    database.close()
    (before,), _ = runs()
    assert "cost/tokens" not in before.data.metrics
    train()
    (after,), children = runs()
    tokens = [float(stage["tokens"]) for stage in report["stages"]]
    assert points(after, "cost/tokens") == [(0, tokens[0]), (1, sum(tokens))]
    assert [points(child, "usage/tokens") for child in children] == [[(0, tokens[0])], [(1, tokens[1])]]
    assert points(after, "heldout_bits_per_byte/code") == points(before, "heldout_bits_per_byte/code")  # none twice
    assert after.info.end_time == before.info.end_time


def test_a_distribution_from_scratch_has_a_run_of_its_own(lab: Path, config: dict[str, Any]) -> None:
    report, _ = train("tiny.yaml", "method=unrestrained")
    (parent,), children = runs()
    names = ["tiny · 0 fruit", "tiny · 0 code.scratch", "tiny · 1 code"]
    assert [run.info.run_name for run in children] == names
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    alone = [(0, report["from_scratch"]["code"]["bits_per_byte"])]
    assert points(parent, "from_scratch_bits_per_byte/code") == alone
    assert points(children[1], "train/loss_nats_per_token")
    assert [step for step, _ in points(parent, "heldout_bits_per_byte/code")] == [0, 1]
    # Its loss is no part of the run's, whose second stage goes on where the first one ended.
    assert [step for step, _ in points(parent, "over_tokens/train_loss_nats_per_token")] == [
        *range(512, 1537, 512), *range(2048, 3073, 512),
    ]  # fmt: skip
    assert points(children[1], "usage/tokens") == [(0, float(report["from_scratch"]["code"]["tokens"]))]
    assert points(parent, "cost/tokens")[-1] == (1, float(sum(stage["tokens"] for stage in report["stages"])))
    assert contexts(children[1]) == {"code": {"training"}}
    assert len(client().search_model_versions("name = 'lifelong-moe.tiny'")) == 2  # of the chain alone
    before = (lab / "mlruns/mlflow.db").read_bytes()
    train("tiny.yaml", "method=unrestrained")
    assert (lab / "mlruns/mlflow.db").read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd does not survive a fork once CUDA is there")
def test_killed_run_is_taken_up_again(lab: Path, config: dict[str, Any]) -> None:
    from tests.tiny import kill_self

    def action() -> None:
        from lifelong_moe.training.callbacks.progress import StepCheckpoint

        original = StepCheckpoint.on_train_batch_end

        def on_train_batch_end(self: Any, trainer: Any, pl_module: Any, *args: Any) -> None:
            original(self, trainer, pl_module, *args)
            if (pl_module.spec.name, trainer.global_step) == ("code", 10):
                kill_self()

        StepCheckpoint.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign]
        train()

    child = fork(action)
    assert child.wait() == -signal.SIGKILL, child.output
    ids = json.loads((lab / "mlruns/runs/tiny/head.json").read_text())["mlflow"]
    (parent,), children = runs()
    assert [run.info.status for run in (parent, *children)] == ["RUNNING", "FINISHED", "RUNNING"]
    report, _ = train()
    (parent,), children = runs()
    assert parent.info.run_id == ids["run"]
    assert [run.info.run_id for run in children] == list(ids["stages"].values())
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    assert [step for step, _ in points(children[1], "train/loss_nats_per_token")] == [4, 8, 12]  # none lost, none twice
    assert [s for s, _ in points(parent, "over_tokens/train_loss_nats_per_token")] == list(range(512, 3073, 512))
    assert [step for step, _ in points(parent, "heldout_bits_per_byte/code")] == [0, 1]
    assert len(client().search_model_versions("name = 'lifelong-moe.tiny'")) == 2
    assert len(report["stages"]) == 2


def raises(error: BaseException) -> Callable[..., None]:
    def call(*args: Any) -> None:
        raise error

    return call


def terminated_once() -> Callable[..., None]:
    """By SIGTERM; a second one would end the process at once."""
    left = [signal.SIGTERM]

    def call(*args: Any) -> None:
        if left:
            signal.raise_signal(left.pop())

    return call


def test_what_ended_a_run_is_shown(lab: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config["stages"].pop()
    write_config(config)
    full, step = OSError(errno.ENOSPC, "No space left on device"), "StepCheckpoint.on_train_batch_end"
    for action, code, status in (
        (raises(DivergedError("stage fruit: no finite gradient")), 6, "FAILED"),
        (raises(full), 8, "FAILED"),
        (raises(KeyboardInterrupt()), 130, "KILLED"),
        (terminated_once(), 75, "KILLED"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"lifelong_moe.training.callbacks.progress.{step}", action)
            assert exit_code(lambda: train()) == code
        (parent,), children = runs()
        assert [run.info.status for run in (parent, *children)] == [status, status], code
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(
            "pipelines.run.run.Measurements.evaluations", raises(ZeroDivisionError())
        )  # before there is any stage
        train()
    assert runs()[0][0].info.status == "FAILED"
    train()
    (parent,), children = runs()
    assert [run.info.status for run in (parent, *children)] == ["FINISHED"] * 2


def test_unreachable_server_stops_nothing_and_a_later_start_records(lab: Path, config: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    began = time.monotonic()
    report, printed = train("tiny.yaml", f"tracking.uri=http://me:canary@127.0.0.1:{port}")
    assert time.monotonic() - began < 60  # without a limit of ours, MLflow asks again for minutes
    told = [line for line in printed.splitlines() if f"http://***@127.0.0.1:{port}" in line]
    assert len(told) == 1 and "records are kept under mlruns/spool" in told[0]
    assert "canary" not in printed and len(report["stages"]) == 2
    spooled = lines(lab)
    again, printed = train("tiny.yaml", f"tracking.uri=http://127.0.0.1:{port}")
    assert "Nothing to train" in printed and again == report and lines(lab) == spooled  # nothing new to keep
    assert not holding(lab / "mlruns", b"canary")
    again, printed = train()  # another store is told all
    assert "Nothing to train" in printed and again == report and lines(lab) == spooled
    (parent,), children = runs()
    assert len(children) == 2
    assert [step for step, _ in points(parent, "heldout_bits_per_byte/fruit")] == [0, 1]


def lines(lab: Path) -> int:
    """How much the spools hold."""
    return sum(path.read_bytes().count(b"\n") for path in (lab / "mlruns/spool").glob("*/pending.jsonl"))


def holding(root: Path, secret: bytes) -> list[Path]:
    """Files that hold a secret."""
    files = [path for path in root.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if secret in path.read_bytes()]


def test_password_from_the_environment_is_in_no_file(
    lab: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    train_all_stages(monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:canary@127.0.0.1:{port}/?token=canary")
    config["stages"].pop()
    write_config(config)
    _, printed = train()
    assert lines(lab) > 10 and "canary" not in printed
    assert not holding(lab, b"canary")
    with pytest.raises(TryAgainError) as refusal:
        sync(Console(file=io.StringIO()))
    assert "canary" not in str(refusal.value) and lines(lab) > 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd does not survive a fork once CUDA is there")
def test_no_kill_leaves_a_run_that_nobody_knows(lab: Path, config: dict[str, Any]) -> None:
    from tests.tiny import kill_self

    def killed_after(name: str) -> None:
        """Die when MLflow has created a run, and nobody here has heard of it yet."""
        from lifelong_moe.tracking.store import Store

        original = Store.perform

        def perform(self: Any, asked: Any, content: Any = None) -> Any:
            result = original(self, asked, content)
            if asked["do"] == "start" and asked["name"] == name:
                kill_self()
            return result

        Store.perform = perform  # type: ignore[method-assign]
        train()

    for name in ("tiny", "tiny · 0 fruit"):
        child = fork(lambda name=name: killed_after(name))  # type: ignore[misc]
        assert child.wait() == -signal.SIGKILL, child.output
    train()
    (parent,), children = runs()
    assert [run.info.run_name for run in (parent, *children)] == ["tiny", "tiny · 0 fruit", "tiny · 1 code"]
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    assert [step for step, _ in points(children[0], "train/loss_nats_per_token")] == [4, 8, 12]


@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd does not survive a fork once CUDA is there")
def test_a_run_that_is_replaced_is_closed(lab: Path, config: dict[str, Any]) -> None:
    from tests.tiny import kill_self

    def killed_while_recording() -> None:
        import pipelines.run.run as story

        story.train_stage = lambda *args: kill_self()  # type: ignore[assignment]
        train()

    child = fork(killed_while_recording)
    assert child.wait() == -signal.SIGKILL, child.output
    (old,), (stage,) = runs()
    assert {old.info.status, stage.info.status} == {"RUNNING"}
    train("tiny.yaml", "seed=1", "stages=[{data: fruit}]", replace=True)
    parents, _ = runs()
    (new,) = [run for run in parents if run.info.run_id != old.info.run_id]
    for run_id in (old.info.run_id, stage.info.run_id):
        run = client().get_run(run_id)
        assert run.info.status == "KILLED" and run.data.tags["lifelong.replaced_by"] == new.info.run_id
    assert new.info.status == "FINISHED"


def test_database_that_dies_in_the_run(lab: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import pipelines.run.run as story

    original = story.train_stage

    def train_stage(planned: Any, *args: Any) -> Any:
        if planned.spec.name == "code":
            execute("ALTER TABLE metrics RENAME TO gone")
        return original(planned, *args)

    monkeypatch.setattr(story, "train_stage", train_stage)
    report, printed = train()
    assert len(report["stages"]) == 2
    assert sum("records are kept under mlruns/spool" in line for line in printed.splitlines()) == 1
    execute("ALTER TABLE gone RENAME TO metrics")
    again, _ = train()  # the next start heals it
    assert again == report and lines(lab) == 0
    (parent,), children = runs()
    assert [run.info.run_name for run in children] == ["tiny · 0 fruit", "tiny · 1 code"]
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    for child, stage in zip(children, report["stages"], strict=True):
        assert [step for step, _ in points(child, "train/loss_nats_per_token")] == [4, 8, 12]
        assert artifacts(child) == of_stage(f"{stage['name']}-{stage['key'][:16]}")
    assert [step for step, _ in points(parent, "heldout_bits_per_byte/fruit")] == [0, 1]
    assert artifacts(parent) == FIGURES | {"config.yaml", "report.json"}
    assert len(client().search_model_versions("name = 'lifelong-moe.tiny'")) == 2


def execute(statement: str) -> None:
    with sqlite3.connect("mlruns/mlflow.db") as connection:
        connection.execute(statement)
    connection.close()


def test_secrets_stay_references(lab: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (lab / "canary-7f3a").mkdir()
    shutil.copy(lab / "fruit.jsonl", lab / "canary-7f3a")
    config["distributions"]["fruit"]["files"] = "${oc.env:SECRET_FOLDER}/fruit.jsonl"
    config["tracking"]["experiment"] = "${oc.env:EXPERIMENT}"
    config["stages"].pop()
    monkeypatch.setenv("SECRET_FOLDER", "canary-7f3a")
    monkeypatch.setenv("EXPERIMENT", "lifelong-moe")
    _, printed = train(write_config(config))
    assert "canary-7f3a" not in printed
    assert "${oc.env:SECRET_FOLDER}/fruit.jsonl" in next((lab / "mlruns").rglob("config.yaml")).read_text()
    for path in (lab / "mlruns").rglob("*"):
        assert not path.is_file() or b"canary-7f3a" not in path.read_bytes(), path
    assert runs()[0]
