"""Where the artifacts of a store's own database go: below ``mlruns/artifacts``, whatever the database says.

The database may come with somebody else's store, and MLflow writes a run's artifacts to whatever folder or address
stands in its tables, and fetches models from there. Databases elsewhere, and servers, are the user's own and say
themselves where artifacts go.
"""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lifelong_moe.redaction import without_credentials
from lifelong_moe.tracking.connection import sqlite_path
from lifelong_moe.tracking.spool import RefusedError

ARTIFACTS = "artifacts"
READ_SECONDS = 10.0
"""Longest time for reading the locations; a hostile database could make it endless."""
_MODELS = (
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
)
"""From where MLflow's server fetches what a browser asks of a model, with this user's credentials."""
# Ids of runs and experiments, as MLflow makes them; "artifacts" ends a run's folder.
_TAIL = re.compile(r"(?:/\w+)*")


def keep_artifacts_within(uri: str, root: Path) -> None:
    """Require that all artifacts of a store's own database are below the store; those of a store that moved, move too.

    Args:
        uri: Tracking URI.
        root: The ``mlruns/`` directory.

    Raises:
        RefusedError: If a run keeps its artifacts elsewhere or a model at another address.
        sqlite3.Error, OSError: If the database cannot be read.
    """
    path = own_database(uri, root)
    if path is None:
        return
    # What is not our user's to change may still be read, as long as nothing has to move.
    with closing(sqlite3.connect(path, timeout=READ_SECONDS)) as connection:
        deadline = time.monotonic() + READ_SECONDS
        connection.set_progress_handler(lambda: time.monotonic() > deadline, 100_000)
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not {"experiments", "runs"} <= tables:
            return  # no database of MLflow's, which it says itself
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            found = connection.execute(f"SELECT DISTINCT {column} FROM {table}")
            moved = {old: new for (old,) in found if old and (new := _moved(str(old), root)) is not None}
            with connection:
                connection.executemany(
                    f"UPDATE {table} SET {column} = ? WHERE {column} = ?", [(new, old) for old, new in moved.items()]
                )
        used = "SELECT artifact_location FROM experiments WHERE experiment_id IN (SELECT experiment_id FROM runs)"
        _require_all((str(one) for (one,) in connection.execute(f"{used} UNION SELECT artifact_uri FROM runs")), root)
        for table, column in _MODELS:
            if table in tables:
                _require_no_address(str(one) for (one,) in connection.execute(f"SELECT DISTINCT {column} FROM {table}"))


def require_within(uri: str, root: Path, location: str) -> None:
    """Require that a place where artifacts are about to be written is below the store, if the store's database says it.

    Args:
        uri: Tracking URI.
        root: The ``mlruns/`` directory.
        location: Folder or address, as MLflow gives it.

    Raises:
        RefusedError: If it is elsewhere.
    """
    if own_database(uri, root) is not None:
        _require_all([location], root)


def _require_all(locations: Iterable[str], root: Path) -> None:
    for location in locations:
        if not _is_within(location, root):
            raise RefusedError(f"it keeps artifacts in {location}, which is not below {root / ARTIFACTS}")


def _require_no_address(locations: Iterable[str]) -> None:
    """Require that models are in files or artifacts of this store, to which no request goes."""
    for location in locations:
        parts = urlsplit(location)
        if parts.scheme not in ("", "file", "runs", "models", "mlflow-artifacts") or parts.netloc:
            raise RefusedError(f"it keeps a model at another address, {without_credentials(location)}")


def own_database(uri: str, root: Path) -> Path | None:
    """The database of a tracking URI if it is part of the store."""
    path = sqlite_path(uri)
    if path is None or not path.is_file():
        return None
    return path if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)) else None


def _is_within(location: str, root: Path) -> bool:
    path = _local(location)
    if path is None:
        return False
    # MLflow decodes some locations and not others: both must be within.
    for spelled in {path, unquote(path)}:
        real, store = Path(os.path.realpath(spelled)), Path(os.path.realpath(root))
        # Experiments that MLflow itself makes have their number as folder.
        parts = real.relative_to(store).parts if real.is_relative_to(store) else ()
        if not parts or not (parts[0] == ARTIFACTS or re.fullmatch(r"\d{1,20}", parts[0])):
            return False
    return True


def _moved(location: str, root: Path) -> str | None:
    """The same place in the store as it is now, if a location is in a store of another path; else None."""
    path = _local(location)
    if path is None or _is_within(location, root):
        return None
    before, found, tail = path.partition(f"/{root.name}/{ARTIFACTS}")
    return f"{root.absolute() / ARTIFACTS}{tail}" if found and before and _TAIL.fullmatch(tail) else None


def _local(location: str) -> str | None:
    """The path of a location on this machine; None for any other."""
    parts = urlsplit(location)
    if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        return None
    return parts.path if parts.path.startswith("/") else None
