"""What is really in MLflow after tracking, asked through its own client; and tracking without MLflow."""

from __future__ import annotations

import json
import math
import shutil
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from lifelong_moe.config.tracking import TrackingConfig
from lifelong_moe.errors import DivergedError
from lifelong_moe.store.pointer import open_pointer
from lifelong_moe.tracking.database import RecordedRun, recorded
from lifelong_moe.tracking.locations import _local
from lifelong_moe.tracking.registry import PENDING
from lifelong_moe.tracking.tracker import Tracker
from tests.records import commit_made


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tracker sets defaults for the process; no test may depend on another's."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("MAX_RETRIES", "TIMEOUT", "BACKOFF_FACTOR"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "1")


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    root = tmp_path / "my mlruns"
    root.mkdir()
    shutil.copy(template, root / "mlflow.db")
    return root


@pytest.fixture
def tracker(root: Path) -> Tracker:
    tracker = Tracker.connect(TrackingConfig(), root)
    assert tracker.problem is None
    return tracker


def client(root: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{root}/mlflow.db")


def started(tracker: Tracker, name: str = "run", **options: Any) -> str:
    run_id = tracker.start_run(name, **options)
    assert run_id is not None
    return run_id


def test_parent_and_child_with_params_tags_and_note(root: Path, tracker: Tracker) -> None:
    parent = started(tracker, "arm", params={"routing": {"top_k": 2}}, tags={"lifelong.run": "arm"}, note="# Arm")
    child = started(tracker, "arm / stage", parent_id=parent)
    tracker.finish(child)
    runs = client(root).search_runs([tracker.experiment_id], f"tags.mlflow.parentRunId = '{parent}'")
    assert [(run.info.run_id, run.info.run_name, run.info.status) for run in runs] == [
        (child, "arm / stage", "FINISHED")
    ]
    stored = client(root).get_run(parent)
    assert stored.info.status == "RUNNING"
    assert stored.data.params == {"routing.top_k": "2"}
    assert stored.data.tags["lifelong.run"] == "arm"
    assert stored.data.tags["mlflow.note.content"] == "# Arm"
    tracker.set_note(parent, "x" * 9000)
    note = client(root).get_run(parent).data.tags["mlflow.note.content"]
    assert len(note) == 8000 and note.endswith("… [cut, 9000 characters]")


def test_metrics_keep_their_steps_and_say_what_is_absent(root: Path, tracker: Tracker) -> None:
    run_id = started(tracker)
    rows = [("train/loss", math.inf if step == 3 else step / 2, step) for step in range(2500)]
    tracker.log_metrics(run_id, iter(rows))
    tracker.log_metrics(run_id, [])
    history = client(root).get_metric_history(run_id, "train/loss")
    points = {(point.step, point.value) for point in history}
    assert points == {(step, value) for _, value, step in rows if step != 3}
    assert [(p.step, p.value) for p in client(root).get_metric_history(run_id, "train/loss_absent")] == [(3, 1.0)]


def test_many_and_long_params_are_all_there(root: Path, tracker: Tracker) -> None:
    run_id = started(tracker, params={"many": {f"k{i}": i for i in range(250)}, "long": "x" * 7000})
    params = client(root).get_run(run_id).data.params
    assert len(params) == 251
    assert len(params["long"]) == 6000


def test_dataset_digest_and_profile(root: Path, tracker: Tracker) -> None:
    run_id = started(tracker)
    for _ in range(2):  # a resumed stage logs it again
        tracker.log_dataset(
            run_id, name="wiki_en", digest="ab" * 32, context="training", source="data/wiki", profile={"documents": 3}
        )
    (logged,) = client(root).get_run(run_id).inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.digest) == ("wiki_en", "ab" * 18)
    assert json.loads(logged.dataset.profile) == {"documents": 3}
    assert [(tag.key, tag.value) for tag in logged.tags] == [("mlflow.data.context", "training")]


def test_figures_and_texts_lie_under_our_root(root: Path, tracker: Tracker) -> None:
    run_id = started(tracker)
    tracker.log_figure(run_id, Figure(), "figures/loss_matrix.png")
    tracker.log_text(run_id, "# report", "report.md")
    artifacts = root / "artifacts" / run_id / "artifacts"
    assert (artifacts / "figures/loss_matrix.png").read_bytes().startswith(b"\x89PNG")
    assert (artifacts / "report.md").read_text() == "# report"
    assert {item.path for item in client(root).list_artifacts(run_id)} == {"figures", "report.md"}


def test_a_copy_of_a_store_keeps_its_own_artifacts(
    root: Path, tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, stage = started(tracker), commit_made(root, "0123" * 16)
    tracker.log_text(run_id, "of the original", "note.md")
    shutil.copytree(root, tmp_path / "copy" / root.name)
    monkeypatch.chdir(tmp_path / "copy")
    copy = Path(root.name).absolute()
    other = Tracker.connect(TrackingConfig(), copy)
    # Both have this run; the client of this process has seen the original's.
    other.log_text(run_id, "of the copy", "note.md")
    other.register_version("demo", run_id=run_id, tags={"stage_key": stage.key}, description="d")
    note, models = f"artifacts/{run_id}/artifacts/note.md", f"artifacts/{run_id}/artifacts/models"
    assert (root / note).read_text() == "of the original" and not (root / models).exists()
    assert (copy / note).read_text() == "of the copy" and (copy / models).is_dir()


def test_a_stage_is_registered_once(root: Path, tracker: Tracker) -> None:
    run_id = started(tracker)
    first, second = (commit_made(root, digits * 16) for digits in ("0123", "4567"))
    tags = {"stage_key": first.key, "gate": "passed"}

    def register(stage_key: str, alias: str | None = None) -> str | None:
        given = tags | {"stage_key": stage_key}
        return tracker.register_version("demo", run_id=run_id, tags=given, description="first", alias=alias)

    assert [register(first.key), register(second.key), register(first.key, alias="champion")] == ["1", "2", "1"]
    version = client(root).get_model_version_by_alias("demo", "champion")
    folder = root / "artifacts" / run_id / "artifacts/models" / first.path.name
    assert (str(version.version), version.run_id, version.source) == ("1", run_id, str(folder))
    assert version.status == "READY" and version.tags == tags | {"directory": str(first.path)}
    assert version.description.startswith("first\n") and 'load_model("models:/demo/1")' in version.description
    assert open_pointer(folder / "data")[1].key == first.key


def test_a_verdict_replaces_the_note_of_a_version_at_the_gate_and_no_other(root: Path, tracker: Tracker) -> None:
    run_id, stage = started(tracker), commit_made(root, "0123" * 16)
    for said, shown in ((PENDING, PENDING), ("", PENDING), ("rejected: no gain.", "rejected"), ("other", "rejected")):
        tracker.register_version("demo", run_id=run_id, tags={"stage_key": stage.key}, description=said)
        found = client(root).get_model_version("demo", "1").description
        assert found.startswith(shown) and 'load_model("models:/demo/1")' in found


def test_a_long_note_leaves_room_for_how_to_load(root: Path, tracker: Tracker) -> None:
    stage = commit_made(root, "0123" * 16)
    tracker.register_version(
        "demo", run_id=started(tracker), tags={"stage_key": stage.key}, description="| a |\n" * 2000
    )
    said = client(root).get_model_version("demo", "1").description
    assert len(said) == 5000 and "[cut, 12000 characters]" in said and "mlflow models serve" in said


def test_a_version_of_an_earlier_release_stays_and_gets_a_loadable_one_beside_it(root: Path, tracker: Tracker) -> None:
    run_id, stage = started(tracker), commit_made(root, "0123" * 16)
    tags = {"stage_key": stage.key}
    client(root).create_registered_model("demo")
    client(root).create_model_version("demo", str(stage.path), run_id=run_id, tags=tags)
    client(root).set_registered_model_alias("demo", "champion", "1")
    given = {"run_id": run_id, "tags": tags, "alias": "champion"}
    assert [tracker.register_version("demo", **given) for _ in range(2)] == ["2", "2"]
    assert str(client(root).get_model_version_by_alias("demo", "champion").version) == "2"
    assert client(root).get_model_version("demo", "1").source == str(stage.path)


def test_experiments_are_shown_as_model_training_unless_somebody_chose(root: Path, tracker: Tracker) -> None:
    kind, ours = "mlflow.experimentKind", "custom_model_development"
    number = tracker.experiment_id
    assert number is not None and client(root).get_experiment(number).tags[kind] == ours
    client(root).set_experiment_tag(number, kind, "genai_development")
    assert Tracker.connect(TrackingConfig(), root).experiment_id == number
    assert client(root).get_experiment(number).tags[kind] == "genai_development"
    # An experiment of an earlier version has none.
    client(root).delete_experiment_tag(number, kind)
    assert Tracker.connect(TrackingConfig(), root).experiment_id == number
    assert client(root).get_experiment(number).tags[kind] == ours


def test_resuming_takes_up_the_same_run(root: Path, tracker: Tracker) -> None:
    run_id = started(tracker, "arm", params={"seed": 0, "lr": 0.1}, tags={"a": "1"})
    tracker.finish(run_id, DivergedError("no finite gradient"))
    assert client(root).get_run(run_id).info.status == "FAILED"
    again = Tracker.connect(TrackingConfig(), root)
    assert again.experiment_id == tracker.experiment_id
    assert again.run_exists(run_id) and not again.run_exists("0" * 32) and not again.run_exists("not an id!")
    assert started(again, "arm", run_id=run_id, params={"seed": 1, "lr": 0.1, "new": 2}, tags={"a": "2"}) == run_id
    (run,) = client(root).search_runs([again.experiment_id])
    assert run.info.status == "RUNNING"
    assert run.data.params == {"seed": "0", "lr": "0.1", "new": "2"}  # MLflow forbids changing one
    assert run.data.tags["a"] == "2"
    assert again.problem is None


def test_what_only_adds_to_a_finished_run_keeps_its_end(root: Path, tracker: Tracker) -> None:
    done, stopped = started(tracker, "done"), started(tracker, "stopped")
    tracker.finish(done)
    tracker.finish(stopped, KeyboardInterrupt())
    end = client(root).get_run(done).info.end_time
    client(root).set_terminated(done, "FINISHED", end_time=end - 5000)
    for run_id in (done, stopped):
        started(tracker, run_id=run_id, parent_id=stopped, tags={"a": "1"}, adds=True)
    info = client(root).get_run(done).info
    assert (info.status, info.end_time) == ("FINISHED", end - 5000)
    assert client(root).get_run(stopped).info.status == "RUNNING"  # what was stopped is not finished yet
    for run_id in (done, stopped):
        tracker.finish(run_id)
    runs = [client(root).get_run(run_id) for run_id in (done, stopped)]
    assert [run.info.status for run in runs] == ["FINISHED"] * 2 and runs[0].info.end_time == end - 5000
    assert runs[0].data.tags["a"] == "1" and runs[0].data.tags["mlflow.parentRunId"] == stopped
    started(tracker, run_id=done)  # to train in it
    tracker.finish(done)
    assert client(root).get_run(done).info.end_time >= end


def test_a_run_that_is_gone_is_created_anew(root: Path, tracker: Tracker) -> None:
    deleted = started(tracker)
    client(root).delete_run(deleted)
    assert not tracker.run_exists(deleted)
    assert started(tracker, run_id=deleted) not in (None, deleted)


def test_disabled_tracker_does_nothing(tmp_path: Path) -> None:
    tracker = Tracker.connect(TrackingConfig(enabled=False), tmp_path / "mlruns")
    assert tracker.problem is not None and "tracking.enabled=false" in tracker.problem
    assert not tracker.active
    assert tracker.start_run("a") is None
    assert not tracker.run_exists("a")
    tracker.log_metrics("a", [("m", 1.0, 0)])
    tracker.log_dataset("a", name="d", digest="0", context="training", source="s", profile={})
    tracker.log_figure("a", Figure(), "f.png")
    tracker.set_note("a", "note")
    tracker.finish("a")
    assert tracker.register_version("m", run_id="a", tags={"stage_key": "0"}) is None
    assert (tracker.ui_url("a"), tracker.experiment_id) == ("", None)
    assert not (tmp_path / "mlruns").exists()


@pytest.fixture(params=["refused", "silent"])
def dead_port(request: pytest.FixtureRequest) -> Iterator[int]:
    """A port that refuses, or one that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if request.param == "silent":
            yield port
            return
    yield port


def test_unreachable_server_is_told_within_ten_seconds(dead_port: int, tmp_path: Path) -> None:
    started_at = time.monotonic()
    tracker = Tracker.connect(TrackingConfig(uri=f"http://user:secret@127.0.0.1:{dead_port}"), tmp_path)
    assert time.monotonic() - started_at < 10
    assert tracker.experiment_id is None and tracker.ui_url("a") == ""
    assert tracker.problem is not None and "\n" not in tracker.problem
    assert f"127.0.0.1:{dead_port}" in tracker.problem and "secret" not in tracker.problem


def test_store_that_dies_later_is_reported_once(root: Path, tracker: Tracker, caplog: pytest.LogCaptureFixture) -> None:
    run_id = started(tracker)
    with sqlite3.connect(root / "mlflow.db") as connection:  # as good as a dead server, and quicker
        connection.execute("DROP TABLE metrics")
    connection.close()
    for step in range(2):
        tracker.log_metrics(run_id, [("loss", 1.0, step)])
    assert tracker.experiment_id is None and tracker.problem is not None
    assert [record.getMessage() for record in caplog.records if record.name.startswith("lifelong_moe")] == [
        tracker.problem
    ]
    assert "\n" not in tracker.problem and "failed, so records are kept under mlruns/spool" in tracker.problem
    assert [op["rows"] for op in spooled(root)] == [[["loss", 1.0, 0]], [["loss", 1.0, 1]]]


def spooled(root: Path) -> list[Any]:
    (pending,) = (root / "spool").glob("*/pending.jsonl")
    return [json.loads(line) for line in pending.read_text().splitlines()]


def test_a_spool_that_cannot_be_written_stops_nothing(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "mlflow.db").write_text("not a database " * 100)
    (root / "spool").write_text("not a directory")
    tracker = Tracker.connect(TrackingConfig(), root)
    assert tracker.active and tracker.start_run("a") is None
    assert not tracker.active and tracker.problem is not None and "so no more is recorded" in tracker.problem
    tracker.log_metrics("a", [("loss", 1.0, 0)])
    assert [record.getMessage() for record in caplog.records if record.name.startswith("lifelong_moe")] == [
        tracker.problem
    ]


def test_deleted_experiment_is_not_revived(root: Path, tracker: Tracker) -> None:
    client(root).delete_experiment(tracker.experiment_id)
    again = Tracker.connect(TrackingConfig(), root)
    assert again.problem is not None and "'lifelong-moe' is deleted" in again.problem


def execute(root: Path, statement: str) -> None:
    with closing(sqlite3.connect(root / "mlflow.db")) as connection, connection:
        connection.execute(statement)


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM experiments WHERE name = 'lifelong-moe'",
        "UPDATE experiments SET lifecycle_stage = 'deleted'",
        "DELETE FROM experiment_tags",
        "UPDATE experiments SET artifact_location = '/elsewhere'",
        "UPDATE runs SET artifact_uri = '/elsewhere'",
        "CREATE VIEW computed AS SELECT 1",
        "ALTER TABLE runs RENAME TO others",
    ],
)
def test_mlflow_is_asked_unless_its_database_is_as_it_leaves_it(root: Path, tracker: Tracker, damage: str) -> None:
    started(tracker)
    uri = f"sqlite:///{root}/mlflow.db"
    assert recorded(uri, root, "lifelong-moe") is not None
    execute(root, damage)
    assert recorded(uri, root, "lifelong-moe") is None
    assert recorded("http://127.0.0.1:1", root, "lifelong-moe") is None
    (root / "mlflow.db").write_bytes(b"not a database " * 100)
    assert recorded(uri, root, "lifelong-moe") is None


def test_the_database_tells_what_mlflow_would(root: Path, tracker: Tracker) -> None:
    stages = [commit_made(root, digits * 16).key for digits in ("0123", "4567")]
    run_id, local = started(tracker), started(tracker, run_id="local-1")
    tracker.finish(run_id)
    names = [tracker.register_version("lifelong-moe.r", run_id=run_id, tags={"stage_key": one}) for one in stages]
    key = stages[-1]
    tracker.register_version("lifelong-moe.r", run_id=run_id, tags={"stage_key": key}, alias="champion")
    found = recorded(f"sqlite:///{root}/mlflow.db", root, "lifelong-moe")
    assert found is not None
    assert found.find(run_id) == RecordedRun(run_id, str(tracker.experiment_id), finished=True)
    assert found.find("local-1") == RecordedRun(local, str(tracker.experiment_id), finished=False)
    assert found.find("0" * 32) is found.find("' OR 1") is None
    asked = "lifelong-moe.r", key, "champion"
    assert found.version_with_alias(*asked) == names[-1]
    assert found.version_with_alias("lifelong-moe.r", key, "candidate") is None
    assert found.version_with_alias("lifelong-moe.r", "0" * 64, "champion") is None
    execute(root, "UPDATE registered_model_aliases SET version = version + 1")
    assert found.version_with_alias(*asked) is None
    client(root).delete_run(run_id)
    assert found.find(run_id) is None
    # As `' OR 1` in a filter, a made text in a column must do no harm.
    execute(
        root, "UPDATE runs SET run_uuid = 'a b' WHERE run_uuid = (SELECT run_uuid FROM tags WHERE value = 'local-1')"
    )
    execute(root, "UPDATE tags SET run_uuid = 'a b' WHERE value = 'local-1'")
    assert found.find("local-1") is None


@pytest.mark.parametrize(
    "location",
    [
        "/a/b",
        "file:///a/b",
        "/a/%62",
        "file:///a/%62",
        "file:///a;b",
        "/a;b",
        "/a b/ü",
        "file:///a b/ü",
        "/a/../b",
        "/a:b@c",
    ],
)
def test_a_path_is_read_as_mlflow_reads_it(location: str) -> None:
    from mlflow.utils.file_utils import local_file_uri_to_path

    theirs = local_file_uri_to_path(location)
    assert _local(location) == (theirs if theirs == location.removeprefix("file://") and ".." not in theirs else None)


def test_our_own_mistakes_are_raised(tracker: Tracker) -> None:
    run_id = started(tracker)
    with pytest.raises(KeyError, match="stage_key"):
        tracker.register_version("m", run_id=run_id, tags={})
    assert tracker.active
