"""Serve the MLflow UI from our database, which a bare ``mlflow ui`` would not find: it looks for ``./mlflow.db``."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lifelong_moe.errors import ConfigError
from lifelong_moe.redaction import is_web, shown_address
from lifelong_moe.tracking import guard
from lifelong_moe.tracking.connection import probe, resolve_uri, sqlite_path
from lifelong_moe.tracking.locations import own_database

SILENT = {
    # Each call of a webhook checks its address against these: none is left.
    "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "none",
    "MLFLOW_ENABLE_AI_GATEWAY": "false",
}
# MLflow 3 takes two helpers from a module that Starlette means to remove, which is MLflow's to mend. No other warning
# begins like this.
STARLETTE = "ignore:starlette.middleware.wsgi is deprecated:UserWarning"
"""Settings of a server whose database came with a store: it may hold webhooks and endpoints of somebody else."""


def serve_command(uri: str | None, root: Path, port: int, host: str = "127.0.0.1") -> tuple[list[str], dict[str, str]]:
    """Build the command that serves the MLflow UI.

    Args:
        uri: Tracking URI of the config; None means what :func:`resolve_uri` chooses.
        root: The ``mlruns/`` directory; made if absent, since the server cannot open a database in no directory.
        port: TCP port to listen on.
        host: Interface to listen on; loopback unless the user asks for more.

    Returns:
        Arguments and the full environment for ``subprocess``.

    Raises:
        ConfigError: If the URI is a server already.
    """
    uri = resolve_uri(uri, root)
    if is_web(uri):
        raise ConfigError(
            f"tracking.uri={shown_address(uri)} is a server already; open it in a browser, "
            "or unset tracking.uri and MLFLOW_TRACKING_URI to serve the local database."
        )
    root = root.absolute()
    root.mkdir(parents=True, exist_ok=True)
    artifacts = str(root / "artifacts")
    if (path := sqlite_path(uri)) is not None:
        uri = f"sqlite:///{path.absolute()}"  # the server runs in another directory
    # Without the working directory among the places of modules: it may be somebody else's.
    argv = [sys.executable, "-P", "-m", "mlflow", "server"]
    # Both default to the working directory.
    argv += ["--default-artifact-root", artifacts, "--artifacts-destination", artifacts]
    argv += ["--host", host, "--port", str(port), "--workers", "1"]
    environment = os.environ | {
        # Not an argument: those of every process can be read by everyone on this machine, and this may hold a password.
        "MLFLOW_BACKEND_STORE_URI": uri,
        "PYTHONSAFEPATH": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Not used by us, and it makes the start 36 s instead of 14 s.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # The last one that fits counts.
        "PYTHONWARNINGS": ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), STARLETTE])),
    }
    return argv, environment | (SILENT if own_database(uri, root) is not None else {})


@contextmanager
def serving(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server that ends with this context, and with this process, however that ends.

    Args:
        command: Arguments of the server.
        environment: Its whole environment.

    Yields:
        A process that ends with the server, and with its exit code.
    """
    # By its path, which is found whatever the environment says.
    guarded = [sys.executable, "-P", guard.__file__, *command]
    # At the root of the file system, because servers look for modules and settings in their working directory.
    server = subprocess.Popen(
        guarded, env=environment, stdin=subprocess.PIPE, start_new_session=True, cwd=os.path.abspath(os.sep)
    )
    assert server.stdin is not None
    try:
        yield server
    finally:
        server.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            server.wait(guard.GRACE_SECONDS + 2)
        # If somebody has ended the guard alone, what it guarded is still there.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def require_free(host: str, port: int) -> None:
    """Require a port that we can listen on.

    Args:
        host: Interface to listen on.
        port: TCP port.

    Raises:
        ConfigError: If it is taken, forbidden, or the address is not this machine's.
    """
    # The server itself would take seconds to find out.
    try:
        host.encode("idna")  # as sockets do, which report a name that cannot be one as a bug
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ConfigError(f"port {port} of {host} is not free: {error.strerror}. Choose another --port.") from None
    except UnicodeError:
        raise ConfigError(f"--host={host}: not the name of a host.") from None


def wait_until_up(
    url: str, seconds: float, server: subprocess.Popen[bytes] | None = None, is_ours: Callable[[], bool] = lambda: True
) -> bool:
    """Wait for a server to answer.

    Args:
        url: Its address, such as ``http://127.0.0.1:5000``.
        seconds: Longest wait.
        server: Its process, if it is ours.
        is_ours: Tells whether the one that answers is the one that is waited for.

    Returns:
        True as soon as it answers, False if its process ended or it did not answer within the time.
    """
    # A wall clock may jump while we wait.
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0 and (server is None or server.poll() is None):
        if probe(url, min(left, 2.0)) is None and is_ours():
            return True
        time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))
    return False
