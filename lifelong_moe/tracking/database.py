"""MLflow's SQLite database: created atomically, and asked without MLflow what it holds.

Importing MLflow takes longer than a command that has nothing to record, which only asks whether all is still there.
"""

from __future__ import annotations

import re
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lifelong_moe.storage.files import new_file
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.storage.locks import locked_when_free
from lifelong_moe.tracking.connection import sqlite_path
from lifelong_moe.tracking.locations import nothing_to_move, own_database, reading
from lifelong_moe.tracking.pages.views import RUNS
from lifelong_moe.tracking.registry import MODELS, STAGE_KEY_TAG, registered_name
from lifelong_moe.tracking.spool import RefusedError

CREATE_SECONDS = 120.0
"""Longest wait for another process that creates the database; creating one takes about 2 s."""
LOCAL_ID_TAG = "lifelong.local_id"
"""Tag of every run: the id by which its caller knew it before MLflow gave it one."""
EXPERIMENT_TAGS = {
    # By this MLflow's page opens on model training and not on its side for agents.
    "mlflow.experimentKind": "custom_model_development",
    **RUNS.tags,
}
_BY_ID = """
SELECT run_uuid, runs.experiment_id, status FROM runs
WHERE run_uuid = ? AND lifecycle_stage = 'active'
"""
_BY_LOCAL_ID = f"""
SELECT runs.run_uuid, runs.experiment_id, status FROM runs
JOIN tags ON tags.run_uuid = runs.run_uuid
JOIN experiments ON experiments.experiment_id = runs.experiment_id
WHERE tags.key = '{LOCAL_ID_TAG}' AND tags.value = ?
AND runs.lifecycle_stage = 'active' AND experiments.lifecycle_stage = 'active'
"""
_VERSIONS = f"""
SELECT CAST(versions.version AS INTEGER), versions.source FROM model_versions AS versions
JOIN model_version_tags AS tags ON tags.name = versions.name AND tags.version = versions.version
WHERE versions.name = ? AND tags.key = '{STAGE_KEY_TAG}' AND tags.value = ?
AND versions.current_stage <> 'Deleted_Internal'
"""


@dataclass(frozen=True)
class RecordedRun:
    """A run as MLflow's database has it."""

    run_id: str
    experiment_id: str
    finished: bool


@dataclass(frozen=True)
class Recorded:
    """What a store's own database holds; get one by :func:`recorded`.

    An answer None means that only MLflow can tell.
    """

    path: Path
    experiment_id: str
    """Of the experiment that was asked for."""

    def find(self, run_id: str) -> RecordedRun | None:
        """A run that is not deleted, by MLflow's id or the local id that it had before."""
        try:
            with reading(self.path) as connection:
                rows = connection.execute(_BY_ID, (run_id,)).fetchall()
                rows = rows or connection.execute(_BY_LOCAL_ID, (run_id,)).fetchmany(2)
        except sqlite3.Error:
            return None
        if len(rows) != 1 or re.fullmatch(r"[\w-]+", str(rows[0][0])) is None:
            return None
        return RecordedRun(str(rows[0][0]), str(rows[0][1]), rows[0][2] == "FINISHED")

    def version_with_alias(self, name: str, stage_key: str, alias: str) -> str | None:
        """The number of a stage's version of a model, if that version has the alias.

        Args:
            name: Registered model.
            stage_key: Of the stage.
            alias: Such as ``champion``.
        """
        model = registered_name(name)
        try:
            with reading(self.path) as connection:
                aliases = connection.execute(
                    "SELECT CAST(version AS INTEGER) FROM registered_model_aliases WHERE name = ? AND alias = ?",
                    (model, alias),
                ).fetchall()
                rows = connection.execute(_VERSIONS, (model, stage_key)).fetchall()
        except sqlite3.Error:
            return None
        # Those of earlier releases pointed at the stage itself, and are registered again.
        ours = [version for version, source in rows if _is_model_of(stage_key, str(source))]
        return str(aliases[0][0]) if ours and aliases == [(min(ours),)] else None


def _is_model_of(stage_key: str, source: str) -> bool:
    """Whether a version's source is a model's folder, not a stage."""
    path = PurePosixPath(source)
    return path.parent.name == MODELS and path.name.endswith(f"-{stage_key[:SHORT]}")


def recorded(uri: str, root: Path, experiment: str) -> Recorded | None:
    """What a store's own database holds, if MLflow would open it and change nothing; else None.

    Args:
        uri: Tracking URI.
        root: The ``mlruns/`` directory.
        experiment: Name of the experiment, which must be there and carry our tags.
    """
    path = own_database(uri, root)
    # Whatever is wrong is told when MLflow opens it.
    try:
        if path is None or not nothing_to_move(path, root):
            return None
        with reading(path) as connection:
            rows = connection.execute(
                "SELECT experiment_id, lifecycle_stage FROM experiments WHERE name = ?", (experiment,)
            ).fetchall()
            if len(rows) != 1 or rows[0][1] != "active":
                return None
            tags = connection.execute("SELECT key FROM experiment_tags WHERE experiment_id = ?", (rows[0][0],))
            return Recorded(path, str(rows[0][0])) if {key for (key,) in tags} >= set(EXPERIMENT_TAGS) else None
    except (OSError, sqlite3.Error, RefusedError):
        return None


def ensure_database(uri: str, root: Path) -> None:
    """Create the SQLite database of a tracking URI if it is absent; other stores are left alone.

    Args:
        uri: Tracking URI.
        root: The ``mlruns/`` directory, under which artifacts of MLflow's own default experiment would go.

    Raises:
        TimeoutError: If another process holds the lock all the while.
    """
    path = sqlite_path(uri)
    if path is None or exists(path):
        return
    # MLflow migrates a new database in place, through some fifty schemas: a kill or a second process in the middle
    # leaves one that no MLflow ever opens again. So one process at a time makes it aside and renames it.
    with locked_when_free(path.with_name(f".{path.name}.lock"), time.monotonic() + CREATE_SECONDS):
        if not exists(path):
            _create(path, root)


def exists(path: Path) -> bool:
    """Whether there is a database."""
    # SQLite leaves an empty file where it was opened without a write.
    return path.is_file() and path.stat().st_size > 0


def _create(path: Path, root: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import Engine, event

    with new_file(path) as work:

        def unsynced(connection: Any, _: object) -> None:
            # Some hundred transactions would each wait for the disk, for a file that is nobody's before it is whole.
            # All engines of the process are listened to: another thread may connect to a database of its own.
            if isinstance(connection, sqlite3.Connection) and _is_of(connection, work):
                for pragma in ("synchronous = OFF", "journal_mode = MEMORY"):
                    connection.execute(f"PRAGMA {pragma}").close()

        event.listen(Engine, "connect", unsynced)
        try:
            store = SqlAlchemyStore(f"sqlite:///{work.absolute()}", str(root.absolute() / "artifacts"))
        finally:
            event.remove(Engine, "connect", unsynced)
        store.engine.dispose()  # Closes the file before it is renamed.


def _is_of(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether a connection is to the database of a file."""
    with closing(connection.execute("PRAGMA database_list")) as found:
        name = found.fetchone()[2]
    return bool(name) and path.exists() and path.samefile(name)
