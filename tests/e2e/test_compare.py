"""`lifelong-moe compare` as a user runs it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from lifelong_moe.reports import comparison as comparison_module
from pipelines.compare.render import heading
from tests.e2e.conftest import Cli

pytestmark = pytest.mark.usefixtures("known_stages")


@pytest.fixture
def compare_yaml(lab: Path) -> Path:
    """Two arms and two seeds on ``tiny.yaml``."""
    raw = {"compare": "two", "base": "tiny.yaml", "seeds": [0, 1]}
    raw["arms"] = {"naive": ["method=sequential"], "lifelong": []}
    (lab / "compare.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return lab / "compare.yaml"


def stages(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (root / "mlruns/stages").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("arms.naive=[model.widht=3]",), "ConfigError: arm naive: model.widht: "),
        (("sedes=[0]",), "ConfigError: key sedes is unknown. Did you mean seeds?"),
        (("reference=naif",), "ConfigError: reference=naif is unknown. Did you mean naive?"),
        (("--only", "naif"), "ConfigError: --only=naif is unknown. Did you mean naive?"),
        (("arms.bad=[trainer.accelerator=quantum]",), "ConfigError: arm bad: trainer: "),
        (("arms.bad=[evaluate.tokens=9]",), "ConfigError: arm bad: evaluate.tokens=9, but 600 in arm naive; "),
        (
            ("arms.bad=[distributions.code.files=sea.jsonl]",),
            "ConfigError: arm bad: distributions.code (SHA-256 of its held-out text)=",
        ),
    ],
)
def test_mistakes_cost_one_line_and_train_nothing(
    compare_yaml: Path, lab: Path, cli: Cli, arguments: tuple[str, ...], message: str
) -> None:
    result = cli("compare", "compare.yaml", *arguments)
    assert result.code == 2 and result.out == ""
    assert result.err.count("\n") == 1 and result.err.startswith(message)
    assert not (lab / "mlruns").exists()


def test_two_arms_two_seeds(compare_yaml: Path, lab: Path, cli: Cli) -> None:
    result = cli("compare", "compare.yaml", "--json")
    assert result.code == 0, result.err
    found, home = json.loads(result.out), lab / "mlruns/comparisons/two"
    assert found == json.loads((home / "comparison.json").read_text())
    committed = stages(lab)
    assert len(committed) == 6  # a seed: the first stage, shared, and a second one of each arm
    reports = {
        (arm, seed): json.loads((lab / f"mlruns/runs/two.{arm}.s{seed}/report.json").read_text())
        for arm in ("naive", "lifelong")
        for seed in (0, 1)
    }
    assert [stage["shared"] for stage in reports["naive", 0]["stages"]] == [False, False]
    assert [stage["shared"] for stage in reports["lifelong", 0]["stages"]] == [True, False]
    check_numbers(found, reports)
    page = (home / "comparison.md").read_text()
    assert page.startswith("- Best at the end: ") and "\n- lifelong " in page and "\n\n**two** · base tiny.yaml" in page
    assert sorted(path.name for path in (home / "figures").iterdir()) == ["curves.png", "leak.png", "pareto.png"]
    written = (home / "comparison.json").stat().st_mtime_ns

    again = cli("compare", "compare.yaml")
    assert again.code == 0 and stages(lab) == committed
    assert "\nlifelong " in again.out and " where naive " in again.out
    tables = again.out.partition("Results")[2].partition("Forgetting compares")[0]
    assert " … " in tables and "±" not in tables  # of two seeds, both values
    assert "training" not in "".join(line for line in again.out.splitlines() if line.startswith("two."))
    assert (home / "comparison.json").stat().st_mtime_ns == written

    refused = cli("compare", "compare.yaml", "stage_defaults.tokens=1280")
    assert refused.code == 2 and "arm naive: run two.naive.s0 exists with another configuration" in refused.err
    changed = ("stage_defaults.tokens=1280", "seeds=[0]", "--only", "naive", "--replace")
    assert cli("compare", "compare.yaml", *changed).code == 0
    replaced = json.loads((home / "comparison.json").read_text())
    assert [run["status"] for arm in replaced["arms"] for run in arm["runs"]] == ["committed", "absent"]
    assert replaced["arms"][0]["runs"][0]["numbers"]["tokens"] == 2560


def check_numbers(found: dict[str, Any], reports: dict[tuple[str, int], dict[str, Any]]) -> None:
    whole, numbers = (comparison_module.__doc__ or "").split("``numbers`` of a run")
    assert set(found) == set(re.findall(r"^``(\w+)`` ", whole, re.MULTILINE)) - {"runs"}
    assert set(found["arms"][0]["summary"]) == set(re.findall(r"^``(\w+)`` ", numbers, re.MULTILINE))
    assert found["complete"] and found["distributions"] == ["fruit", "code"] and found["unrestrained"] == "naive"
    naive, lifelong = found["arms"]
    for arm in (naive, lifelong):
        for run in arm["runs"]:
            report = reports[arm["name"], run["seed"]]
            matrix = np.asarray(report["loss_nats_per_token"])
            forgotten = float(np.expm1(matrix[1, 0] - matrix[0, 0]))
            assert run["numbers"]["forgetting_max"] == pytest.approx(forgotten)
            free = reports["naive", run["seed"]]["loss_nats_per_token"][1][1]
            assert run["numbers"]["plasticity_gap"] == pytest.approx(np.expm1(matrix[1, 1] - free))
            assert run["numbers"]["oracle_gap"] is None
            assert run["numbers"]["tokens"] == sum(stage["tokens"] for stage in report["stages"])
    gaps = [
        a["numbers"]["final_mean_nats"] - b["numbers"]["final_mean_nats"]
        for a, b in zip(lifelong["runs"], naive["runs"], strict=True)
    ]
    assert lifelong["differences"]["final_mean_nats"]["mean"] == pytest.approx(sum(gaps) / 2)
    assert lifelong["summary"]["leak_max"]["n"] == 2 and naive["summary"]["leak_max"] is None  # it did not grow


@pytest.mark.parametrize("width", [140, 80, 50])
def test_headings_of_runs_differ_at_any_width(width: int) -> None:
    names = [f"languages.grown_experts_and_replay_of_text.experts-{number}.s{number}" for number in (4, 8)]
    shown = []
    for name in names:
        file = io.StringIO()
        heading(Console(file=file, width=width), name, "training (12 of 40)")
        shown.append(file.getvalue())
        assert (
            f"experts-{name[-1]}.s{name[-1]}: training (12 of 40) ─" in file.getvalue().replace("…", "") or width < 80
        )
        assert f"{name[-2:]}: training (12 of 40)" in file.getvalue()
    assert shown[0] != shown[1] and shown[0].startswith("languages")


def test_only_some_arms(compare_yaml: Path, lab: Path, cli: Cli) -> None:
    result = cli("compare", "compare.yaml", "seeds=[0]", "--only", "lifelong", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert [run["status"] for arm in found["arms"] for run in arm["runs"]] == ["absent", "committed"]
    assert not found["complete"] and found["arms"][1]["runs"][0]["numbers"]["plasticity_gap"] is None
    assert "two.naive.s0: not committed yet" in (lab / "mlruns/comparisons/two/comparison.md").read_text()


def test_costs_beside_an_arm_and_other_distributions(compare_yaml: Path, lab: Path, cli: Cli) -> None:
    arms = ("arms.free=[method=unrestrained]", 'arms.wide=[method=sequential, "evaluate.also=[sea]"]')
    sea = "distributions.sea={files: sea.jsonl, heldout_fraction: 0.1}"
    result = cli("compare", "compare.yaml", sea, *arms, "--only", "naive", "--only", "free", "--only", "wide", "--json")
    assert result.code == 0, result.err
    by_name = {arm["name"]: arm for arm in json.loads(result.out)["arms"]}
    naive, free, wide = (by_name[name] for name in ("naive", "free", "wide"))
    # The same chain; what was trained beside it cost as much as the stage that learned the same text.
    for run, other in zip(free["runs"], naive["runs"], strict=True):
        report = json.loads((lab / f"mlruns/runs/{run['run']}/report.json").read_text())
        numbers, second = run["numbers"], report["stages"][1]
        assert (numbers["tokens"], numbers["active_flops"]) == (
            other["numbers"]["tokens"], other["numbers"]["active_flops"]
        )  # fmt: skip
        assert (numbers["scratch_tokens"], numbers["scratch_active_flops"]) == (
            second["tokens"], second["active_flops"]
        )  # fmt: skip
    assert naive["summary"]["scratch_tokens"]["mean"] == 0
    # The same models, measured on one more distribution.
    assert wide["differences"]["final_mean_nats"] is None
    assert wide["differences"]["forgetting_max"] == {
        "mean": 0.0, "low": 0.0, "high": 0.0, "n": 2, "lowest": 0.0, "highest": 0.0, "p": None,
    }  # fmt: skip
    tables = (lab / "mlruns/comparisons/two/comparison.md").read_text()
    beside = tables.partition("### Cost of models trained from scratch")[2].partition("###")[0]
    assert "| free | 1,536 | " in beside and "| naive |" not in beside
    assert "- wide was measured on other distributions than naive, so their means are not compared" in tables
