"""Commands import what they need and no more; asked in other processes, since this one has it all."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cli import app, exit_code
from tests.known_stages import use_known_stages
from tests.tiny import working_in

pytestmark = pytest.mark.xdist_group("at once")  # one process trains and records what most of them ask about

HEAVY = (
    "torch", "torch._dynamo", "lightning", "pytorch_lightning", "mlflow", "sqlalchemy", "faiss", "sklearn",
    "scipy", "scipy.stats", "sympy",
    "scipy.sparse", "transformers", "datasets", "tokenizers", "matplotlib", "pandas", "pyarrow",
)  # fmt: skip
ASK = """
import contextlib, io, json, sys
from pipelines.cli import app, exit_code
answers = []
commands, heavy_names = map(json.loads, sys.argv[1:])
for arguments in commands:
    sys.argv = ["lifelong-moe", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = exit_code(app)
    heavy = sorted(set(sys.modules) & set(heavy_names))
    answers.append({"code": code, "out": out.getvalue(), "err": err.getvalue(), "heavy": heavy})
print(json.dumps(answers))
"""


def ask(*commands: tuple[str, ...]) -> list[dict[str, Any]]:
    """Several commands in one new process: each one's code and output, and the heavy packages imported by then."""
    command = [sys.executable, "-c", ASK, json.dumps(commands), json.dumps(HEAVY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def test_questions_about_runs(trained: Path) -> None:
    text = json.loads(Path("fruit.jsonl").read_text().splitlines()[0])["text"]
    commands = (
        ("runs",),
        ("status", "tiny"),
        ("report", "tiny", "naive", "--json"),
        ("lineage", "tiny"),
        ("lineage", "tiny", "--expert", "fruit/L0/E0"),
        ("lineage", "tiny", "--document", hashlib.sha256(text.encode()).hexdigest()),
        ("gc",),
        ("sync",),
    )
    answers = ask(*commands)
    assert [answer["code"] for answer in answers] == [0] * len(commands), answers
    assert [answer["heavy"] for answer in answers] == [[]] * len(commands)


def test_a_first_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes").mkdir()
    for number in range(12):
        Path("notes", f"{number}.md").write_text(f"{number} is a text that is long enough\n" * 9, encoding="utf-8")
    (answer,) = ask(("init", "notes"))
    # It reads the text as `plan` will, so that what it writes can be planned; torch is not needed for that.
    assert (answer["code"], answer["heavy"]) == (0, ["tokenizers"]), answer


@pytest.mark.parametrize(
    ("command", "needs"),
    [
        ("evaluate tiny --data sea.jsonl", ["tokenizers"]),
        ("generate tiny apple --max-new-tokens 1", ["tokenizers"]),
    ],
)
def test_what_trains_nothing_needs_torch_alone(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, needs: list[str]
) -> None:
    shutil.copytree(trained, tmp_path / "lab")
    monkeypatch.chdir(tmp_path / "lab")
    (answer,) = ask(tuple(command.split()))
    # Lightning with all that it imports takes longer than torch, and a finished run needs none of it.
    assert answer["code"] == 0 and answer["heavy"] == sorted(["torch", *needs]), answer


def test_a_finished_run_does_without_torch(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(trained, tmp_path / "lab")
    monkeypatch.chdir(tmp_path / "lab")
    # Its text is as it was, so that not even near copies are looked for.
    (answer,) = ask(("run", "tiny.yaml"))
    assert answer["code"] == 0 and answer["heavy"] == ["tokenizers"], answer


MLFLOW = Path("mlruns/mlflow.db")
RUN, COMPARE = ("run", "tiny.yaml"), ("compare", "compare.yaml")
ALIAS = "SELECT name, alias FROM registered_model_aliases"
VERSION = "SELECT version FROM registered_model_aliases"
UNFINISHED = "SELECT name FROM runs WHERE status <> 'FINISHED' AND lifecycle_stage = 'active'"
PARENTS = "SELECT name FROM runs WHERE lifecycle_stage = 'active' AND name IN ('tiny', 'c') ORDER BY name"


def execute(*statements: str) -> list[Any]:
    """The rows of the last statement to MLflow's database."""
    with closing(sqlite3.connect(MLFLOW)) as connection, connection:
        return [connection.execute(one).fetchall() for one in statements][-1]


def recorded(*command: str) -> int:
    """Carry out a command in this process, which has MLflow already; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lifelong-moe", *command])
        return exit_code(app)


@pytest.fixture(scope="module")
def tracked_once(trained_once: Path, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which a run and a comparison are finished, and recorded in the store's own database."""
    root = tmp_path_factory.mktemp("tracked") / "lab"
    shutil.copytree(trained_once, root)
    shutil.copy(template, root / MLFLOW)
    with working_in(root) as patch:
        use_known_stages(patch, tmp_path_factory)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        config = yaml.safe_load(Path("tiny.yaml").read_text())
        Path("tiny.yaml").write_text(yaml.safe_dump(config | {"tracking": {"enabled": True}}))
        arms = {"ours": [], "naive": ["method=sequential"]}
        Path("compare.yaml").write_text(yaml.safe_dump({"compare": "c", "base": "tiny.yaml", "arms": arms}))
        assert [recorded(*command) for command in (RUN, COMPARE)] == [0, 0]
        assert execute(ALIAS) == [("lifelong-moe.tiny", "champion")] and execute(PARENTS) == [("c",), ("tiny",)]
    return root


@pytest.mark.parametrize("command", [RUN, COMPARE])
def test_what_is_recorded_is_found_without_mlflow(
    tracked_once: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tracked_once)
    before = MLFLOW.read_bytes()
    (answer,) = ask(command)
    assert (answer["code"], answer["heavy"]) == (0, ["tokenizers"]), answer
    assert "MLflow: http" in answer["out"] + answer["err"] and MLFLOW.read_bytes() == before


@pytest.mark.parametrize(
    ("command", "damage", "asked", "repaired"),
    [
        (RUN, "DELETE FROM registered_model_aliases", VERSION, [(2,)]),
        (RUN, "DELETE FROM model_version_tags", VERSION, [(3,)]),
        (RUN, "UPDATE runs SET lifecycle_stage = 'deleted' WHERE name = 'tiny'", PARENTS, [("c",), ("tiny",)]),
        (COMPARE, "UPDATE runs SET lifecycle_stage = 'deleted' WHERE name = 'c'", PARENTS, [("c",), ("tiny",)]),
        (COMPARE, "UPDATE runs SET status = 'RUNNING' WHERE name = 'c'", UNFINISHED, []),
    ],
)
def test_what_is_missing_in_mlflow_is_put_back(
    tracked_once: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    damage: str,
    asked: str,
    repaired: list[Any],
) -> None:
    monkeypatch.chdir(tracked_once)
    execute(damage)
    assert recorded(*command) == 0
    assert execute(asked) == repaired
    (again,) = ask(command)
    assert (again["code"], again["heavy"]) == (0, ["tokenizers"]), again


def test_a_store_that_moved_is_found_by_mlflow_once(
    tracked_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tracked_once, tmp_path / "lab")
    monkeypatch.chdir(tmp_path / "lab")
    first, again = ask(RUN)[0], ask(RUN)[0]
    assert first["code"] == 0 and "mlflow" in first["heavy"], first
    assert execute(f"SELECT count(*) FROM runs WHERE artifact_uri NOT LIKE '{tmp_path}/%'") == [(0,)]
    assert (again["code"], again["heavy"]) == (0, ["tokenizers"]), again


def test_an_idle_tick_needs_nothing_heavy(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(trained, tmp_path / "lab")
    monkeypatch.chdir(tmp_path / "lab")
    Path("retrain.yaml").write_text("base: tiny.yaml\ninbox: {path: inbox}\n")
    (answer,) = ask(("retrain", "retrain.yaml", "--dry-run"))
    assert (answer["code"], answer["heavy"]) == (0, []), answer


def test_mistakes_about_runs(trained: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a b c"}\n{"text": "a b c"\n')
    there = "there are fruit, code."
    mistakes: dict[tuple[str, ...], str] = {
        ("rollback", "tiny"): "ConfigError: run tiny has no versions yet",
        ("evaluate", "tiny", "--data", str(broken)): f"DataError: {broken}:2: malformed JSON at column 17",
        ("evaluate", "tiny", "--data", "nosuch*.jsonl"): "DataError: files=nosuch*.jsonl: no such file",
        ("evaluate", "tiny", "--data", "sea.jsonl", "--stage", "sea"): f"run tiny has no committed stage sea; {there}",
        ("evaluate", "tiny", "--data", "sea.jsonl", "--label", "sea"): "ignores labels",
        ("evaluate", "tiny"): "ConfigError: give either --data or --tasks.",
        ("evaluate", "tiny", "--data", "a", "--tasks", "b"): "ConfigError: give either --data or --tasks.",
        ("evaluate", "tiny", "--tasks", "nosuch.yaml"): "ConfigError: --tasks=nosuch.yaml: no such file.",
        ("generate", "tony", "apple"): "ConfigError: run tony does not exist",
        ("generate", "tiny", "apple", "--stage", "sea"): there,
        ("inspect", "tiny", "--stage", "sea"): there,
        ("inspect", "tiny", "--text-file", "nosuch.txt"): "ConfigError: --text-file=nosuch.txt: no such file.",
        ("inspect", "tiny", "--text", "apple", "--layer", "2"): "--layer=2: the layers of code are 0 to 1.",
        ("drop", "tony", "code"): "ConfigError: run tony does not exist",
        ("drop", "tiny", "sea"): there,
        ("drop", "tiny", "code", "trigger.x=1"): "only gate.KEY=VALUE can be set here",
        ("consolidate", "tiny", "sea"): there,
        ("compare", "nosuch.yaml"): "ConfigError: nosuch.yaml: no such file.",
        ("prepare", "tiny.yaml", "seed=x"): "ConfigError: seed: ",
        ("run", "tiny.yaml", "model.width=1000000"): "ConfigError: stage fruit needs at least ",
        ("plan", "tiny.yaml", "model.layers=1000000000"): "model.layers=1000000000 must be at most 1,000.",
        ("prepare", "tiny.yaml", "trainer.num_workers=100000"): "trainer.num_workers=100000 must be at most 1,024.",
        ("retrain", "nosuch.yaml"): "ConfigError: nosuch.yaml: no such file.",
        (
            "retrain",
            "tiny.yaml",
            "--plan",
            "nosuch.json",
        ): "ConfigError: nosuch.json: not a plan",
    }
    answers = ask(*mistakes)
    for (arguments, said), answer in zip(mistakes.items(), answers, strict=True):
        assert answer["code"] == 2 and said in answer["err"] and answer["err"].count("\n") == 1, (arguments, answer)
        assert answer["heavy"] == [], arguments
