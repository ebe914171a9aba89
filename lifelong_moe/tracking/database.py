"""Create MLflow's SQLite database atomically."""

from __future__ import annotations

import time
from pathlib import Path

from lifelong_moe.storage.files import new_file
from lifelong_moe.storage.locks import locked_when_free
from lifelong_moe.tracking.connection import sqlite_path

CREATE_SECONDS = 120.0
"""Longest wait for another process that creates the database; creating one takes about 2 s."""


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

    with new_file(path) as work:
        store = SqlAlchemyStore(f"sqlite:///{work.absolute()}", str(root.absolute() / "artifacts"))
        store.engine.dispose()  # Closes the file before it is renamed.
