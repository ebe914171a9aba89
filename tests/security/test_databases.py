"""A `mlflow.db` from somebody else deletes nothing, computes nothing, and leads MLflow nowhere outside of its store."""

from __future__ import annotations

import re
import shutil
import sqlite3
import struct
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lifelong_moe.errors import CorruptError
from lifelong_moe.storage.plain_files import require_plain_files
from lifelong_moe.tracking.connection import local_uri
from lifelong_moe.tracking.locations import LOCATION_TAGS, LOCATIONS, keep_artifacts_within, require_within
from lifelong_moe.tracking.spool import RefusedError
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


def execute(*statements: str, values: tuple[Any, ...] = ()) -> list[Any]:
    with closing(sqlite3.connect(ROOT / "mlflow.db")) as connection, connection:
        connection.execute("PRAGMA writable_schema = ON")
        return [connection.execute(statement, values).fetchall() for statement in statements][-1]


def problem() -> str:
    """Why the database is not used."""
    try:
        keep_artifacts_within(local_uri(ROOT), ROOT)
    except (RefusedError, sqlite3.Error) as error:
        return str(error)
    return ""


ROWS = {
    ("experiments", "artifact_location"): "experiments (name, artifact_location) VALUES ('x', ?)",
    ("runs", "artifact_uri"): "runs (run_uuid, experiment_id, artifact_uri) VALUES ('r', 0, ?)",
    ("logged_models", "artifact_location"): "logged_models (model_id, experiment_id, name, creation_timestamp_ms, "
    "last_updated_timestamp_ms, status, lifecycle_stage, artifact_location) VALUES ('m', 0, 'm', 0, 0, 0, 'active', ?)",
    ("trace_tags", "value"): "trace_tags (request_id, key, value) VALUES ('t', 'mlflow.artifactLocation', ?)",
    ("workspaces", "default_artifact_root"): "workspaces (name, default_artifact_root) VALUES ('w', ?)",
    ("workspaces", "trace_archival_location"): "workspaces (name, trace_archival_location) VALUES ('w', ?)",
    ("model_versions", "source"): "model_versions (name, version, source) VALUES ('m', 1, ?)",
    ("model_versions", "storage_location"): "model_versions (name, version, storage_location) VALUES ('m', 1, ?)",
}  # fmt: skip


@pytest.mark.parametrize(("table", "column"), LOCATIONS)
def test_no_row_leads_out_of_the_store(
    table: str, column: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    insert = f"INSERT INTO {ROWS[table, column]}"
    execute(insert, values=(f"{ROOT.absolute()}/artifacts/1",))
    assert problem() == ""
    execute(f"UPDATE {table} SET {column} = ?", values=(str(tmp_path / "outside"),))
    assert exit_code(lambda: app(["ui", "--no-browser"])) == 7
    (line,) = capsys.readouterr().err.splitlines()
    told = f"row [0-9]+ of its {table} has the {column} {tmp_path}/outside, which is not below mlruns/artifacts"
    assert re.search(told, line)


def test_tags_of_traces_that_are_no_locations_say_what_they_like() -> None:
    execute("INSERT INTO trace_tags (request_id, key, value) VALUES ('t', 'note', '/etc/passwd')")
    assert problem() == ""
    execute("UPDATE trace_tags SET key = 'mlflow.trace.archiveLocation'")
    assert "/etc/passwd, which is not below" in problem()


NO_LOCATIONS = {
    ("datasets", "dataset_source"),
    ("evaluation_dataset_records", "source"),
    ("mcp_server_versions", "source"),
    ("mcp_access_endpoints", "url"),
    ("model_versions", "run_link"),
    ("runs", "source_name"),
    ("webhooks", "url"),  # which nobody calls: see test_tracking
}
"""Columns that resemble locations, but are only shown."""
RESEMBLES = re.compile(r"location|ur[il]|link|path|dir|folder|root(?!_causes)|artifact|storage|source|file(?!$)")


def test_every_location_of_the_installed_mlflow_is_known() -> None:
    from mlflow.utils import mlflow_tags

    columns = set(
        execute("SELECT m.name, x.name FROM sqlite_master m, pragma_table_xinfo(m.name) x WHERE m.type = 'table'")
    )
    assert columns >= set(LOCATIONS) and columns >= NO_LOCATIONS
    like = {(table, column) for table, column in columns if RESEMBLES.search(column)}
    like = {one for one in like if not one[1].endswith(("_id", "_type", "_version"))}
    assert like - NO_LOCATIONS == set(LOCATIONS) - {("trace_tags", "value")}
    tags = {value for name, value in vars(mlflow_tags).items() if name.endswith("_LOCATION")}
    assert tags - {"mlflow.trace.spansLocation"} == set(LOCATION_TAGS)  # that one says in which of two stores


SPELLINGS = [
    "{out}", "file://{out}", "file:{out}", "File://{out}", "//{out}", "//[::1", "file://[x", "///{out}",
    "{out}/.\t./.\t./{name}/mlruns/artifacts", "file:{out}/.\t./.\t./{name}/mlruns/artifacts",
    " {inn}", "\t{inn}", "\x01{inn}", "{inn}\n", "fi\tle://{inn}", "FILE://{inn}", "File:{inn}", "file://host{inn}",
    "{inn}/../../out", "{inn}/./x", "{inn}//x", "{inn}/", "{inn}/%2e%2e/%2e%2e/out", "{inn}%00", "{inn}\0",
    "{inn}\x85x", "{inn}?x", "{inn}#x",
    "{inn}/%41", "", "mlruns/artifacts", "runs:/a", "mlflow-artifacts:/1", "{inn}/..", "//{inn}",
    "s3://bucket{inn}", "http://host{inn}", "{inn}s", "{store}", "{store}/mlflow.db", "{store}/stages", "/",
]  # fmt: skip


@pytest.mark.parametrize("form", SPELLINGS)
def test_a_place_has_one_spelling(form: str, tmp_path: Path) -> None:
    inside = ROOT.absolute() / "artifacts"
    location = form.format(out=tmp_path / "out", inn=inside, store=ROOT.absolute(), name=tmp_path.name)
    with pytest.raises(RefusedError, match=r"it keeps artifacts in .*, which is not below mlruns/artifacts"):
        require_within(local_uri(ROOT), ROOT, location)
    execute("UPDATE experiments SET artifact_location = ?", values=(location,))
    assert "which is not below mlruns/artifacts" in problem()


@pytest.mark.parametrize("folder", ["work", "ä b", "100% – 日本　語", "a:b;c", "[x]", "\\"])
@pytest.mark.parametrize("form", ["{}", "file://{}", "{}/1/0123/artifacts"])
def test_what_passes_is_where_mlflow_goes(
    folder: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.utils.uri import append_to_uri_path

    shutil.copytree(ROOT, tmp_path / folder / "mlruns")
    monkeypatch.chdir(tmp_path / folder)
    location = form.format(ROOT.absolute() / "artifacts")
    require_within(local_uri(ROOT), ROOT, location)
    for goes in (location, append_to_uri_path(location, "run", "artifacts")):
        there = Path(str(get_artifact_repository(goes)._artifact_dir))  # type: ignore[attr-defined]
        assert there.is_relative_to(ROOT.absolute() / "artifacts")


@pytest.mark.parametrize("source", ["runs:/0123/stages/a", "models:/m-1", "models:/a b/1", "{}/stages/01-fruit-0123"])
def test_models_may_be_stages_and_runs(source: str) -> None:
    execute(f"INSERT INTO {ROWS['model_versions', 'source']}", values=(source.format(ROOT.absolute()),))
    assert problem() == ""


@pytest.mark.parametrize(
    "source",
    [
        "runs:/a/../../b", "runs://host/a", "runs:/a/%2e%2e", "models:/", "models:/a/..", "runs:/a?x", "http://h/x",
        "{}/mlflow.db", "mlflow-artifacts:/x", "s3://b/x", "{}/spool", "/stages/x",
    ],
)  # fmt: skip
def test_models_are_nowhere_else(source: str) -> None:
    execute(f"INSERT INTO {ROWS['model_versions', 'storage_location']}", values=(source.format(ROOT.absolute()),))
    assert "which is not below mlruns/artifacts" in problem()


def test_what_a_store_has_moves_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for insert in ROWS.values():
        folder = "stages/01-fruit-0123" if "model_versions" in insert else "artifacts/1/ab/artifacts"
        execute(f"INSERT OR IGNORE INTO {insert}", values=(f"{ROOT.absolute()}/{folder}",))
    shutil.copytree(ROOT, tmp_path / "copy/mlruns")
    monkeypatch.chdir(tmp_path / "copy")
    assert problem() == ""
    for table, column in LOCATIONS:
        rows = execute(f"SELECT {column} FROM {table} WHERE {column} LIKE '/%'")
        assert all(str(location).startswith(f"{tmp_path}/copy/mlruns/") for (location,) in rows)


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


@pytest.mark.parametrize(
    "statements",
    [
        [f"CREATE TRIGGER slow AFTER INSERT ON tags BEGIN {ENDLESS}; END"],
        ["CREATE TRIGGER prevent_secrets_aad_mutation2 BEFORE UPDATE ON secrets BEGIN SELECT 1; END"],
        ["ALTER TABLE tags RENAME TO t", f"CREATE VIEW tags AS {ENDLESS}"],
        ["CREATE VIEW mine AS SELECT 1"],
        ["CREATE VIRTUAL TABLE words USING fts5(x)"],
        [
            "CREATE TRIGGER slow AFTER INSERT ON tags BEGIN SELECT 1; END",
            "UPDATE sqlite_master SET type = 'table', name = 'x', rootpage = 5 WHERE name = 'slow'",
        ],
    ],
)  # fmt: skip
def test_a_database_computes_nothing(statements: list[str]) -> None:
    execute(*statements)
    told = problem()
    assert "is neither a table nor an index, and not MLflow's" in told or "malformed" in told


@pytest.mark.parametrize("statement", ["DROP TABLE runs", "ALTER TABLE experiments RENAME artifact_location TO x"])
def test_a_database_of_another_program_is_not_used(statement: str) -> None:
    execute("PRAGMA foreign_keys = OFF", statement)
    assert "it is not a database of MLflow's" in problem()


def test_an_index_does_not_speak_for_its_table(tmp_path: Path) -> None:
    """SQLite reads a column from an index that has it, and does not ask whether both say the same."""
    execute(f"INSERT INTO {ROWS['runs', 'artifact_uri']}", values=(f"{ROOT.absolute()}/artifacts",))
    execute("CREATE INDEX mild ON runs (artifact_uri)")
    (row,) = execute("SELECT type, name, tbl_name, rootpage, sql FROM sqlite_master WHERE name = 'mild'")
    execute("DELETE FROM sqlite_master WHERE name = 'mild'")
    execute("UPDATE runs SET artifact_uri = ?", values=(str(tmp_path / "outside"),))
    execute("INSERT INTO sqlite_master VALUES (?, ?, ?, ?, ?)", values=row)
    assert execute("SELECT artifact_uri FROM runs") == [(f"{ROOT.absolute()}/artifacts",)]
    assert "its index 'mild' of runs.artifact_uri is not MLflow's" in problem()


def test_names_of_tables_have_no_case(tmp_path: Path) -> None:
    execute(f"INSERT INTO {ROWS['model_versions', 'source']}", values=(str(tmp_path / "outside"),))
    execute("ALTER TABLE model_versions RENAME TO t", "ALTER TABLE t RENAME TO Model_Versions")
    execute("ALTER TABLE Model_Versions RENAME source TO SOURCE")
    assert "row 1 of its model_versions has the source" in problem()
