"""Where the artifacts of a store's own database go: below ``mlruns/artifacts``, whatever the database says.

The database may come with somebody else's store, and MLflow writes a run's artifacts to whatever folder or address
stands in its tables, serves files from there, and deletes them. Databases elsewhere, and servers, are the user's own
and say themselves where artifacts go.
"""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from lifelong_moe.errors import one_line
from lifelong_moe.store.pointer import ARTIFACTS
from lifelong_moe.tracking.connection import PROBE_SECONDS, sqlite_path
from lifelong_moe.tracking.spool import RefusedError

READ_SECONDS = 10.0
"""Longest time for reading the locations; a hostile database could make it endless."""

# Experiments that MLflow itself makes have their number as folder.
_FOLDERS = rf"{ARTIFACTS}|[0-9]{{1,20}}"
# A version of an earlier release is a stage.
_MODELS = rf"{_FOLDERS}|stages"
LOCATIONS = {
    ("experiments", "artifact_location"): _FOLDERS,
    ("runs", "artifact_uri"): _FOLDERS,
    ("logged_models", "artifact_location"): _FOLDERS,
    ("trace_tags", "value"): _FOLDERS,
    ("workspaces", "default_artifact_root"): _FOLDERS,
    ("workspaces", "trace_archival_location"): _FOLDERS,
    ("model_versions", "source"): _MODELS,
    ("model_versions", "storage_location"): _MODELS,
}
"""Columns of MLflow's tables that say where files are, and the folders of a store that they may name."""
LOCATION_TAGS = ("mlflow.artifactLocation", "mlflow.trace.archiveLocation")
"""Keys of ``trace_tags`` whose values do so."""
# What computes when it is read or written is none of MLflow's, except for one trigger. The text decides what SQLite
# makes of a row of its schema, not the type that the row states.
_SCHEMA = re.compile(
    r"CREATE (?:TABLE|(?:UNIQUE )?INDEX|TRIGGER prevent_secrets_aad_mutation\s+BEFORE UPDATE ON secrets)\s"
)
# What parsers of addresses drop, or take for an end, is in no path.
_LOCAL = re.compile(r"(?:file://)?(/[^/\x00-\x1f\x7f-\x9f?#][^\x00-\x1f\x7f-\x9f?#]*)")
_TAIL = r"(?:/[\w-][\w.-]*)*"
# MLflow finds the place of these in the tables above.
_REFERENCE = re.compile(r"(?:runs|models):(?:/[\w-][\w.@ -]*)+")


def keep_artifacts_within(uri: str, root: Path) -> None:
    """Require that all files of a store's own database are below the store; those of a store that moved, move too.

    Args:
        uri: Tracking URI.
        root: The ``mlruns/`` directory.

    Raises:
        RefusedError: If it is no database of MLflow's, or names a place that is elsewhere.
        sqlite3.Error, OSError: If the database cannot be read.
    """
    path = own_database(uri, root)
    if path is None:
        return
    # What is not our user's to change may still be read, as long as nothing has to move.
    with closing(sqlite3.connect(path, timeout=READ_SECONDS)) as connection:
        _limit(connection)
        _require_schema(connection)
        for (table, column), folders in LOCATIONS.items():
            outside = _outside(connection, table, column, root)
            moved = [(new, old) for _, old in outside if (new := _moved(str(old), root, folders)) is not None]
            with connection:
                connection.executemany(f"UPDATE {table} SET {column} = ? WHERE {column} = ?", moved)
            for row, location in _outside(connection, table, column, root) if outside else ():
                raise _refusal(f"row {row} of its {table} has the {column}", location, root)


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Context in which a database can be read for a few seconds, but not written.

    Raises:
        sqlite3.Error: If it is none, or another process writes all the while.
    """
    # Read-only, SQLite neither creates a file nor finishes what a killed process was writing.
    address = f"{path.absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(address, uri=True, timeout=PROBE_SECONDS / 2)) as connection:
        _limit(connection)
        yield connection


def _limit(connection: sqlite3.Connection) -> None:
    deadline = time.monotonic() + READ_SECONDS
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 100_000)


def nothing_to_move(path: Path, root: Path) -> bool:
    """Whether :func:`keep_artifacts_within` would leave a store's own database as it is; without MLflow.

    Raises:
        RefusedError, sqlite3.Error: As there.
    """
    with reading(path) as connection:
        _require_schema(connection)
        return not any(_outside(connection, table, column, root) for table, column in LOCATIONS)


def require_within(uri: str, root: Path, location: str) -> None:
    """Require that a place where artifacts are about to be written is below the store, if the store's database says it.

    Args:
        uri: Tracking URI.
        root: The ``mlruns/`` directory.
        location: Folder or address, as MLflow gives it.

    Raises:
        RefusedError: If it is elsewhere.
    """
    if own_database(uri, root) is not None and not _is_within(location, root, _FOLDERS):
        raise _refusal("it keeps artifacts in", location, root)


def own_database(uri: str, root: Path) -> Path | None:
    """The database of a tracking URI if it is part of the store."""
    path = sqlite_path(uri)
    if path is None or not path.is_file():
        return None
    return path if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)) else None


def _require_schema(connection: sqlite3.Connection) -> None:
    """Require a database of MLflow's that holds what stands in its tables, and computes nothing."""
    for name, sql in connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"):
        if _SCHEMA.match(str(sql)) is None:
            raise RefusedError(f"its {one_line(str(name))!r} is neither a table nor an index, and not MLflow's.")
    for table, column in LOCATIONS:
        if not _has(connection, table, column) and table in ("experiments", "runs"):
            raise RefusedError("it is not a database of MLflow's.")
        # SQLite reads what is in an index from there, which need not be what is in the table.
        for _, index, *_ in connection.execute(f"PRAGMA index_list({table})").fetchall():
            named = connection.execute("SELECT 1 FROM pragma_index_xinfo(?) WHERE lower(name) = ?", (index, column))
            if named.fetchone() is not None:
                raise RefusedError(f"its index {one_line(str(index))!r} of {table}.{column} is not MLflow's.")


def _has(connection: sqlite3.Connection, table: str, column: str) -> bool:
    """Whether a database has a column, which those of other versions of MLflow may lack."""
    return column in {str(name).lower() for _, name, *_ in connection.execute(f"PRAGMA table_xinfo({table})")}


def _outside(connection: sqlite3.Connection, table: str, column: str, root: Path) -> list[tuple[int, object]]:
    """Rows of a table whose locations are not below the store, each with its location."""
    if not _has(connection, table, column):
        return []
    only = f"key IN {LOCATION_TAGS}" if column == "value" else f"{column} IS NOT NULL"
    rows = connection.execute(f"SELECT rowid, {column} FROM {table} WHERE {only}")
    return [row for row in rows if not _is_within(str(row[1]), root, LOCATIONS[table, column])]


def _refusal(what: str, location: object, root: Path) -> RefusedError:
    return RefusedError(f"{what} {one_line(str(location))}, which is not below {root / ARTIFACTS}")


def _is_within(location: str, root: Path, folders: str) -> bool:
    if folders == _MODELS and _REFERENCE.fullmatch(location):
        return True
    path = _local(location)
    if path is None:
        return False
    real, store = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    first = real.relative_to(store).parts[:1] if real.is_relative_to(store) else ()
    return bool(first) and re.fullmatch(folders, first[0]) is not None


def _moved(location: str, root: Path, folders: str) -> str | None:
    """The same place in the store as it is now, if a location elsewhere is in a store of another path; else None."""
    path = _local(location)
    if path is None:
        return None
    # MLflow calls its own folder "mlruns" wherever it makes a database.
    found = re.fullmatch(rf"/.+?/(?:mlruns|{re.escape(root.name)})/((?:{folders}){_TAIL})", path)
    return str(root.absolute() / found[1]) if found else None


def _local(location: str) -> str | None:
    """The path of a location on this machine, if everybody who parses it reads the same; None for any other."""
    found = _LOCAL.fullmatch(location)
    if found is None:
        return None
    # As MLflow's `local_file_uri_to_path`, whose import would take seconds.
    theirs = url2pathname(urlparse(location).path if location.startswith("file:") else location)
    return found[1] if os.path.normpath(found[1]) == found[1] == theirs else None
