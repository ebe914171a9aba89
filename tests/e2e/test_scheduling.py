"""The schedulers' files in docs/scheduling: what can be run here is run, the rest is read as its scheduler would."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from pipelines.cli import app
from tests.known_stages import use_known_stages
from tests.retrain_lab import RETRAIN, make_base

pytestmark = pytest.mark.xdist_group("scheduling")  # one process trains what all of them begin with

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "docs/scheduling"
HOME = "/srv/lifelong-moe"
CODES = {2, 3, 4, 5, 6, 7, 8, 75}
OUTCOMES = {3, 4}


def parses(words: list[str]) -> None:
    """The words after ``lifelong-moe`` are a command of ours, and the file it names is one that we ship."""
    group = typer.main.get_command(app)
    context = group.make_context("lifelong-moe", list(words), resilient_parsing=True)
    name, command, rest = group.resolve_command(context, list(words))  # type: ignore[attr-defined]
    assert command is not None
    parsed = command.make_context(name, list(rest), parent=context)
    assert (ROOT / parsed.params["config"]).is_file()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory as an operator has it: a finished run, its retraining file, an empty inbox, and a command."""
    root = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        use_known_stages(patch, tmp_path_factory)
        make_base(root)
    (root / "configs").mkdir()
    (root / "configs/retrain.yaml").write_text(yaml.safe_dump({**RETRAIN, "base": "../tiny.yaml"}))
    command = root / ".venv/bin/lifelong-moe"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pipelines.cli "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    return root


def run(command: list[str], home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=600)


def last_json(text: str) -> dict[str, Any]:
    return json.loads(text.strip().splitlines()[-1])  # type: ignore[no-any-return]


def test_systemd_units() -> None:
    service, timer = (configparser.ConfigParser(interpolation=None) for _ in range(2))
    for parser, name in ((service, "lifelong-moe.service"), (timer, "lifelong-moe.timer")):
        parser.optionxform = str  # type: ignore[assignment, method-assign]
        parser.read_string((FILES / name).read_text())
    unit = service["Service"]
    assert unit["Type"] == "oneshot" and unit["WorkingDirectory"] == HOME
    program, *words = unit["ExecStart"].split()
    assert program == f"{HOME}/.venv/bin/lifelong-moe"
    parses(words)
    # 75 and a killed process are what is left to be restarted.
    assert unit["Restart"] == "on-failure" and set(map(int, unit["SuccessExitStatus"].split())) == OUTCOMES
    assert set(map(int, unit["RestartPreventExitStatus"].split())) == (CODES | {1}) - OUTCOMES - {75}
    assert timer["Timer"]["Persistent"] == "true" and timer["Install"]["WantedBy"] == "timers.target"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed here")
def test_systemd_itself_accepts_them(tmp_path: Path) -> None:
    for name in ("lifelong-moe.service", "lifelong-moe.timer"):
        text = (FILES / name).read_text()
        (tmp_path / name).write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", text))
    units = [str(tmp_path / name) for name in ("lifelong-moe.service", "lifelong-moe.timer")]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    # It also tells of units of this machine; of ours nothing may be said.
    assert "lifelong-moe" not in done.stderr, done.stderr


def test_the_crontab_line_runs(home: Path) -> None:
    (line,) = [line for line in (FILES / "crontab").read_text().splitlines() if not line.startswith("#")]
    *times, command = line.split(maxsplit=5)
    assert times == ["30", "2", "*", "*", "*"] and "%" not in command  # cron would cut it there
    done = run(["sh", "-c", command.replace(HOME, str(home))], home)
    assert done.returncode == 0 and done.stdout == done.stderr == ""
    assert last_json((home / "mlruns/retrain.log").read_text())["outcome"] == "idle"
    broken = command.replace(HOME, str(home)).replace("configs/", "configs/nowhere/")
    mailed = run(["sh", "-c", broken], home).stdout
    assert mailed.count("\n") == 1 and "configs/nowhere/retrain.yaml" in mailed


def test_the_slurm_script_runs(home: Path) -> None:
    script = FILES / "retrain.slurm"
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", script.read_text(), flags=re.MULTILINE))
    assert directives["signal"] == "B:TERM@120" and directives["dependency"] == "singleton" and "requeue" in directives
    # scrontab reads no #SBATCH lines of what it runs, so that its line must go by way of sbatch.
    assert re.search(
        rf"^# +30 2 \* \* \* sbatch {HOME}/docs/scheduling/retrain.slurm$", script.read_text(), re.MULTILINE
    )
    done = run(["bash", str(script)], home, LIFELONG_HOME=str(home))
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["outcome"] == "idle"


def test_the_slurm_script_hands_signals_on_and_asks_for_another_turn(home: Path, tmp_path: Path) -> None:
    """A tick that takes its time to stop, and a scontrol that writes down what it was asked."""
    fake = tmp_path / "home"
    (fake / ".venv/bin").mkdir(parents=True)
    (fake / "configs").mkdir()
    (fake / "configs/retrain.yaml").touch()
    tick = "import signal,sys,time\nsignal.signal(15, lambda *_: (time.sleep(0.3), sys.exit(75)))\n"
    # A signal that comes just before a sleep does not end it: many short ones.
    tick += "open('began','w').close()\nfor _ in range(600): time.sleep(0.1)\n"
    for path, text in (
        (fake / ".venv/bin/lifelong-moe", f"#!{sys.executable}\n{tick}"),
        (tmp_path / "scontrol", f'#!/bin/sh\necho "$@" > "{tmp_path}/asked"\n'),
    ):
        path.write_text(text)
        path.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {**os.environ, "LIFELONG_HOME": str(fake), "SLURM_JOB_ID": "17", "PATH": path}
    job = subprocess.Popen(["bash", str(FILES / "retrain.slurm")], env=environment)
    while not (fake / "began").exists():
        assert job.poll() is None
    job.terminate()
    assert job.wait(timeout=30) == 75
    assert (tmp_path / "asked").read_text().split() == ["requeue", "17"]


def test_the_cronjob(home: Path) -> None:
    spec = yaml.safe_load((FILES / "cronjob.yaml").read_text())["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    job = spec["jobTemplate"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy needs it
    parses(container["args"])
    ignored, *rules = job["podFailurePolicy"]["rules"]  # read in this order: a drained node is no failure
    assert ignored == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert all(rule["onExitCodes"]["containerName"] == container["name"] for rule in rules)
    codes = {rule["action"]: set(rule["onExitCodes"]["values"]) for rule in rules}
    assert codes == {"FailJob": (CODES | {1}) - {75}, "Count": {75}}
    done = run([str(home / ".venv/bin/lifelong-moe"), *container["args"]], home)
    assert done.returncode == 0 and last_json(done.stdout)["outcome"] == "idle"


def test_the_airflow_dag() -> None:
    tree = ast.parse((FILES / "airflow_dag.py").read_text())
    (operator,) = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "BashOperator"]
    given = {keyword.arg: keyword.value for keyword in operator.keywords}
    program, *words = ast.literal_eval(given["bash_command"]).split()
    assert program == ".venv/bin/lifelong-moe"
    parses(words)
    assert ast.literal_eval(given["skip_on_exit_code"]) == [3, 4]


def test_the_last_line_is_json_also_on_failure(home: Path) -> None:
    command = str(home / ".venv/bin/lifelong-moe")
    for arguments, code, error in (
        (["configs/nowhere.yaml"], 2, "ConfigError"),
        (["configs/retrain.yaml", "gate.min_gian=1"], 2, "ConfigError"),
        (["configs/retrain.yaml", "run=nobody"], 2, "ConfigError"),
    ):
        done = run([command, "retrain", *arguments], home)
        assert done.returncode == code and len(done.stderr.splitlines()) == 1
        assert (last_json(done.stdout)["outcome"], last_json(done.stdout)["error"]) == ("failed", error)


def test_the_page_shows_every_file_as_it_is_and_names_every_exit_code() -> None:
    page = (ROOT / "docs/scheduling.md").read_text()
    for path in FILES.iterdir():
        if path.is_file():
            assert f"(scheduling/{path.name})" in page
            assert f"\n{path.read_text()}```\n" in page, f"docs/scheduling.md shows another {path.name}"
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)} == CODES | {0}
