"""A real MLflow server on loopback beside the SQLite of the other tests: what it keeps, and its death."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient

from lifelong_moe.config.tracking import TrackingConfig
from lifelong_moe.store.pointer import open_pointer
from lifelong_moe.tracking.pages.server import serve_command, wait_until_up
from lifelong_moe.tracking.tracker import Tracker
from pipelines.cli import app, exit_code
from tests.records import commit_made
from tests.tiny import tiny_config, train, write_config

pytestmark = pytest.mark.xdist_group("server")  # one process starts what most of them ask

START_SECONDS = 90.0


class Server:
    """Our own ``ui`` server on a database of its own, which may be killed and started again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self.process is None:
            command, environment = serve_command(f"sqlite:///{self.root}/mlflow.db", self.root, self.port)
            with (self.root / "log").open("ab") as log:
                self.process = subprocess.Popen(
                    command, env=environment, stdout=log, stderr=log, cwd=self.root, start_new_session=True
                )
            assert wait_until_up(self.uri, START_SECONDS), (self.root / "log").read_text()

    def kill(self) -> None:
        """SIGKILL, its worker too."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def one_server(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("server") / "mlruns"
    root.mkdir()
    shutil.copy(template, root / "mlflow.db")
    server = Server(root)
    yield server
    server.kill()


@pytest.fixture
def server(one_server: Server, lab: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server that answers, and a working directory that knows it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", one_server.uri)
    for name in ("MAX_RETRIES", "TIMEOUT", "BACKOFF_FACTOR"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "1" if name != "TIMEOUT" else "10")
    one_server.start()
    return one_server


def runs(server: Server, experiment: str) -> dict[str, Any]:
    """Runs by name; a name that comes twice fails."""
    client = MlflowClient(server.uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    listed = client.search_runs([found.experiment_id])
    named = {run.info.run_name: run for run in listed}
    assert len(named) == len(listed)
    return named


def points(server: Server, run: Any, key: str) -> list[tuple[int, float]]:
    history = MlflowClient(server.uri).get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value) for point in history)


def test_runs_aliases_artifacts_and_resuming(server: Server, lab: Path) -> None:
    config = TrackingConfig(experiment="direct")
    tracker = Tracker.connect(config, lab / "mlruns")
    assert tracker.problem is None
    parent = tracker.start_run("arm", params={"lr": 0.1})
    child = tracker.start_run("stage", parent_id=parent)
    assert parent and child and tracker.run_exists(parent) and not tracker.run_exists("0" * 32)
    tracker.log_metrics(child, [("loss", 1 / (1 + step), step) for step in range(1200)])
    tracker.log_figure(child, Figure(), "figures/loss.png")
    tracker.log_text(child, "# r\u00e9sum\u00e9", "report.md")
    stages = [commit_made(lab / "mlruns", digits * 16) for digits in ("0123", "4567")]
    numbers = [
        tracker.register_version("lifelong-moe.demo", run_id=child, tags={"stage_key": stage.key}, alias=alias)
        for stage, alias in ((stages[0], "champion"), (stages[1], None), (stages[1], "champion"))
    ]
    tracker.finish(parent, KeyboardInterrupt())
    again = Tracker.connect(config, lab / "mlruns")
    assert again.start_run("arm", run_id=parent, params={"lr": 0.2, "new": 1}) == parent
    again.finish(parent)
    again.finish(child)
    assert (tracker.problem, again.problem) == (None, None)
    assert not (lab / "mlruns/spool").exists()

    found, client = runs(server, "direct"), MlflowClient(server.uri)
    assert {name: run.info.run_id for name, run in found.items()} == {"arm": parent, "stage": child}
    assert found["stage"].data.tags["mlflow.parentRunId"] == parent
    assert (found["arm"].info.status, found["arm"].data.params) == ("FINISHED", {"lr": "0.1", "new": "1"})
    assert len(points(server, found["stage"], "loss")) == 1200
    assert {item.path for item in client.list_artifacts(child)} >= {"figures", "report.md"}
    assert Path(client.download_artifacts(child, "report.md", str(lab))).read_text() == "# r\u00e9sum\u00e9"
    assert numbers == ["1", "2", "2"]
    champion = client.get_model_version_by_alias("lifelong-moe.demo", "champion")
    assert (str(champion.version), champion.tags["directory"]) == ("2", str(stages[1].path))
    # The server has all that the model is made of, whatever becomes of the store.
    shutil.rmtree(lab / "mlruns/stages")
    (lab / "copy").mkdir()
    folder = client.download_artifacts(child, f"models/{stages[1].path.name}", str(lab / "copy"))
    store, stage = open_pointer(Path(folder) / "data")
    assert stage.key == stages[1].key and [*store.tensors(stage)] == ["w"]


def test_killed_in_a_run_and_absent_at_the_next_start(
    server: Server, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipelines.run.run as story

    write_config(tiny_config(tracking={"enabled": True, "experiment": "killed"}))
    original = story.train_stage

    def train_stage(planned: Any, *args: Any) -> Any:
        if planned.spec.name == "code":
            server.kill()
        return original(planned, *args)

    with monkeypatch.context() as patch:
        patch.setattr(story, "train_stage", train_stage)
        report, printed = train()
    assert len(report["stages"]) == 2
    assert sum("records are kept under mlruns/spool" in line for line in printed.splitlines()) == 1
    _, printed = train("tiny.yaml", "run=later", "stages=[{data: fruit}]")
    assert "is not usable, so records are kept" in printed
    assert exit_code(lambda: app(["sync"])) == 75

    server.start()
    spool = shutil.copytree(next((lab / "mlruns/spool").iterdir()), lab / "copy")
    assert exit_code(lambda: app(["sync"])) == 0
    first = snapshot(server)
    shutil.copytree(spool, next((lab / "mlruns/spool").iterdir()), dirs_exist_ok=True)
    assert exit_code(lambda: app(["sync"])) == 0
    assert snapshot(server) == first  # told twice, there once

    found = runs(server, "killed")
    assert set(found) == {"tiny", "tiny · 0 fruit", "tiny · 1 code", "later", "later · 0 fruit"}
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    for stage in ("tiny · 0 fruit", "tiny · 1 code"):
        assert found[stage].data.tags["mlflow.parentRunId"] == found["tiny"].info.run_id
        assert [step for step, _ in points(server, found[stage], "train/loss_nats_per_token")] == [4, 8, 12]
    for j, name in enumerate(report["distributions"]):
        losses = [(i, row[j]) for i, row in enumerate(report["bits_per_byte"])]
        assert points(server, found["tiny"], f"heldout_bits_per_byte/{name}") == losses
    client = MlflowClient(server.uri)
    for run in (found["tiny"], found["later"]):
        assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {"figures"}
    assert len(client.search_model_versions("name = 'lifelong-moe.tiny'")) == 2
    _, printed = train()  # and the ids that the run's head holds are good
    assert "Nothing to train" in printed and snapshot(server) == first


def snapshot(server: Server) -> dict[str, Any]:
    """Everything that a duplicate would change."""
    return {
        name: (
            run.to_dictionary()["data"],
            {key: points(server, run, key) for key in run.data.metrics},
            [given.dataset.name for given in run.inputs.dataset_inputs],
        )
        for name, run in runs(server, "killed").items()
    }


def test_a_server_is_known_by_its_database(server: Server, lab: Path, template: Path) -> None:
    ours = Tracker.connect(TrackingConfig(uri=f"sqlite:///{server.root}/mlflow.db", experiment="known"), server.root)
    assert ours.is_behind(server.uri)
    (lab / "mlruns").mkdir()
    shutil.copy(template, lab / "mlruns/mlflow.db")
    other = Tracker.connect(TrackingConfig(uri=f"sqlite:///{lab}/mlruns/mlflow.db", experiment="known"), lab / "mlruns")
    assert other.problem is None and not other.is_behind(server.uri)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert not ours.is_behind(f"http://127.0.0.1:{port}")
