"""What was recorded without MLflow is in MLflow after `sync`, as if it had been told directly, and nothing twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient
from typer.testing import CliRunner

from lifelong_moe.config.tracking import TrackingConfig
from lifelong_moe.tracking.spool import Spool
from lifelong_moe.tracking.store import Store
from lifelong_moe.tracking.tracker import Tracker
from pipelines.cli import app, exit_code
from tests.records import commit_made


class Lab:
    """A database under ``mlruns/`` that can be taken away."""

    def __init__(self, template: Path) -> None:
        self.template, self.root, self.database = template, Path("mlruns"), Path("mlruns/mlflow.db")
        (self.root / "runs/demo").mkdir(parents=True)
        (self.root / "runs/demo/head.json").touch()
        self.lose()

    def lose(self) -> None:
        self.database.write_text("not a database " * 100)

    def restore(self) -> None:
        shutil.copy(self.template, self.database)

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.database.absolute()}"

    def connect(self) -> Tracker:
        return Tracker.connect(TrackingConfig(), self.root)

    def spool(self) -> Spool:
        return Spool(self.root, self.uri)

    def rows(self) -> dict[str, list[Any]]:
        """Everything in the database."""
        import sqlite3

        with closing(sqlite3.connect(self.database)) as connection:
            tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            return {name: sorted(connection.execute(f"SELECT * FROM {name}"), key=repr) for name in tables}

    def shown(self) -> dict[str, Any]:
        """What a person sees, without ids and times."""
        client = MlflowClient(self.uri)
        experiment = client.get_experiment_by_name("lifelong-moe")
        assert experiment is not None
        runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
        shown: dict[str, Any] = {"versions": [
            (v.version, dict(v.tags), v.description, runs[v.run_id].info.run_name)
            for v in client.search_model_versions("name = 'lifelong-moe.demo'")
        ]}  # fmt: skip
        for run_id, run in runs.items():
            parent = run.data.tags.get("mlflow.parentRunId")
            tags = {k: v for k, v in run.data.tags.items() if k not in ("lifelong.local_id", "mlflow.parentRunId")}
            history = {key: client.get_metric_history(run_id, key) for key in run.data.metrics}
            folder = self.root / "artifacts" / run_id / "artifacts"
            shown[run.info.run_name] = {
                "parent": parent and runs[parent].info.run_name,
                "status": run.info.status,
                "params": run.data.params,
                "tags": tags,
                "metrics": {key: sorted((p.step, p.value) for p in points) for key, points in history.items()},
                "datasets": [(d.dataset.name, d.dataset.digest, d.dataset.profile) for d in run.inputs.dataset_inputs],
                # `MLmodel` has no suffix: it names the run and the time.
                "artifacts": {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.*") if p.is_file()},
            }
        return shown


@pytest.fixture
def lab(tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.chdir(tmp_path)
    for name in ("MAX_RETRIES", "TIMEOUT", "BACKOFF_FACTOR"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "1")
    yield Lab(template)


def record(tracker: Tracker) -> tuple[str, str]:
    """One of everything; returns the ids of the parent and the child."""
    parent = tracker.start_run("arm", params={"routing": {"top_k": 2}, "lr": 0.1}, tags={"a": "1"}, note="# Arm")
    child = tracker.start_run("arm / stage", parent_id=parent, params={"stage": 0})
    assert parent and child
    tracker.log_dataset(child, name="en", digest="ab" * 32, context="training", source="en", profile={"documents": 3})
    tracker.log_metrics(child, [("train/loss", 1 / (1 + step), step) for step in range(1500)])
    tracker.log_metrics(child, [("train/loss", float("nan"), 1500), ("train/loss", 0.1, 0)])
    tracker.log_figure(child, Figure(), "figures/loss.png")
    tracker.log_text(child, "first", "report.md")
    tracker.log_text(child, "# résumé\u2028", "report.md")
    tracker.set_note(child, "note")
    for key, alias in (("0123", None), ("4567", "champion")):
        tags = {"stage_key": commit_made(Path("mlruns"), key * 16).key}
        tracker.register_version(
            "lifelong-moe.demo",
            run_id=child,
            tags=tags,
            description="first",
            alias=alias,
        )
    tracker.finish(child)
    assert tracker.start_run("arm", run_id=parent, params={"lr": 0.2, "new": 1}, tags={"a": "2"}) == parent
    tracker.finish(parent, KeyboardInterrupt())
    return parent, child


def synced(*arguments: str) -> int:
    return exit_code(lambda: app(["sync", *arguments]))


def test_late_is_the_same_as_at_once(lab: Lab) -> None:
    lab.restore()
    record(lab.connect())
    told = lab.shown()
    shutil.rmtree(lab.root / "artifacts")
    lab.lose()
    tracker = lab.connect()
    assert tracker.problem is not None and "records are kept" in tracker.problem
    ids = record(tracker)
    assert all(tracker.run_exists(run_id) for run_id in ids)
    assert synced() == 75 and not lab.spool().empty
    lab.restore()
    assert synced() == 0 and lab.spool().empty
    assert lab.shown() == told
    assert len(told) == 3 and len(told["arm / stage"]["metrics"]["train/loss"]) == 1501
    champion = MlflowClient(lab.uri).get_model_version_by_alias("lifelong-moe.demo", "champion")
    assert champion.tags["stage_key"] == "4567" * 16
    healed = lab.connect()  # and the ids of then are good for ever
    assert all(healed.run_exists(run_id) for run_id in ids)
    assert "local-" not in healed.ui_url(ids[0])
    healed.log_metrics(ids[1], [("late", 1.0, 0)])
    assert healed.problem is None and lab.shown()["arm / stage"]["metrics"]["late"] == [(0, 1.0)]


def test_twice_or_killed_anywhere_adds_nothing(lab: Lab) -> None:
    record(lab.connect())
    copy = Path("copy")
    shutil.copytree(lab.spool().path, copy)
    lab.restore()
    assert synced() == 0
    rows = lab.rows()
    shutil.copytree(copy, lab.spool().path, dirs_exist_ok=True)
    assert synced() == 0
    assert lab.rows() == rows  # timestamps included
    # Killed after any operation: a kill leaves the spool whole, and the next delivery is from the start.
    lab.restore()
    (pending,) = copy.glob("pending.jsonl")
    operations = [json.loads(line) for line in pending.read_text().splitlines()]
    assert len(operations) > 12
    for killed_after in range(0, len(operations), 3):
        store = Store(lab.uri, lab.root)
        for asked in operations[:killed_after]:
            store.perform(asked, (copy / "files" / asked["file"]).read_bytes() if "file" in asked else None)
    shutil.copytree(copy, lab.spool().path, dirs_exist_ok=True)
    assert synced() == 0
    again = lab.rows()
    assert {name: len(found) for name, found in again.items()} == {name: len(found) for name, found in rows.items()}
    assert lab.shown()["arm"]["status"] == "KILLED"


def test_the_next_start_delivers_first(lab: Lab) -> None:
    parent, _ = record(lab.connect())
    lab.restore()
    tracker = lab.connect()
    assert tracker.problem is None and lab.spool().empty
    assert tracker.start_run("arm", run_id=parent) == parent
    assert set(lab.shown()) == {"versions", "arm", "arm / stage"}


def test_what_the_store_refuses_blocks_nothing(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = lab.connect()
    tracker.log_metrics("0" * 32, [("loss", 1.0, 0)])  # of a run that somebody deleted
    run_id = tracker.start_run("arm")
    tracker.finish(run_id)
    lab.restore()
    assert synced("--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {lab.uri: {"delivered": 2, "refused": 1}}
    assert "MLflow refused 1 of the records" in printed.err
    assert lab.shown()["arm"]["status"] == "FINISHED"
    assert "not found" in next(lab.spool().path.glob("refused.jsonl")).read_text()


def test_nothing_to_deliver(lab: Lab) -> None:
    result = CliRunner().invoke(app, ["sync", "--json"])
    assert (result.exit_code, json.loads(result.stdout)) == (0, {})
    assert not (lab.root / "spool").exists()
