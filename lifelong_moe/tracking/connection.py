"""Find the tracking store, and learn within seconds whether it answers.

The stock client retries: measured, 247 s on a refused port and 101 s on a database that cannot be opened. So each store
is probed with a short timeout before MLflow uses it.
"""

from __future__ import annotations

import http.client
import logging
import os
import socket
import sqlite3
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from lifelong_moe.redaction import is_web, redact, without_credentials

PROBE_SECONDS = 5.0
"""Longest wait for a tracking server or database before training starts without it."""

_CLIENT_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A server that dies later costs at most about 20 s (two tries) instead of minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    # Otherwise MLflow prints links to stdout, where the last line must be our JSON.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def resolve_uri(uri: str | None, root: Path) -> str:
    """Choose the tracking store.

    Args:
        uri: ``tracking.uri`` of the config, or None.
        root: The ``mlruns/`` directory.

    Returns:
        ``uri``, else ``MLFLOW_TRACKING_URI``, else a SQLite database ``mlflow.db`` under ``root``.
    """
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or local_uri(root)


def local_uri(root: Path) -> str:
    """The SQLite database of a store: ``mlflow.db`` under ``root``, the ``mlruns/`` directory."""
    return f"sqlite:///{root.absolute() / 'mlflow.db'}"


def sqlite_path(uri: str) -> Path | None:
    """Find the file of a SQLite database.

    Args:
        uri: Tracking URI.

    Returns:
        Its path; None for any other store, and for a database in memory.
    """
    if _scheme(uri) != "sqlite":
        return None
    start, _, rest = uri.partition(":///")
    if start == "sqlite" and not {"?", "%"} & set(rest):
        # As SQLAlchemy reads it, whose import takes longer than many commands.
        database: str | None = rest
    else:
        from sqlalchemy.engine import make_url

        database = make_url(uri).database
    return Path(database) if database and database != ":memory:" else None


def is_utf8(text: str) -> bool:
    """Whether a text, such as a path, can be encoded as UTF-8."""
    # Python represents each undecodable byte of a file name by a lone surrogate, which has no encoding.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def prepare_environment() -> None:
    """Set MLflow's own switches before its first import; values that the user has set are kept."""
    for name, value in _CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # It warns of each repeated request with the path of the address; we say once what failed.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def probe(uri: str, seconds: float = PROBE_SECONDS) -> str | None:
    """Ask whether a tracking store answers.

    Args:
        uri: Tracking URI. Kinds that cannot be asked cheaply (``databricks``) count as answering.
        seconds: Longest time that this call takes.

    Returns:
        None if it answers, else one line why not.
    """
    scheme = _scheme(uri)
    if is_web(uri):
        check: Callable[[str, float], str | None] = _probe_server
    elif scheme == "sqlite":
        check = _probe_sqlite
    elif scheme in _DEFAULT_PORTS:
        check = _probe_port
    else:
        return None
    outcome: list[str | None] = []
    # What libraries say may quote a part of the address.
    # A socket timeout bounds neither name resolution nor a server that drips bytes; abandoning a daemon thread does.
    worker = threading.Thread(target=lambda: outcome.append(check(uri, seconds)), daemon=True)
    worker.start()
    worker.join(seconds)
    told = outcome[0] if outcome else f"no answer within {seconds:g} s"
    return None if told is None else redact(told, uri)


def _scheme(uri: str) -> str:
    """The kind of a store, without its driver."""
    # Not urlsplit, which refuses some passwords.
    return uri.partition(":")[0].partition("+")[0].lower()


def _probe_server(uri: str, seconds: float) -> str | None:
    try:
        parts = urlsplit(uri)
        # A password that holds "/" makes a port of its beginning, and a host of the user.
        _ = parts.port
        address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    except ValueError:
        return "its address cannot be read; write / as %2F, @ as %40, # as %23 and ? as %3F in its password"
    try:
        with urllib.request.urlopen(address.rstrip("/") + "/health", timeout=seconds):
            return None
    except urllib.error.HTTPError as error:
        # A gateway may refuse or not know /health; only 5xx says that nobody is behind it.
        return f"HTTP {error.code} {error.reason}" if error.code >= 500 else None
    except urllib.error.URLError as error:
        return str(error.reason)
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: not a URL
        return str(error)


def _probe_sqlite(uri: str, seconds: float) -> str | None:
    path = sqlite_path(uri)
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return None  # Connecting would create an empty file.
        connection = sqlite3.connect(path, timeout=seconds / 2)
        try:
            # The cheapest statement that reads the file: connecting alone does not.
            connection.execute("PRAGMA schema_version")
        finally:
            connection.close()
    except (OSError, sqlite3.Error) as error:
        return str(error)
    return None


def _probe_port(uri: str, seconds: float) -> str | None:
    try:
        # A database's password may hold what ends the host of other addresses.
        parts = urlsplit(without_credentials(uri))
        address = (parts.hostname or "localhost", parts.port or _DEFAULT_PORTS[_scheme(uri)])
        socket.create_connection(address, timeout=seconds).close()
    except (OSError, ValueError) as error:
        return str(error)
    return None
