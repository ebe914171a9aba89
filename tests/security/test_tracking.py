"""A store from somebody else chooses neither where records go nor which files: `sync`, a spool and `mlflow.db`."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest

from lifelong_moe.config.tracking import TrackingConfig
from lifelong_moe.storage.keys import text_sha256
from lifelong_moe.tracking.operations import local_id, operation
from lifelong_moe.tracking.pages.server import serve_command
from lifelong_moe.tracking.spool import Spool
from lifelong_moe.tracking.sync import sync
from lifelong_moe.tracking.tracker import Tracker
from tests.records import commit_made

ROOT = Path("mlruns")
RUN = "0" * 32


@pytest.fixture(autouse=True)
def store(tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty store with a database in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    ROOT.mkdir()
    shutil.copy(template, ROOT / "mlflow.db")


def own_uri() -> str:
    return f"sqlite:///{ROOT.absolute()}/mlflow.db"


def execute(statement: str, *values: str) -> list[Any]:
    with closing(sqlite3.connect(ROOT / "mlflow.db")) as connection, connection:
        return connection.execute(statement, values).fetchall()


class Listener(BaseHTTPRequestHandler):
    """Notes who calls."""

    calls: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.calls.append(self.path + str(self.headers))
        self.send_response(200)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def address() -> Any:
    """A server of theirs."""
    Listener.calls.clear()
    server = HTTPServer(("127.0.0.1", 0), Listener)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_no_spool_says_where_it_goes(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "canary")
    spool = Spool(ROOT, address)
    spool.append(operation("artifact", local_id(), path="a.txt"), b"canary")
    # Under the name of our own address too, and with a name that is none.
    own = ROOT / "spool" / text_sha256(own_uri())[:16]
    shutil.copytree(spool.path, own)
    shutil.copytree(spool.path, ROOT / "spool/x y")
    outcomes = sync(ROOT)
    assert Listener.calls == []
    assert [(one.address, one.problem is None) for one in outcomes] == [
        (own_uri(), True), (address, False), (address, False)
    ]  # fmt: skip
    assert not spool.empty  # theirs are kept
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)  # once the user says that it is theirs
    sync(ROOT)
    assert Listener.calls


@pytest.mark.parametrize("name", ["../../../secret", "/etc/passwd", "{hash}/../../../../secret", "{hash}", "address"])
def test_only_files_of_the_spool_are_sent(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("canary")
    spool, run = Spool(ROOT, own_uri()), local_id()
    spool.append(operation("start", run, experiment="e", name="r", parent=None, params={}, tags={}))
    spool.append(operation("artifact", run, path="a.txt"), b"harmless")
    (file,) = (spool.path / "files").iterdir()
    pending = spool.path / "pending.jsonl"
    pending.write_text(pending.read_text().replace(file.name, name.format(hash=hashlib.sha256(b"x").hexdigest())))
    if name == "{hash}":  # one of ours by its name, but a link, or with other content
        (file.parent / hashlib.sha256(b"x").hexdigest()).symlink_to(tmp_path / "secret")
    (outcome,) = sync(ROOT)
    assert (outcome.delivered.operations, outcome.delivered.refused) == (1, 1)
    written = [path for path in ROOT.rglob("*") if path.is_file() and not path.is_symlink()]
    assert not [path for path in written if b"canary" in path.read_bytes()]


GOOD: dict[str, dict[str, Any]] = {
    "start": {"experiment": "e", "name": "r", "parent": None, "params": {}, "tags": {}},
    "metrics": {"rows": [["loss", 1.0, 0]]},
    "dataset": {"name": "d", "digest": "0", "context": "training", "source": "s", "profile": {}},
    "tag": {"key": "k", "value": "v"},
    "view": {"tag": "comparison", "name": "c"},
    "version": {
        "name": "lifelong-moe.r", "alias": "champion", "tags": {"stage_key": "ab" * 32}, "description": ""
    },
    "finish": {"status": "FINISHED"},
    "replaced": {"by": RUN},
    "artifact": {"path": "a.txt", "file": "0"},
}  # fmt: skip
BAD: list[Any] = [None, [], {}, 1e400, -1, "../x", "/x", "a\\b", "x\u202ey", {"stage_key": "' or 1 = 1"}, [[1, 2, 3]]]


def test_a_record_of_another_shape_is_refused_and_put_aside() -> None:
    spool, run = Spool(ROOT, own_uri()), local_id()
    lines = [
        "NaN",
        '{"do": 1e999}',
        "[]",
        "null",
        "1",
        '"x"',
        "{}",
        "[" * 5000,
        "\ud800x",
        json.dumps({"do": "format", "run": run, "time": 1}),
    ]
    for do, fields in GOOD.items():
        good = operation(do, run, **fields)
        for field in good:
            if field == "do":
                continue
            lines.append(json.dumps({name: value for name, value in good.items() if name != field and field != "file"}))
            wrong = BAD[:5] if isinstance(good[field], str) or field in ("name", "alias", "path", "run") else BAD[3:7]
            lines += [json.dumps({**good, field: value}) for value in wrong if value is not None or field != "alias"]
    # Another model of the user's, and a run that somebody else has made.
    lines.append(json.dumps(operation("version", run, **GOOD["version"] | {"name": "production"})))
    lines.append(json.dumps(operation("version", run, **GOOD["version"] | {"alias": "production"})))
    spool.append(operation("finish", run, status="FINISHED"))
    (spool.path / "pending.jsonl").write_bytes(
        b"".join(line.encode("utf-8", "surrogatepass") + b"\n" for line in lines)
    )
    (outcome,) = sync(ROOT)
    assert outcome.problem is None and spool.empty
    assert execute("SELECT count(*) FROM registered_models") == [(0,)]
    assert outcome.delivered.refused >= len(lines) * 0.9


@pytest.mark.parametrize("key", ["cd" * 32, "ab" * 16 + "x" * 32, "x", "-"])
def test_only_stages_of_this_store_become_versions(key: str) -> None:
    (ROOT / "runs/r").mkdir(parents=True)
    (ROOT / "runs/r/head.json").write_text("{}")
    commit_made(ROOT, "ab" * 32)
    spool, run = Spool(ROOT, own_uri()), local_id()
    spool.append(operation("start", run, **GOOD["start"]))
    # What an earlier release said of the place of its files is not looked at.
    given = GOOD["version"] | {"tags": {"stage_key": key}, "directory": "/etc"}
    spool.append(operation("version", run, **given))
    (outcome,) = sync(ROOT)
    assert (outcome.problem, outcome.delivered.refused) == (None, 1)
    assert execute("SELECT count(*) FROM model_versions") == [(0,)]


def test_a_damaged_stage_becomes_no_version() -> None:
    (ROOT / "runs/r").mkdir(parents=True)
    (ROOT / "runs/r/head.json").write_text("{}")
    (commit_made(ROOT, "ab" * 32).path / "model.safetensors").write_bytes(b"")
    spool, run = Spool(ROOT, own_uri()), local_id()
    spool.append(operation("start", run, **GOOD["start"]))
    spool.append(operation("version", run, **GOOD["version"]))
    (outcome,) = sync(ROOT)
    assert (outcome.problem, outcome.delivered.refused) == (None, 1)
    assert execute("SELECT count(*) FROM model_versions") == [(0,)]


@pytest.mark.parametrize(("name", "mine"), [("r", True), ("theirs", False), ("../runs/r", False), ("", False)])
def test_only_models_of_runs_of_this_store_get_versions(name: str, mine: bool) -> None:
    (ROOT / "runs/r").mkdir(parents=True)
    (ROOT / "runs/r/head.json").write_text("{}")
    (ROOT / "runs/theirs").mkdir()
    commit_made(ROOT, "ab" * 32)
    spool, run = Spool(ROOT, own_uri()), local_id()
    spool.append(operation("start", run, **GOOD["start"]))
    spool.append(operation("version", run, **GOOD["version"] | {"name": f"lifelong-moe.{name}"}))
    (outcome,) = sync(ROOT)
    assert (outcome.problem, outcome.delivered.refused) == (None, 0 if mine else 1)
    assert execute("SELECT name, alias FROM registered_model_aliases") == [("lifelong-moe.r", "champion")] * mine


def test_runs_that_others_made_are_left_alone() -> None:
    from mlflow import MlflowClient

    client = MlflowClient(own_uri())
    experiment = client.create_experiment("theirs", str(ROOT.absolute() / "artifacts"))
    theirs = client.create_run(experiment).info.run_id
    spool = Spool(ROOT, own_uri())
    for do in ("tag", "finish", "metrics", "start"):
        spool.append(operation(do, theirs, **GOOD[do]))
    spool.append(operation("start", local_id(), **GOOD["start"] | {"parent": theirs}))
    (outcome,) = sync(ROOT)
    assert (outcome.delivered.operations, outcome.delivered.refused) == (0, 5)
    assert client.get_run(theirs).info.status == "RUNNING" and not client.get_run(theirs).data.metrics


def recorded(location: str) -> tuple[str | None, list[Path]]:
    """What a tracker says of a database whose artifacts are elsewhere, and what it writes there."""
    tracker = Tracker.connect(TrackingConfig(), ROOT)
    run = tracker.start_run("r")
    tracker.log_text(run, "canary", "notes.txt")
    tracker.finish(run)
    elsewhere = Path(location.removeprefix("file://"))
    return tracker.problem, list(elsewhere.rglob("notes.txt"))


ELSEWHERE = (
    "{0}/victim",
    "file://{0}/victim",
    "s3://bucket/x",
    "{1}/artifacts/../../victim",
    "{1}/artifacts/%2e%2e/%2e%2e/victim",
    "{1}/stages",
    "{1}",
    "file://host{0}/victim",
    "victim",
)


@pytest.mark.parametrize("form", ELSEWHERE)
@pytest.mark.parametrize("of", ["experiment", "run", "run of another experiment"])
def test_artifacts_stay_within_the_store(form: str, of: str, tmp_path: Path) -> None:
    location = form.format(tmp_path, ROOT.absolute())
    first = Tracker.connect(TrackingConfig(experiment="other" if "another" in of else "lifelong-moe"), ROOT)
    first.log_text(first.start_run("before"), "x", "x.txt")
    before = {path for path in tmp_path.rglob("*") if ROOT.absolute() not in path.parents}
    if of == "experiment":
        execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id != 0", location)
    else:
        execute("UPDATE runs SET artifact_uri = ?", location)
    problem, written = recorded(location)
    assert problem is not None and "which is not below mlruns/artifacts" in problem and "\n" not in problem
    assert written == [] and {p for p in tmp_path.rglob("*") if ROOT.absolute() not in p.parents} == before
    assert not (ROOT / "stages").exists()
    assert list((ROOT / "spool").rglob("pending.jsonl"))  # the records are kept for another database


def test_a_store_that_was_moved_keeps_its_artifacts_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "before").mkdir()
    shutil.move(ROOT, "before")
    monkeypatch.chdir("before")
    tracker = Tracker.connect(TrackingConfig(), ROOT)
    run = tracker.start_run("r")
    tracker.log_text(run, "1", "first.txt")
    old = ROOT.absolute()
    (tmp_path / "after").mkdir()
    shutil.copytree(ROOT, tmp_path / "after/mlruns")
    monkeypatch.chdir(tmp_path / "after")
    moved = Tracker.connect(TrackingConfig(), ROOT)
    assert run is not None and moved.run_exists(run)
    moved.log_text(moved.start_run("s"), "2", "second.txt")
    assert moved.problem is None
    assert {path.name for path in (ROOT / "artifacts").rglob("*.txt")} == {"first.txt", "second.txt"}
    assert {path.name for path in (old / "artifacts").rglob("*.txt")} == {"first.txt"}
    assert execute("SELECT count(*) FROM runs WHERE artifact_uri LIKE ?", f"{ROOT.absolute()}/artifacts/%") == [(2,)]


def test_an_endless_database_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lifelong_moe.tracking.locations.READ_SECONDS", 0.5)
    execute("ALTER TABLE runs RENAME TO old_runs")
    execute("CREATE TABLE runs (artifact_uri TEXT GENERATED ALWAYS AS (hex(zeroblob(1000))) VIRTUAL, experiment_id, x)")
    execute("ALTER TABLE experiments RENAME TO old_experiments")
    execute(
        "CREATE VIEW experiments AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
        "SELECT i AS experiment_id, 'x' AS artifact_location FROM n"
    )
    problem = Tracker.connect(TrackingConfig(), ROOT).problem
    assert problem is not None and "\n" not in problem


def called(environment: dict[str, str], address: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the listener hears when a model is registered through a server of this environment."""
    from mlflow.entities.webhook import WebhookAction, WebhookEntity, WebhookEvent
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore
    from mlflow.webhooks import delivery

    event = WebhookEvent(WebhookEntity.REGISTERED_MODEL, WebhookAction.CREATED)
    Listener.calls.clear()
    with monkeypatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        # Futures instead of threads that nobody waits for, and no webhooks of an earlier call.
        with ThreadPoolExecutor(1) as executor:
            patch.setattr(delivery, "_webhook_delivery_executor", executor)
            patch.setattr(delivery, "_webhook_cache", None)
            store = SqlAlchemyStore(own_uri())
            delivery.deliver_webhook(event=event, payload={"name": "m"}, store=store)
    return list(Listener.calls)


def test_the_server_of_a_store_calls_no_webhook(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.environment_variables import MLFLOW_ENABLE_AI_GATEWAY

    # So that a listener on this machine would be called at all.
    allowing = {"MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http", "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true"}
    for name, value in allowing.items():
        monkeypatch.setenv(name, value)
    execute("INSERT INTO webhooks (webhook_id, name, url, status) VALUES ('w', 'w', ?, 'ACTIVE')", address)
    execute("INSERT INTO webhook_events (webhook_id, entity, action) VALUES ('w', 'registered_model', 'created')")
    assert called({}, address, monkeypatch)
    _, environment = serve_command(None, ROOT, 5000)
    assert called(environment, address, monkeypatch) == []
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_ENABLE_AI_GATEWAY", environment["MLFLOW_ENABLE_AI_GATEWAY"])
        assert MLFLOW_ENABLE_AI_GATEWAY.get() is False
    # A database of the user's own, elsewhere, may call what it likes.
    shutil.copy(ROOT / "mlflow.db", "own.db")
    _, environment = serve_command("sqlite:///own.db", ROOT, 5000)
    assert environment["MLFLOW_WEBHOOK_ALLOWED_SCHEMES"] == "http"


def test_recording_in_a_database_calls_no_webhook(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http")
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    execute("INSERT INTO webhooks (webhook_id, name, url, status) VALUES ('w', 'w', ?, 'ACTIVE')", address)
    for entity in ("registered_model", "model_version", "model_version_alias", "model_version_tag"):
        execute("INSERT INTO webhook_events (webhook_id, entity, action) VALUES ('w', ?, 'created')", entity)
    (ROOT / "runs/r").mkdir(parents=True)
    (ROOT / "runs/r/head.json").write_text("{}")
    spool, run = Spool(ROOT, own_uri()), local_id()
    spool.append(operation("start", run, **GOOD["start"]))
    commit_made(ROOT, "ab" * 32)
    spool.append(operation("version", run, **GOOD["version"]))
    (outcome,) = sync(ROOT)
    assert (outcome.delivered.operations, Listener.calls) == (2, [])
