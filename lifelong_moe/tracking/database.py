"""MLflow's SQLite database, made whole or not at all."""

from __future__ import annotations

import os
import time
from pathlib import Path

from lifelong_moe.tracking.connection import sqlite_path
from lifelong_moe.tracking.lock import waiting_for

CREATE_SECONDS = 120.0
"""Longest wait for another process that creates the database; creating one takes about 2 s."""


def ensure_database(uri: str, root: Path) -> None:
    """Create the SQLite database of a tracking URI unless it is there; other stores are left alone.

    MLflow migrates a new database in place, through some fifty schemas: a kill in there, or a second process, leaves
    one that no MLflow ever opens again. So it is made beside, by one process at a time, and renamed.

    Args:
        uri: Tracking URI.
        root: The ``mlruns/`` directory, under which artifacts of MLflow's own default experiment would go.

    Raises:
        TimeoutError: If another process holds the lock all the while.
    """
    path = sqlite_path(uri)
    if path is None or exists(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with waiting_for(path.with_name(f".{path.name}.lock"), time.monotonic() + CREATE_SECONDS):
        if not exists(path):
            _create(path, root)


def exists(path: Path) -> bool:
    """Whether there is a database; SQLite leaves an empty file where it was opened and nothing was written."""
    return path.is_file() and path.stat().st_size > 0


def _create(path: Path, root: Path) -> None:
    """Create a database; the lock is held, so the temporary name is ours, and what is there a kill has left."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    tmp = path.with_name(f".tmp-{path.name}")
    for left in path.parent.glob(f"{tmp.name}*"):  # SQLite's journal, too
        left.unlink()
    store = SqlAlchemyStore(f"sqlite:///{tmp.absolute()}", str(root.absolute() / "artifacts"))
    store.engine.dispose()
    with tmp.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(tmp, path)
