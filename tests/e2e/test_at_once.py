"""Commands import what they need and no more; asked in other processes, since this one has it all."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HEAVY = (
    "torch", "torch._dynamo", "lightning", "pytorch_lightning", "mlflow", "faiss", "sklearn", "scipy", "scipy.stats",
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
    # A document's lineage looks for near copies, by sparse matrices; what comes after it in the process has them too.
    place = next(i for i, command in enumerate(commands) if "--document" in command)
    assert [answer["heavy"] for answer in answers] == [[]] * place + [["scipy", "scipy.sparse"]] * (
        len(commands) - place
    )


def test_a_first_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes").mkdir()
    for number in range(12):
        Path("notes", f"{number}.md").write_text(f"{number} is a text that is long enough\n" * 9, encoding="utf-8")
    (answer,) = ask(("init", "notes"))
    # It reads the text as `plan` will, so that what it writes can be planned; torch is not needed for that.
    assert (answer["code"], answer["heavy"]) == (0, ["scipy", "scipy.sparse", "tokenizers"]), answer


@pytest.mark.parametrize(
    ("command", "needs"),
    [
        ("evaluate tiny --data sea.jsonl", ["tokenizers"]),
        ("generate tiny apple --max-new-tokens 1", ["tokenizers"]),
        # Its text is as it was, so that not even near copies are looked for.
        ("run tiny.yaml", ["tokenizers"]),
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
