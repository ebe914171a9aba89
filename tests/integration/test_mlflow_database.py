"""MLflow's SQLite database comes into being whole: with several processes at once, and whatever kills one."""

from __future__ import annotations

import shutil
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from lifelong_moe.config.tracking import TrackingConfig
from lifelong_moe.storage import files
from lifelong_moe.tracking.sync import sync
from lifelong_moe.tracking.tracker import Tracker
from tests.tiny import fork, kill_self

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a fork does not survive once CUDA is there")
ROOT = Path("mlruns")


def record(name: str) -> str | None:
    """Record a run in the current directory; returns what was wrong."""
    tracker = Tracker.connect(TrackingConfig(), ROOT)
    tracker.finish(tracker.start_run(name))
    return tracker.problem


def left_by_sync() -> str | None:
    (outcome,) = sync(ROOT)
    return outcome.problem


def said(action: Callable[[], Any]) -> str:
    """What a process of its own printed last."""
    child = fork(action)
    assert child.wait() == 0, child.output
    return child.output.splitlines()[-1]


def shown() -> list[str]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{ROOT.absolute()}/mlflow.db")
    experiment = client.get_experiment_by_name("lifelong-moe")
    assert experiment is not None
    return sorted(run.info.run_name for run in client.search_runs([experiment.experiment_id]))


def left() -> set[str]:
    """Files beside the database."""
    return {path.name for path in ROOT.iterdir() if path.is_file()}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # template: MLflow is imported
    monkeypatch.chdir(tmp_path)


def test_three_at_once_in_a_new_folder() -> None:
    children = [fork(lambda name=name: record(name)) for name in ("a", "b", "c")]  # type: ignore[misc]
    for child in children:
        assert child.wait() == 0, child.output
        assert child.output.splitlines()[-1] == "None", child.output
    assert shown() == ["a", "b", "c"]
    assert left() == {"mlflow.db", ".mlflow.db.lock"}


def killed_in_a_migration() -> None:
    """With the first schema's tables there: what MLflow can never open again."""
    import mlflow.store.db.utils

    mlflow.store.db.utils._upgrade_db = lambda engine: kill_self()


def killed_before_the_rename() -> None:
    files.rename = lambda *paths: kill_self()


def killed_after_the_rename() -> None:
    original = files.rename

    def replace(*paths: Any) -> None:
        original(*paths)
        kill_self()

    files.rename = replace


@pytest.mark.parametrize("prepare", [killed_in_a_migration, killed_before_the_rename, killed_after_the_rename])
def test_a_kill_leaves_nothing_that_the_next_start_cannot_use(prepare: Any) -> None:
    def killed() -> None:
        prepare()
        record("killed")

    child = fork(killed)
    assert child.wait() == -signal.SIGKILL, child.output
    assert (ROOT / "mlflow.db").exists() == (prepare is killed_after_the_rename)
    assert record("next") is None
    assert shown() == ["next"]
    assert left() == {"mlflow.db", ".mlflow.db.lock"}


def test_only_its_making_does_not_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is nobody's yet is synced once, and what is recorded in it later with each transaction."""
    import mlflow.store.db.utils as mlflow_utils
    from sqlalchemy import Engine

    def synchronous(engine: Engine) -> int:
        with closing(engine.raw_connection()) as connection:
            return int(connection.cursor().execute("PRAGMA synchronous").fetchone()[0])

    made, upgrade = list[int](), mlflow_utils._upgrade_db
    monkeypatch.setattr(mlflow_utils, "_upgrade_db", lambda engine: (made.append(synchronous(engine)), upgrade(engine)))
    assert record("a") is None
    assert made == [0]
    assert synchronous(mlflow_utils.create_sqlalchemy_engine(f"sqlite:///{ROOT.absolute()}/mlflow.db")) == 2


def test_what_connects_elsewhere_meanwhile_waits_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread of the process may have a database of its own, of any kind."""
    import mlflow.store.db.utils as mlflow_utils
    from sqlalchemy import create_engine, text

    found, upgrade = list[Any](), mlflow_utils._upgrade_db

    def connecting(engine: Any) -> None:
        for place in ("elsewhere.db", ":memory:"):
            other = create_engine(f"sqlite:///{place}")
            with other.connect() as connection:
                found.append(connection.execute(text("PRAGMA synchronous")).scalar())
            other.dispose()
        upgrade(engine)

    monkeypatch.setattr(mlflow_utils, "_upgrade_db", connecting)
    assert record("a") is None
    assert found == [2, 2]


def test_an_empty_file_is_no_database() -> None:
    ROOT.mkdir()
    (ROOT / "mlflow.db").touch()  # SQLite leaves one where it was opened and nothing was written
    assert record("a") is None and shown() == ["a"]


def half_made(template: Path) -> None:
    """As an interrupted migration leaves it."""
    with closing(sqlite3.connect(ROOT / "mlflow.db")) as connection:
        connection.execute("CREATE TABLE experiments (experiment_id INTEGER)")


def foreign(template: Path) -> None:
    """With a schema that this MLflow does not know: Alembic's own error."""
    shutil.copy(template, ROOT / "mlflow.db")
    with closing(sqlite3.connect(ROOT / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
        connection.execute("DROP TABLE logged_models")


def damaged(template: Path) -> None:
    (ROOT / "mlflow.db").write_text("not a database " * 100)


@pytest.mark.parametrize("make", [half_made, foreign, damaged])
def test_an_unusable_database_is_said_with_what_helps(template: Path, make: Any) -> None:
    ROOT.mkdir()
    make(template)
    remedy = f"move {ROOT.absolute()}/mlflow.db away"
    for action in (lambda: record("a"), left_by_sync):
        problem = said(action)  # a process of its own, for SQLite holds open what was opened once
        assert remedy in problem
    (ROOT / "mlflow.db").rename("elsewhere.db")
    assert said(left_by_sync) == "None"  # the remedy helps: a new database gets what was kept
    assert shown() == ["a"]
