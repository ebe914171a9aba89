"""The command line as a user runs it."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import typer

from lifelong_moe.config.load import read_config
from lifelong_moe.plan.comparison import load_comparison
from lifelong_moe.plan.retraining import load_retraining
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import RunRecord, timestamp
from pipelines.cli import GROUPS, app
from pipelines.examples import EXAMPLES
from tests.e2e.conftest import Cli
from tests.known_stages import train_all_stages
from tests.tiny import CONTEXT, SEQUENCES, STEPS, TOKENS, tiny_config, write_config

pytestmark = pytest.mark.usefixtures("known_stages")
ROOT = Path(__file__).resolve().parents[2]
SHA256 = re.compile(r"[0-9a-f]{64}")
COMMANDS = sorted(str(command.name or command.callback.__name__) for command in app.registered_commands)  # type: ignore[union-attr]
HEAVY = ("torch", "lightning", "mlflow", "transformers", "datasets", "faiss", "tokenizers", "matplotlib")


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def in_subprocess(*arguments: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """The installed command in a process of its own: result, and modules that it imported."""
    script = (
        "import atexit, json, sys\n"
        "atexit.register(lambda: print('MODULES ' + json.dumps(sorted(sys.modules)), file=sys.stderr))\n"
        f"sys.argv = ['lifelong-moe', *{list(arguments)!r}]\n"
        "from pipelines.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    modules = set(json.loads(lines[-1].removeprefix("MODULES ")))
    done.stderr = "\n".join(lines[:-1])
    return done, modules


def test_help_of_every_command(cli: Cli) -> None:
    overview = cli("--help")
    assert overview.code == 0
    for command in COMMANDS:
        assert f" {command} " in overview.out
        shown = cli(command, "--help")
        assert shown.code == 0
        assert f"lifelong-moe {command}" in shown.out or f" {command} " in shown.out
        assert "Usage" in shown.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "nosuch.yaml"), "ConfigError: nosuch.yaml: no such file."),
        (("run", "tiny"), "ConfigError: tiny: no such file. Did you mean tiny.yaml?"),
        (("run", "tini.yaml"), "ConfigError: tini.yaml: no such file. Did you mean tiny.yaml?"),
        (("plan", "tiny.yaml", "modle.width=64"), "ConfigError: key modle is unknown. Did you mean model?"),
        (("run", "tiny.yaml", "model.widht=64"), "ConfigError: model.widht: "),
        (("run", "tiny.yaml", "stages[1].grow.expert=4"), "ConfigError: stages[1].grow.expert: "),
        (("run", "tiny.yaml", "seed"), "ConfigError: override 'seed' must have the form key=value."),
        (("run", "tiny.yaml", "method=magic"), "ConfigError: method: "),
        (("run", "tiny.yaml", "trainer.devices=3"), "ConfigError: trainer.devices=3 "),
        (("run", "arms.yaml"), "ConfigError: arms.yaml: has arms, compare, so it is a file for lifelong-moe compare. A "
         "run's own file is its base, tiny.yaml.\n"),
        (("plan", "ticks.yaml"), "ConfigError: ticks.yaml: has inbox, so it is a file for lifelong-moe retrain."),
        (("compare", "tiny.yaml"), "ConfigError: tiny.yaml: has distributions, run, stages, so it is a file for "
         "lifelong-moe run.\n"),
        (("compare", "nested.yaml"), "ConfigError: arms.yaml: has arms, compare, so it is a file for lifelong-moe c"),
        (("compare", "arms.yaml", "optim.lr=1"), "ConfigError: key optim is unknown. Did you mean stage_defaults.op"),
        (("report", "tiny.yaml"), "ConfigError: RUN=tiny.yaml: a run's name and not its file; lifelong-moe runs"),
        (("run", "small"), "ConfigError: small: no such file. Did you mean configs/small.yaml?"),
    ],
)  # fmt: skip
def test_mistakes_in_a_configuration_cost_one_line(
    lab: Path, cli: Cli, arguments: tuple[str, ...], message: str
) -> None:
    Path("arms.yaml").write_text("compare: c\nbase: tiny.yaml\narms: {a: []}\n")
    Path("nested.yaml").write_text("compare: c\nbase: arms.yaml\narms: {a: []}\n")
    Path("ticks.yaml").write_text("base: tiny.yaml\ninbox: {path: inbox}\n")
    Path("configs").mkdir()
    Path("configs/small.yaml").write_text("run: small\n")
    before = files(lab)
    result = cli(*arguments)
    assert result.code == 2
    assert result.out == "" and result.err.count("\n") == 1
    assert result.err.startswith(message)
    assert files(lab) == before


def test_a_device_that_is_not_there_costs_one_line(lab: Path, cli: Cli) -> None:
    result = cli("run", "tiny.yaml", "trainer.accelerator=quantum")
    assert result.code == 2
    assert result.err.startswith("ConfigError: trainer: ") and result.err.count("\n") == 1
    assert not (lab / "mlruns").exists()


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("run", "nosuch.yaml"), ("run", "tiny.yaml", "model.widht=64"), ("plan", "tiny.yaml", "seed=x")],
)
def test_mistakes_are_answered_at_once(lab: Path, arguments: tuple[str, ...]) -> None:
    before = files(lab)
    done, modules = in_subprocess(*arguments)
    assert done.returncode == (0 if "--help" in arguments else 2)
    assert "Traceback" not in done.stderr
    assert not modules & set(HEAVY)  # what takes seconds
    assert files(lab) == before


def test_unknown_command_and_option(cli: Cli) -> None:
    assert cli("rum", "tiny.yaml").code == 2
    assert cli("run", "tiny.yaml", "--jsno").code == 2


def test_plan_trains_nothing(lab: Path, cli: Cli) -> None:
    result = cli("plan", "tiny.yaml")
    assert result.code == 0
    assert f"2 of 2 stages to train: {2 * TOKENS:,} tokens" in result.out
    assert "How long training takes is not known" in result.out and "plan --time" in result.out
    assert not (lab / "mlruns").exists()
    planned = cli("plan", "tiny.yaml", "--json")
    plan = json.loads(planned.out)
    assert (plan["run"], plan["method"]) == ("tiny", "lifelong")
    assert [(row["name"], row["action"], row["tokens"]) for row in plan["stages"]] == [
        ("fruit", "train", TOKENS),
        ("code", "train", TOKENS),
    ]
    assert [row["new_experts_per_layer"] for row in plan["stages"]] == [2, 2]
    assert all(SHA256.fullmatch(row["key"]) and row["disk_bytes"] > 0 for row in plan["stages"])
    assert plan["stages"][1]["teacher_tokens"] == round(STEPS * SEQUENCES * CONTEXT * 0.25)
    timed = json.loads(cli("plan", "tiny.yaml", "--time", "--json").out)
    assert plan["seconds"] is None and timed.pop("seconds") > 0
    assert timed.items() <= plan.items()
    assert "--time" not in cli("plan", "tiny.yaml", "trainer.devices=2").out
    assert not (lab / "mlruns").exists()


def test_plan_knows_what_is_committed(trained: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(trained / "mlruns")
    result = cli("plan", "tiny.yaml")
    assert "0 of 2 stages to train" in result.out and result.out.count("committed") == 2
    changed = cli("plan", "tiny.yaml", "stages[1].tokens=2048")
    assert "1 of 2 stages to train: 2,048 tokens" in changed.out
    assert "running needs run=NAME or --replace" in changed.out
    # What this machine took for stages of this model, whichever run trained them.
    assert "at the speed of 3 stages of this model on this machine" in changed.out
    other = ("plan", "tiny.yaml", "run=other", "seed=1", "--json")
    assert 0 < json.loads(cli(*other).out)["seconds"] < 600
    assert json.loads(cli(*other, "model.width=64").out)["seconds"] is None
    assert json.loads(cli(*other, "trainer.accelerator=gpu").out)["seconds"] is None
    monkeypatch.setattr("pipelines.run.plan.machine", lambda: "another one")
    assert json.loads(cli(*other).out)["seconds"] is None
    assert json.loads(cli("plan", "tiny.yaml", "--json").out)["seconds"] == 0
    assert files(trained / "mlruns") == before


def test_run_then_ask_everything(lab: Path, cli: Cli) -> None:
    result = cli("run", "tiny.yaml", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report == json.loads((lab / "mlruns/runs/tiny/report.json").read_text())
    again = cli("run", "tiny.yaml")
    assert again.code == 0 and "Nothing to train: all 2 stages of tiny are committed." in again.out
    refused = cli("run", "tiny.yaml", "seed=1")
    assert refused.code == 2 and "or --replace" in refused.err
    assert cli("run", "tiny.yaml", "seed=1", "--replace", "stages=[{data: fruit}]").code == 0


def test_report_of_two_runs(trained: Path, cli: Cli) -> None:
    result = cli("report", "tiny", "naive")
    assert result.code == 0
    for text in ("tiny (lifelong)", "naive (sequential)", "Side by side", "forgetting of fruit", "(before)"):
        assert text in result.out
    said = result.out.splitlines()[-2]  # the verdict, against the run without retention, and where its words are told
    assert (said.startswith("tiny ") or "(router leak)" in said) and "FLOPs." in result.out
    assert " where naive " in result.out and result.out.endswith("report --glossary\n")
    alone = cli("report", "tiny").out
    assert "Beside another run: lifelong-moe report tiny OTHER" in alone and " where " not in alone.splitlines()[-4]
    reports = json.loads(cli("report", "tiny", "naive", "--json").out)["reports"]
    assert [report["run"] for report in reports] == ["tiny", "naive"]
    unknown = cli("report", "tiny", "tony")
    assert unknown.code == 2 and unknown.err.count("\n") == 1 and "There are naive, tiny." in unknown.err


def test_the_words_of_a_verdict_on_demand(lab: Path, cli: Cli) -> None:
    told = cli("report", "--glossary")
    assert told.code == 0 and len(told.out.splitlines()) == 8 and "forgetting: " in told.out
    assert "routing.bundles=cluster" in told.out.splitlines()[-1]  # a leak, and what to do about it


def test_status_of_what_is_done_under_way_and_to_do(lab: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from lifelong_moe.errors import ResourceError
    from lifelong_moe.training.callbacks.progress import StepCheckpoint

    original = StepCheckpoint.on_train_batch_end

    def on_train_batch_end(self: Any, trainer: Any, pl_module: Any, *args: Any) -> None:
        original(self, trainer, pl_module, *args)
        if (pl_module.spec.name, trainer.global_step) == ("code", 10):
            raise ResourceError("stopped by the test")

    config = tiny_config(("fruit", "code", "sea"))
    config["stages"].append({"data": "code"})
    write_config(config)
    monkeypatch.setattr(StepCheckpoint, "on_train_batch_end", on_train_batch_end)
    assert cli("run", "tiny.yaml").code == 8
    status = json.loads(cli("status", "tiny", "--json").out)
    assert [(row["name"], row["state"], row["checkpoint_step"]) for row in status["stages"]] == [
        ("fruit", "committed", None),
        ("code", "under way", 8),
        ("sea", "to do", None),
        ("code-2", "to do", None),
    ]
    shown = cli("status", "tiny").out
    assert "committed" in shown and "under way" in shown and "step 8" in shown and "to do" in shown
    assert cli("status", "tony").code == 2


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        (("status", "tony"), "ConfigError", "run tony does not exist"),
        (("status", "TINY"), "ConfigError", "run TINY does not exist"),
        (("report", "-x"), "NoSuchOption", "No such option: -x"),
        (("reprt", "tiny"), "UsageError", "No such command"),
        (("generate", "tiny"), "MissingParameter", ""),
        (("run", "tiny.yaml", "optim.lr=1"), "ConfigError", "key optim is unknown. Did you mean stage_defaults."),
    ],
)
def test_an_error_is_an_object_too(
    trained: Path, cli: Cli, arguments: tuple[str, ...], error: str, reason: str
) -> None:
    result = cli(*arguments, "--json")
    found = json.loads(result.out)
    assert set(found) == {"error", "reason", "exit_code"} and result.out.count("\n") == 1
    assert (found["error"], found["exit_code"]) == (error, 2) == (error, result.code)
    assert found["reason"].startswith(reason) and result.err
    assert cli(*arguments).out == ""


def test_json_before_a_command_is_a_mistake_with_an_object(trained: Path, cli: Cli) -> None:
    result = cli("--json", "runs")
    found = json.loads(result.out)
    assert (result.code, found["exit_code"], found["reason"]) == (2, 2, "No such option: --json") and result.err
    assert cli("--version").out.startswith("lifelong-moe ") and cli("runs", "--json", "--help").code == 0


def test_a_bug_and_ctrl_c_are_objects_too(trained: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: BaseException) -> None:
        def broken(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr("pipelines.inspect.runs.show_runs", broken)

    fail(KeyboardInterrupt("go on"))
    result = cli("runs", "--json")
    assert (result.code, result.err) == (130, "interrupted: go on\n")
    assert json.loads(result.out) == {"error": "KeyboardInterrupt", "reason": "go on", "exit_code": 130}
    fail(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError), redirect_stdout(io.StringIO()) as out:
        app(["runs", "--json"], standalone_mode=False)
    assert json.loads(out.getvalue()) == {"error": "ZeroDivisionError", "reason": "a bug", "exit_code": 1}


def test_results_are_objects(trained: Path, cli: Cli) -> None:
    """Of each command that only looks."""
    for asked in ("runs", "status tiny", "report tiny naive", "lineage tiny", "gc", "sync", "plan tiny.yaml"):
        assert type(json.loads(cli(*asked.split(), "--json").out)) is dict, asked


def completed(typed: str) -> list[str]:
    """What a shell is told when the user asks for the rest of a command line."""
    words = typed.split(" ")
    asked = {"COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1), "_LIFELONG_MOE_COMPLETE": "complete_bash"}
    code = (
        "import sys\nfrom pipelines.cli import main\nsys.argv = ['lifelong-moe']\n"
        f"try:\n    main()\nfinally:\n    assert not set(sys.modules) & set({HEAVY!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | asked
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("lifelong-moe status ", ["naive", "tiny"]),
        ("lifelong-moe report naive t", ["tiny"]),
        ("lifelong-moe drop tiny ", ["code", "fruit"]),
        ("lifelong-moe generate tiny --stage f", ["fruit"]),
        ("lifelong-moe inspect naive --label ", ["code", "fruit"]),
        ("lifelong-moe consolidate nosuch ", []),
        ("lifelong-moe consolidate ../tiny ", []),
    ],
)
def test_a_shell_completes_names(trained: Path, typed: str, names: list[str]) -> None:
    assert completed(typed) == names


def test_a_damaged_store_completes_nothing(lab: Path) -> None:
    Path("mlruns/runs/x").mkdir(parents=True)
    Path("mlruns/runs/x/head.json").write_text("{")
    assert completed("lifelong-moe status ") == ["x"]
    assert completed("lifelong-moe drop x ") == []
    Path("mlruns/runs/y").symlink_to("/")
    assert completed("lifelong-moe status ") == []


def test_runs_says_what_is_there(trained: Path, cli: Cli) -> None:
    found = json.loads(cli("runs", "--json").out)
    reports = {name: json.loads(Path(f"mlruns/runs/{name}/report.json").read_text()) for name in ("tiny", "naive")}
    assert {row["run"] for row in found["runs"]} == set(reports)
    assert [row["changed"] for row in found["runs"]] == sorted((row["changed"] for row in found["runs"]), reverse=True)
    assert found["stages"] == len(list(Path("mlruns/stages").glob("*-*")))
    for row in found["runs"]:
        report = reports[row["run"]]
        lost = report["forgetting_bits_per_byte"]
        assert (row["method"], row["stages_committed"], row["stages"]) == (report["method"], 2, 2)
        assert row["bits_per_byte"] == pytest.approx(
            sum(report["bits_per_byte"][-1]) / len(report["bits_per_byte"][-1])
        )
        assert row["forgetting_bits_per_byte"] == max(lost.values()) == lost[row["forgotten"]]
        assert row["parameters"] == report["stages"][-1]["parameters_total"]
        folders = [f"mlruns/stages/{stage['name']}-{stage['key'][:16]}" for stage in report["stages"]]
        assert row["bytes"] == sum(path.stat().st_size for one in folders for path in Path(one).iterdir())
        # The ledger's time, which a copy of the store keeps.
        last = Path(f"mlruns/runs/{row['run']}/ledger.jsonl").read_text().splitlines()[-1]
        assert row["changed"] == json.loads(last)["time"]
    shown = cli("runs").out
    assert "lifelong" in shown and "2 of 2" in shown and "sequential" in shown


def test_runs_of_an_empty_directory_and_of_a_run_under_way(lab: Path, cli: Cli) -> None:
    empty = cli("runs")
    assert empty.code == 0 and "no runs" in empty.out and not (lab / "mlruns").exists()
    assert json.loads(cli("runs", "--json").out) == {"runs": [], "stages": 0, "bytes": 0}
    head = RunHead(run="begun", method="lifelong", seed=0, config={}, plan=("a" * 64,), names=("fruit",))
    RunRecord(lab / "mlruns", "begun").set_head(head)
    (lab / "mlruns/runs/.tmp-x").mkdir()
    (row,) = json.loads(cli("runs", "--json").out)["runs"]
    assert (row["stages_committed"], row["stages"], row["bytes"], row["bits_per_byte"]) == (0, 1, 0, None)
    assert row["changed"] == timestamp((lab / "mlruns/runs/begun/head.json").stat().st_mtime)
    assert "0 of 1" in cli("runs").out


def test_help_has_groups_and_examples_that_can_be_read(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    assert list(GROUPS) == re.findall(r"╭─ (\w+) ─", cli("--help").out)[1:]
    assert set(EXAMPLES) == set(COMMANDS)
    monkeypatch.chdir(ROOT)
    known: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for command, examples in EXAMPLES.items():
        shown = " ".join(cli(command, "--help").out.split())
        for example in examples:
            assert f"Example: lifelong-moe {example}" in shown
            name, *arguments = shlex.split(example)
            assert name == command
            asked = known[name].make_context(name, list(arguments)).params
            if (config := asked.get("config")) is not None:
                read = {"compare": load_comparison, "retrain": load_retraining}.get(name, read_config)
                read(config, asked["overrides"] or [])
            for file in asked.get("tasks") or []:
                assert Path(file).is_file()


def test_lineage(trained: Path, cli: Cli) -> None:
    rows = json.loads(cli("lineage", "tiny", "--json").out)["stages"]
    assert [row["name"] for row in rows] == ["fruit", "code"]
    assert [row["experts"] for row in rows] == ["fruit/L0..1/E0..1", "code/L0..1/E2..3"]
    assert rows[0]["parent"] is None and rows[1]["parent"] == rows[0]["key"]
    assert set(rows[1]["data"]) == {"fruit", "code"}
    assert rows[0]["borrowed_tensors"] == 0 < rows[1]["borrowed_tensors"]
    assert all(SHA256.fullmatch(row["weights_sha256"]) for row in rows)
    shown = cli("lineage", "tiny").out
    assert "code/L0..1/E2..3" in shown and "lineage of tiny" in shown


def test_evaluate_any_text(trained: Path, cli: Cli) -> None:
    result = cli("evaluate", "tiny", "--data", "sea.jsonl", "--json")
    assert result.code == 0, result.err
    measured = json.loads(result.out)
    assert (measured["run"], measured["stage"]) == ("tiny", "code")
    assert measured["documents"] == 160 and measured["tokens"] > 0
    bits = measured["nats_per_token"] * measured["tokens"] / math.log(2) / measured["bytes"]
    assert measured["bits_per_byte"] == pytest.approx(bits)
    first = json.loads(cli("evaluate", "tiny", "--data", "sea.jsonl", "--stage", "fruit", "--json").out)
    assert first["stage"] == "fruit" and first["nats_per_token"] != measured["nats_per_token"]
    assert "bits/byte (160 documents" in cli("evaluate", "tiny", "--data", "sea.jsonl").out
    unknown = cli("evaluate", "tiny", "--data", "sea.jsonl", "--stage", "sea")
    assert unknown.code == 2 and "there are fruit, code." in unknown.err
    absent = cli("evaluate", "tiny", "--data", "nosuch*.jsonl")
    assert absent.code == 2 and absent.err.count("\n") == 1


def test_evaluate_tells_the_time_left(trained: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("pipelines.shared.output._Status.update", lambda self, status: told.append(status))
    monkeypatch.setattr("pipelines.inspect.evaluate.EVALUATED_TOKENS", 512)
    result = json.loads(cli("evaluate", "tiny", "--data", "sea.jsonl", "--json").out)
    assert len(told) > 2 and all(one.startswith("code: evaluating, ") and one.endswith(" left") for one in told)
    assert told[-1] == f"code: evaluating, {result['tokens']:,} of {result['tokens']:,} tokens, 0 s left"


def test_evaluate_scores_as_the_run_did(trained: Path, cli: Cli) -> None:
    """On text without a split the measure is the report's own."""
    report = json.loads((trained / "mlruns/runs/tiny/report.json").read_text())
    (trained / "heldout").mkdir(exist_ok=True)
    from lifelong_moe.config.data import SourceConfig
    from lifelong_moe.data.text.sources import read_corpus

    corpus = read_corpus("fruit", SourceConfig(files="fruit.jsonl", heldout_fraction=0.1), Path("data/cache"))
    text = "".join(json.dumps({"text": document.text}) + "\n" for document in corpus.heldout)
    Path("heldout/fruit.jsonl").write_text(text)
    measured = json.loads(cli("evaluate", "tiny", "--data", "heldout/fruit.jsonl", "--json").out)
    if measured["tokens"] == sum(report["expert_counts"]["fruit"][0]):  # all of it fits evaluate.tokens
        assert measured["nats_per_token"] == pytest.approx(report["loss_nats_per_token"][1][0], rel=1e-9)
    else:
        assert measured["nats_per_token"] == pytest.approx(report["loss_nats_per_token"][1][0], rel=0.1)


def test_generate(trained: Path, cli: Cli) -> None:
    result = cli("generate", "tiny", "apple [bold]pear", "--max-new-tokens", "12", "--seed", "3")
    assert result.code == 0, result.err
    assert result.out.startswith("apple [bold]pear")
    answers = [
        json.loads(cli("generate", "tiny", "apple", "--max-new-tokens", "12", "--seed", seed, "--json").out)
        for seed in ("3", "3", "4")
    ]
    assert answers[0] == answers[1] != answers[2]
    assert answers[0]["prompt"] == "apple" and 0 < answers[0]["tokens"] <= 12
    longer = cli("generate", "tiny", "apple", "--max-new-tokens", str(2 * CONTEXT), "--temperature", "0", "--json")
    assert longer.code == 0, longer.err
    assert cli("generate", "tiny", "", "--max-new-tokens", "4").code == 0
    for option, value in (
        ("max-new-tokens", "0"),
        ("max-new-tokens", "9" * 20),
        ("top-p", "2"),
        ("top-p", "nan"),
        ("temperature", "-1"),
        ("temperature", "nan"),
        ("seed", "-1"),
    ):
        refused = cli("generate", "tiny", "apple", f"--{option}={value}")
        assert refused.code == 2 and f"Invalid value for '--{option}'" in refused.err


BAD_LINES = {
    "malformed": (b'{"text": "a b c"', "malformed JSON at column 17"),
    "no text": (b'{"txt": "a"}', "text"),
    "not a string": (b'{"text": 5}', "text"),
    "not UTF-8": (b'{"text": "\xff"}', "UTF-8"),
    "blank": (b'{"text": "  "}', "text"),
}


@pytest.mark.parametrize("case", BAD_LINES)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_bad_documents_cost_one_line(lab: Path, cli: Cli, case: str, command: str) -> None:
    line, reason = BAD_LINES[case]
    with (lab / "code.jsonl").open("ab") as file:
        file.write(line + b"\n")
    result = cli(command, "tiny.yaml")
    assert result.code == 2
    assert result.err.count("\n") == 1 and "Traceback" not in result.err
    assert re.match(r"DataError: distributions\.code: code\.jsonl:161:", result.err), result.err
    assert reason.lower() in result.err.lower()
    assert not (lab / "mlruns").exists()


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "documents"), (b'{"text": "only one"}\n', "too few")], ids=["empty", "one"]
)
def test_too_few_documents(lab: Path, cli: Cli, content: bytes, reason: str) -> None:
    (lab / "code.jsonl").write_bytes(content)
    result = cli("run", "tiny.yaml")
    assert result.code == 2 and result.err.count("\n") == 1
    assert reason in result.err
    assert not (lab / "mlruns").exists()


def test_too_little_text_for_a_block(lab: Path, cli: Cli) -> None:
    lines = [json.dumps({"text": f"w{i}"}) for i in range(3)]
    (lab / "code.jsonl").write_text("\n".join(lines) + "\n")
    result = cli("run", "tiny.yaml")
    assert result.code == 2 and result.err.splitlines()[-1].startswith("DataError"), result.err
    assert "Traceback" not in result.err
    assert not (lab / "mlruns").exists()


def test_own_bug_keeps_its_traceback(lab: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("pipelines.run.run.prepare", broken)
    with pytest.raises(ZeroDivisionError):
        cli("run", "tiny.yaml")


def said_beside(errors: str) -> list[str]:
    """What was said besides that text differs in its bytes per token."""
    return [line for line in errors.splitlines() if line and not line.startswith("WARNING: code has")]


def test_a_profiler_that_reports_nothing_says_nothing(lab: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    train_all_stages(monkeypatch)
    done = cli("run", "tiny.yaml", "stages=[{data: fruit}]", "trainer.profiler=null")
    assert done.code == 0 and said_beside(done.err) == [] and "run_training_batch" not in done.out


def test_installed_command(lab: Path) -> None:
    """A profiler reports once on standard error, as all that libraries say; besides its report there is nothing."""
    command = Path(sys.executable).parent / "lifelong-moe"
    if not command.is_file():
        pytest.skip("the package is not installed here")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [command, "run", "tiny.yaml", "stages=[{data: fruit}]", "trainer.profiler=simple"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tiny (lifelong)" in done.stdout
    before, _, report = done.stderr.partition("FIT Profiler Report")
    assert said_beside(before) == [] and report.count("run_training_batch") == 1
    assert {line[0] for line in report.splitlines() if line} == {"-", "|"}


@pytest.mark.parametrize(
    "override",
    [
        "routing.mode=foo.bar",
        "routing.mode=json.dumps",
        "model.init_std=-1",
        "model.rope_base=0",
        "tokenizer.vocab_size=1000000000000",
        "trainer.strategy=ddp_spawn",
        "trainer.devices=-1",
        "trainer.devices=abc",
        "stages[1].grow.experts=999",
        "routing={mode: cluster, sample_tokens: 1}",
    ],
)
def test_what_cannot_work_is_said_before_anything_is_trained(lab: Path, cli: Cli, override: str) -> None:
    result = cli("run", "tiny.yaml", override)
    assert result.code == 2
    assert result.err.startswith("ConfigError: ") and result.err.count("\n") == 1
    assert not (lab / "mlruns").exists()


def test_more_clusters_than_documents(lab: Path, cli: Cli) -> None:
    clustered = ("routing.mode=cluster", "routing.level=document", "model.document_mask=true")
    result = cli(
        "run",
        "tiny.yaml",
        *clustered,
        "model.experts=2000",
        "routing.clusters=1000",
        "stages[1].grow={experts: 2000, sample_tokens: 9999}",
    )
    assert result.code == 2 and "1000 document clusters need as many training documents" in result.err
    assert not (lab / "mlruns").exists()


def test_a_file_where_the_output_belongs(lab: Path, cli: Cli) -> None:
    (lab / "mlruns").write_text("")
    result = cli("run", "tiny.yaml")
    assert result.code == 2 and "Traceback" not in result.err and "mlruns" in result.err


def test_mistakes_in_asking(trained: Path, cli: Cli) -> None:
    (trained / "empty.jsonl").write_text("")
    for arguments, reason in (
        (("evaluate", "tiny", "--data", "empty.jsonl"), "there are no documents"),
        (("evaluate", "tiny", "--data", "sea.jsonl", "--label", "sea"), "ignores labels"),
        (("generate", "tiny", "a \udcff b"), "not UTF-8"),
    ):
        result = cli(*arguments)
        assert result.code == 2 and reason in result.err and "Traceback" not in result.err, arguments


def test_what_is_asked_for_in_vain_is_said(lab: Path, cli: Cli) -> None:
    again = ("stages=[{data: fruit}, {data: fruit}]", "stage_defaults.tokens=256")
    said = "stages[1] (fruit-2): replay, distillation on replayed text: off, because no earlier stage learned anything"
    planned = cli("plan", "tiny.yaml", *again, "--json")
    assert planned.code == 0 and said in planned.err
    assert [sentence.partition(" but ")[0] for sentence in json.loads(planned.out)["warnings"]] == [said]
    ran = cli("run", "tiny.yaml", *again)
    assert ran.code == 0 and ran.out.count(said) == 1
    plain = cli("plan", "tiny.yaml", "--json")
    assert json.loads(plain.out)["warnings"] == [] and "off, because" not in plain.err
