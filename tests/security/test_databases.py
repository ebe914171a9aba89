"""A `mlflow.db` from somebody else deletes nothing, computes nothing, and leads MLflow nowhere outside of its store."""

from __future__ import annotations

import sqlite3
import struct
from contextlib import closing
from pathlib import Path

import pytest

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.plain_files import require_plain_files
from pipelines.cli import app, exit_code

ROOT = Path("mlruns")
MAGIC = bytes.fromhex("d9d505f920a163d7")
PAGE, SECTOR = 4096, 512


@pytest.fixture(autouse=True)
def database(tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The database of an empty store in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    ROOT.mkdir()
    path = ROOT / "mlflow.db"
    path.write_bytes(template.read_bytes())
    return path


def hot_journal(database: Path, names: Path) -> bytes:
    """A journal that restores nothing, and ends with the name of a super-journal."""
    pages = database.stat().st_size // PAGE
    head = (MAGIC + struct.pack(">5I", 0, 0, pages, SECTOR, PAGE)).ljust(SECTOR, b"\0")
    name = bytes(names)
    page_of_locks = (1 << 30) // PAGE + 1
    return head + struct.pack(">I", page_of_locks) + name + struct.pack(">II", len(name), sum(name)) + MAGIC


@pytest.mark.parametrize("name", ["mlflow.db-journal", "other.db-journal", "MLFLOW.DB-JOURNAL"])
@pytest.mark.parametrize("command", [["sync"], ["status", "tiny"], ["ui", "--no-browser"]])
def test_a_journal_deletes_no_file_that_it_names(
    database: Path, tmp_path: Path, name: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    victim = tmp_path / "precious.txt"
    victim.write_text("thesis")
    journal = database.with_name(name)
    journal.write_bytes(hot_journal(database, victim))
    before = database.read_bytes(), journal.read_bytes()
    assert exit_code(lambda: app(command)) == 7
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"CorruptError: {journal}: opening its database would delete the file that it names")
    assert (database.read_bytes(), journal.read_bytes(), victim.read_text()) == (*before, "thesis")
    # SQLite itself would have deleted it.
    journal.rename(database.with_name("mlflow.db-journal"))
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA schema_version")
    assert not victim.exists()


def test_the_journal_of_a_killed_process_restores_its_database(database: Path) -> None:
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN")
        connection.execute("UPDATE experiments SET name = 'half'")
        connection.execute("CREATE TABLE large AS SELECT zeroblob(100000)")
        copies = {path.name: path.read_bytes() for path in ROOT.iterdir()}
    for name, content in copies.items():
        (ROOT / name).write_bytes(content)
    assert "mlflow.db-journal" in copies and b"half" in copies["mlflow.db"]
    require_plain_files(ROOT)
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT name FROM experiments").fetchall() == [("Default",)]


@pytest.mark.parametrize("content", [b"", b"x", MAGIC[1:], MAGIC + b"x"])
def test_what_only_resembles_such_a_journal_is_left_alone(content: bytes) -> None:
    (ROOT / "x-journal").write_bytes(content)
    require_plain_files(ROOT)
    (ROOT / "x-journal").write_bytes(content + MAGIC)
    with pytest.raises(CorruptError):
        require_plain_files(ROOT)
