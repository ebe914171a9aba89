"""What we ship: every configuration loads, every command in the README parses, and report.json is as documented."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import runpy
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import typer
import yaml

from lifelong_moe.config.load import LoadedConfig, build_config, read_config
from lifelong_moe.config.run import RunConfig
from lifelong_moe.interop.layout.complete import with_checkpoint
from lifelong_moe.plan.comparison import Comparison, load_comparison
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.plan.retraining import NewStage, load_retraining
from lifelong_moe.reports import report as report_module
from pipelines.cli import app
from tests.checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
# What lies in configs/tasks is for lm-evaluation-harness.
CONFIGS = sorted(path for path in (ROOT / "configs").glob("**/*.yaml") if path.parent.name != "tasks")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_loads(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if path.name.startswith("smollm2"):
        make_smollm2(monkeypatch, tmp_path)
    for name in re.findall(r"oc\.env:(\w+)", "".join(one.read_text(encoding="utf-8") for one in CONFIGS)):
        monkeypatch.setenv(name, "/somewhere")
    for config in run_configurations(path):
        specs = stage_specs(config)
        assert all(spec.steps > 0 for spec in specs)
        json.dumps([spec.to_json() for spec in specs], allow_nan=False)


def test_questions_of_the_example_task_are_what_its_script_makes() -> None:
    folder = ROOT / "configs" / "tasks"
    made = [*runpy.run_path(str(folder / "make.py"))["arithmetic"]()]
    assert [json.loads(line) for line in (folder / "arithmetic.jsonl").read_text().splitlines()] == made
    for row in made:
        a, sign, b = row["question"].split()
        assert row["choices"][row["answer"]] == str(int(a) + int(b) if sign == "+" else int(a) - int(b))
        assert len({*row["choices"]}) == 4


def make_smollm2(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A small model where `make real-model` puts SmolLM2, with as many layers."""
    pytest.importorskip("transformers", reason="the checkpoint is made with the extra `transformers`")
    monkeypatch.chdir(folder)
    (place,) = re.findall(
        r"^SMOLLM2 := \$\(MODELS\)/(.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    (models,) = re.findall(r"^MODELS := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    sizes = {"max_position_embeddings": 8192, "num_hidden_layers": 30}
    write_checkpoint("llama_tied", f"{models}/{place}", texts=["one text"], **sizes)


def run_configurations(path: Path) -> list[RunConfig]:
    """The run that a file describes, the runs of a comparison's arms, or those that a retraining could lead to."""
    if is_retraining(path):
        retraining = load_retraining(path)
        names = [str(stage.name) for stage in build_config(retraining.base).stages]
        return [retraining.config(names, [NewStage("batch", "a.jsonl", name)]) for name in (None, names[0])]
    if not is_comparison(path):
        return [read_config(path, (), with_checkpoint).config]
    configured: list[LoadedConfig] = []
    configure = Comparison.configure

    def kept(self: Comparison, overrides: Sequence[str]) -> LoadedConfig:
        configured.append(configure(self, overrides))
        return configured[-1]

    with patch.object(Comparison, "configure", kept):
        comparison = load_comparison(path)  # which configures each arm with its first seed
    assert len(configured) == len(comparison.arms)
    return [loaded.config for loaded in configured]


def is_retraining(path: Path) -> bool:
    return "inbox" in yaml.safe_load(path.read_text(encoding="utf-8"))


def is_comparison(path: Path) -> bool:
    return "compare" in yaml.safe_load(path.read_text(encoding="utf-8"))


def code_lines(markdown: str) -> list[str]:
    """Lines of fenced and indented code, continuation lines joined, without prompts and comments."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^(?: {4}|\t)(.+)$", markdown, flags=re.MULTILINE)
    text = "\n".join([*fenced, *indented]).replace("\\\n", " ")
    return [line.strip().removeprefix("$ ").strip() for line in text.splitlines() if line.strip()]


def shell_words(line: str) -> list[str]:
    """Words of the first ``lifelong-moe`` command in a line; none if there is none."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # not a command line at all
        return []
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if not words or Path(words[0]).name != "lifelong-moe":
        return []
    ends = [i for i, word in enumerate(words) if word in ("|", "&&", ";", "||", ">", "&")]
    return words[1 : ends[0] if ends else None]


def documented() -> list[tuple[str, str]]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    return [
        (f"{page.relative_to(ROOT)}: {line}", line)
        for page in pages
        if page.is_file()
        for line in code_lines(page.read_text(encoding="utf-8"))
    ]


def test_commands_in_the_documentation_parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_smollm2(monkeypatch, tmp_path)
    monkeypatch.setenv("LIFELONG_DATA", "/somewhere")
    group = typer.main.get_command(app)
    assert hasattr(group, "resolve_command")
    loaded: set[tuple[str, ...]] = set()
    for where, line in documented():
        words = shell_words(line)
        if not words or words[0].startswith("-"):
            continue
        context = group.make_context("lifelong-moe", list(words), resilient_parsing=True)
        name, command, rest = group.resolve_command(context, list(words))  # type: ignore[attr-defined]
        assert command is not None, where
        try:
            parsed = command.make_context(name, list(rest), parent=context)
        except Exception as error:
            pytest.fail(f"{where}: {error}")
        path = parsed.params.get("config")
        if path is not None and (ROOT / path).is_file():
            asked = ROOT / path
            overrides = list(parsed.params.get("overrides") or [])
            if (path, *overrides) in loaded:
                continue
            loaded.add((path, *overrides))
            if is_retraining(asked) or is_comparison(asked):
                (load_retraining if is_retraining(asked) else load_comparison)(asked, overrides)
            else:
                read_config(asked, overrides, with_checkpoint)
        elif path is not None and path.startswith("configs/"):
            pytest.fail(f"{where}: {path} does not exist")


def test_make_targets_in_the_documentation_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for where, line in documented():
        for target in re.findall(r"^make ([a-z][\w-]*)", line):
            assert target in targets, where


def test_commands_in_code_are_found() -> None:
    page = (
        "```\n$ FOO=1 .venv/bin/lifelong-moe run a.yaml \\\n  seed=1  # why\n```\n\n    lifelong-moe status a | head\n"
    )
    assert [shell_words(line) for line in code_lines(page)] == [["run", "a.yaml", "seed=1"], ["status", "a"]]


@pytest.fixture
def report(trained: Path) -> dict[str, Any]:
    return json.loads((trained / "mlruns/runs/tiny/report.json").read_text())


def documented_keys(text: str) -> set[str]:
    """Names in double backquotes in the first column of the module's table, and those that describe a stage."""
    keys: set[str] = set()
    for line in text.splitlines():
        if re.match(r"``\w+``", line):
            keys |= set(re.findall(r"``(\w+)``", line[: line.index("  ")]))
    return keys


def test_report_has_exactly_the_documented_keys(report: dict[str, Any]) -> None:
    text = report_module.__doc__ or ""
    assert set(report) == documented_keys(text)
    stage_keys = {field.name for field in dataclasses.fields(report_module.StageReport)}
    for stage in report["stages"]:
        assert set(stage) == stage_keys
    described = text[text.index("``routing``  ") : text.index("``expert_counts``")]
    statistics = set(re.findall(r"``(\w+)``", described)) - {"routing"}
    for row in report["routing"].values():
        assert set(row) == statistics


def test_report_has_the_documented_shapes(report: dict[str, Any]) -> None:
    names, stages = report["distributions"], report["stages"]
    assert report["schema"] == report_module.SCHEMA
    assert (report["run"], report["method"], report["seed"]) == ("tiny", "lifelong", 0)
    for key in ("loss_nats_per_token", "bits_per_byte"):
        assert np.asarray(report[key]).shape == (len(stages), len(names))
    for key in ("loss_at_init", "bits_per_byte_at_init"):
        assert np.asarray(report[key]).shape == (len(names),)
    for key in ("bytes_per_token", "routing", "expert_counts"):
        assert list(report[key]) == names
    for counts in report["expert_counts"].values():
        assert np.asarray(counts).shape == (2, stages[-1]["experts_per_layer"])
    for stage in stages:
        assert isinstance(stage["training"], dict) and isinstance(stage["shared"], bool)
        assert stage["tokens"] == stage["training"]["steps"] * 128
        assert stage["parameters_total"] >= stage["parameters_active"]
        assert stage["tokens_per_second"] == pytest.approx(stage["tokens"] / stage["seconds"])
    json.dumps(report, allow_nan=False)


def test_report_follows_from_the_loss_matrix(report: dict[str, Any]) -> None:
    names = report["distributions"]
    matrix, init = np.asarray(report["loss_nats_per_token"]), np.asarray(report["loss_at_init"])
    trained = [stage["data"] for stage in report["stages"]]
    assert trained == names == ["fruit", "code"]
    assert report["forgetting"] == pytest.approx({"fruit": matrix[1, 0] - matrix[0, 0], "code": 0.0})
    assert report["backward_transfer"] == pytest.approx(matrix[0, 0] - matrix[1, 0])
    assert report["forward_transfer"] == pytest.approx(init[1] - matrix[0, 1])
    per_byte = np.array([report["bytes_per_token"][name] for name in names])
    assert np.asarray(report["bits_per_byte"]) == pytest.approx(matrix / math.log(2) / per_byte)
    assert np.asarray(report["bits_per_byte_at_init"]) == pytest.approx(init / math.log(2) / per_byte)
    counts = np.asarray(report["expert_counts"]["fruit"])
    assert report["routing"]["fruit"]["leak"] == pytest.approx(counts[:, 2:].sum() / counts.sum())
    assert report["routing"]["code"]["leak"] == 0.0
