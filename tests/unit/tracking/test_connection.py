"""Where records go, and how soon a dead store is recognized. No MLflow here: it takes seconds to import."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lifelong_moe.config.tracking import TrackingConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.tracking.connection import probe, resolve_uri, sqlite_path
from lifelong_moe.tracking.pages.links import note_port, served_port, starting, ui_url, view_url
from lifelong_moe.tracking.pages.server import require_free, serve_command, wait_until_up
from lifelong_moe.tracking.pages.views import FILTERS, RUNS, comparison_view
from lifelong_moe.tracking.tracker import Tracker


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A socket that accepts connections (the kernel does) and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def answering(server: socket.socket, status: str) -> str:
    """Answer one request with a status; returns the address."""

    def answer() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())

    threading.Thread(target=answer, daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}"


def refused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_uri_comes_from_config_then_environment_then_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert resolve_uri("http://config", tmp_path) == "http://config"
    assert resolve_uri(None, tmp_path) == "http://environment"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    assert resolve_uri(None, Path("mlruns")) == f"sqlite:///{tmp_path}/mlruns/mlflow.db"


def test_refused_port_is_told_at_once() -> None:
    started = time.monotonic()
    problem = probe(f"http://127.0.0.1:{refused_port()}")
    assert problem is not None and "refused" in problem
    assert time.monotonic() - started < 2


def test_silent_server_is_given_up_in_time(listener: socket.socket) -> None:
    started = time.monotonic()
    assert probe(f"http://127.0.0.1:{listener.getsockname()[1]}", seconds=0.5) is not None
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(("status", "up"), [("200 OK", True), ("404 Not Found", True), ("503 Unavailable", False)])
def test_only_a_server_error_counts_as_down(listener: socket.socket, status: str, up: bool) -> None:
    problem = probe(answering(listener, status))
    assert (problem is None) == up


def test_database_that_cannot_be_opened_is_down(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    (tmp_path / "text.db").write_text("not a database " * 100)
    assert probe(f"sqlite:///{tmp_path}/file/mlflow.db") is not None
    assert "not a database" in (probe(f"sqlite:///{tmp_path}/text.db") or "")
    assert probe(f"sqlite:///{tmp_path}/new/mlflow.db") is None
    assert probe(f"postgresql://user:secret@127.0.0.1:{refused_port()}/mlflow") is not None


def test_ui_command_serves_our_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    argv, environment = serve_command(None, tmp_path / "mlruns", 5001)
    assert argv[:5] == [sys.executable, "-P", "-m", "mlflow", "server"]
    options = dict(zip(argv[5::2], argv[6::2], strict=True))
    # Arguments of every process can be read by all users of a machine, and an address may hold a password.
    assert environment["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    assert not [one for one in argv if "mlflow.db" in one]
    assert (options["--host"], options["--port"], options["--workers"]) == ("127.0.0.1", "5001", "1")
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    with pytest.raises(ConfigError, match=r"tracking\.uri=http://\*\*\*@host is a server already"):
        serve_command("http://user:secret@host", tmp_path, 5001)


def test_waiting_ends_with_the_server_or_the_time(listener: socket.socket) -> None:
    assert wait_until_up(answering(listener, "200 OK"), 5)
    assert not wait_until_up(f"http://127.0.0.1:{refused_port()}", 0.3)
    assert not wait_until_up(answering(listener, "200 OK"), 0.3, is_ours=lambda: False)
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as server:
        started = time.monotonic()
        assert not wait_until_up(f"http://127.0.0.1:{refused_port()}", 60, server)
        assert server.returncode == 3 and time.monotonic() - started < 30


def test_a_port_that_is_taken_is_refused(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with pytest.raises(ConfigError, match=rf"port {port} of 127\.0\.0\.1 is not free: Address already in use"):
        require_free("127.0.0.1", port)
    require_free("127.0.0.1", refused_port())
    with pytest.raises(ConfigError, match=r"of 192\.0\.2\.1 is not free"):  # of documentation, nobody's
        require_free("192.0.2.1", port)


def test_links_open_charts_and_views() -> None:
    query = "#/experiments/7/runs?workflowType=machine_learning"
    chosen = f"{query}&compareRunsMode=CHART&searchFilter=tags.a%3D%27b%27"
    assert ui_url("sqlite:////x/mlflow.db", "7", "tags.a='b'") == f"http://127.0.0.1:5000/{chosen}"
    assert ui_url("sqlite:////x/mlflow.db", "7", "tags.a='b'", 5001) == f"http://127.0.0.1:5001/{chosen}"
    assert ui_url("https://user:secret@host/mlflow/", "7", "tags.a='b'") == f"https://host/mlflow/{chosen}"
    listed = f"{query}&viewStateShareKey=lifelong-runs"
    assert view_url("sqlite:////x/mlflow.db", "7", RUNS, 5001) == f"http://127.0.0.1:5001/{listed}"
    view = comparison_view("comparison", "c")
    charts = f"{query}&viewStateShareKey={view.key}&compareRunsMode=CHART"
    assert view_url("https://user:secret@host/mlflow/", "7", view) == f"https://host/mlflow/{charts}"


def test_a_view_is_one_tag_that_mlflow_takes() -> None:
    views = [RUNS, *(comparison_view(tag, "n" * 128) for tag in FILTERS), comparison_view("comparison", "N" * 128)]
    tags = [tag for view in views for tag in view.tags.items()]
    assert len(dict(tags)) == 4 and all(len(key) <= 250 and len(value) <= 5000 for key, value in tags)


def test_the_port_on_which_a_store_was_served_is_remembered(tmp_path: Path) -> None:
    assert served_port(tmp_path) == 5000 and starting("sqlite:///x.db", 5000).endswith("lifelong-moe ui)")
    note_port(tmp_path, 5000)
    assert not list(tmp_path.iterdir())
    note_port(tmp_path, 5001)
    assert served_port(tmp_path) == 5001 and starting("sqlite:///x.db", 5001).endswith("lifelong-moe ui --port 5001)")
    # A server of the user's is not started by us.
    assert starting("https://host", 5001) == ""
    for damaged in ('{"port": 0}', '{"port": 65536}', '{"port": "1/x"}', "x", '{"port": 1, "host": "evil"}'):
        (tmp_path / "ui.json").write_text(damaged)
        assert served_port(tmp_path) == 5000
    note_port(tmp_path, 5001)
    assert served_port(tmp_path) == 5001
    note_port(tmp_path / "gone", 5001)  # not a reason to serve nothing
    assert served_port(tmp_path / "gone") in (5000, 5001)


def test_importing_the_package_does_not_import_mlflow() -> None:
    modules = "lifelong_moe.tracking.tracker, lifelong_moe.tracking.pages.server"
    code = f"import sys, {modules}; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_working_directory_that_mlflow_cannot_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place = tmp_path / os.fsdecode(b"caf\xe9")
    place.mkdir()
    monkeypatch.chdir(place)
    tracker = Tracker.connect(TrackingConfig(), Path("mlruns"))
    assert tracker.problem is not None and "is not UTF-8" in tracker.problem and not tracker.active
    assert tracker.start_run("x") is None and list(place.iterdir()) == []


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///a.db",
        "sqlite:////a/b c/ü.db",
        "sqlite:////a@b:c/d#e.db",
        "sqlite:////a%20b.db",
        "sqlite:///a.db?mode=ro",
        "sqlite+pysqlite:///a.db",
        "sqlite:///:memory:",
        "sqlite:///",
        "sqlite://",
    ],
)
def test_a_database_is_where_sqlalchemy_finds_it(uri: str) -> None:
    from sqlalchemy.engine import make_url

    database = make_url(uri).database
    assert sqlite_path(uri) == (Path(database) if database and database != ":memory:" else None)
