"""`ui` opens the page of its own server, or none."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from rich.console import Console

from lifelong_moe.tracking.pages.links import served_port
from lifelong_moe.tracking.pages.server import serve_command
from pipelines.cli import app, exit_code
from pipelines.upkeep import ui as story
from tests.tiny import fork


@pytest.fixture(autouse=True)
def opened(tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pages that were opened; the current directory has an empty database."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlruns").mkdir()
    shutil.copy(template, "mlruns/mlflow.db")
    pages: list[str] = []
    monkeypatch.setattr("webbrowser.open", pages.append)
    return pages


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_taken_port_costs_one_line(opened: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert exit_code(lambda: app(["ui", "--port", str(taken.getsockname()[1])])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not free: Address already in use" in line and "--port" in line
    assert opened == []


class Stranger(BaseHTTPRequestHandler):
    """Answers whatever it is asked."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Nothing."""


def test_whoever_takes_the_port_meanwhile_is_not_opened(opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    port, strangers = free_port(), []

    def serve_command(*args: Any) -> tuple[list[str], dict[str, str]]:
        """The port was free; now it is not, and our own server ends because of that."""
        strangers.append(HTTPServer(("127.0.0.1", port), Stranger))
        Thread(target=strangers[0].serve_forever, daemon=True).start()
        return [sys.executable, "-c", "import time; time.sleep(1); raise SystemExit(3)"], dict(os.environ)

    monkeypatch.setattr(story, "serve_command", serve_command)
    printed = io.StringIO()
    assert story.ui(port, "127.0.0.1", True, "lifelong-moe", Console(file=printed, width=200)) == 3
    strangers[0].shutdown()
    strangers[0].server_close()
    assert opened == [] and "MLflow: http" not in printed.getvalue()
    assert "ended with exit code 3" in printed.getvalue()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a fork does not survive once CUDA is there")
def test_an_address_of_ipv6_has_brackets(opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as free:
            port = int(free.getsockname()[1])
    except OSError:
        pytest.skip("this machine has no IPv6")
    answer_once = f"""
import socket
from http.server import HTTPServer, SimpleHTTPRequestHandler
class Server(HTTPServer):
    address_family = socket.AF_INET6
Server(("::1", {port}), SimpleHTTPRequestHandler).handle_request()
raise SystemExit(3)
"""
    monkeypatch.setattr(story, "serve_command", lambda *_: ([sys.executable, "-c", answer_once], dict(os.environ)))
    monkeypatch.setattr("lifelong_moe.tracking.tracker.Tracker.is_behind", lambda *_: True)
    assert story.ui(port, "::1", True, "lifelong-moe", Console(file=io.StringIO())) == 3
    (page,) = opened
    assert page.startswith(f"http://[::1]:{port}/#/experiments/")
    assert served_port(Path("mlruns")) == port  # for the links that runs print


def test_one_warning_of_the_server_s_libraries_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's own import, of which a user of `ui` can do nothing; others are, and what the user set counts before."""
    code = "import starlette.middleware.wsgi, warnings; warnings.warn('another of starlette', UserWarning)"
    monkeypatch.setenv("PYTHONWARNINGS", "always::DeprecationWarning")
    _, environment = serve_command(None, Path("mlruns"), 5000)
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "middleware.wsgi is deprecated" not in said.stderr and "another of starlette" in said.stderr
    assert environment["PYTHONWARNINGS"].startswith("always::DeprecationWarning,ignore:")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert "middleware.wsgi is deprecated" in shown, "drop the filter in lifelong_moe/tracking/pages/server.py"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_server_does_not_outlive_us(tmp_path: Path, number: signal.Signals) -> None:
    def serve_command(*args: Any) -> tuple[list[str], dict[str, str]]:
        # As MLflow does, the server starts another process; neither ends when it is asked to.
        code = "import os, signal, time; signal.signal(15, signal.SIG_IGN); os.fork(); "
        code += f"open(f'{tmp_path}/{{os.getpid()}}.pid', 'w').close(); time.sleep(120)"
        return [sys.executable, "-c", code], dict(os.environ)

    def serve() -> Any:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # not as `nohup` leaves it
        story.serve_command = serve_command  # type: ignore[assignment]
        return story.ui(port, "127.0.0.1", False, "lifelong-moe", Console(file=io.StringIO()))

    port = free_port()
    child = fork(serve)
    assert wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    servers = [int(path.stem) for path in tmp_path.glob("*.pid")]
    os.kill(child.pid, number)
    assert child.wait() == {signal.SIGTERM: 75}.get(number, -number), child.output
    assert wait_for(lambda: not any(map(is_alive, servers)))


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether something becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # it has ended, and its new parent has not looked yet
