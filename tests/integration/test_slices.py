"""A part of the old text with a limit of its own, from the retraining file to the gate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lifelong_moe.config.data import SourceConfig
from lifelong_moe.data.text.sources import read_corpus
from lifelong_moe.errors import ConfigError, StalePlanError
from lifelong_moe.plan.retraining import load_retraining
from pipelines.retrain.plan_file import as_written
from tests.retrain_lab import arrive, ledger, stages, tick, tick_and_text, write_retraining


@pytest.fixture(autouse=True)
def lab(retraining_base: Path, known_stages: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of it to work in."""
    shutil.copytree(retraining_base, tmp_path / "lab")
    monkeypatch.chdir(tmp_path / "lab")


def test_a_slice_is_judged_beside_what_it_is_part_of() -> None:
    arrive("sea")
    write_retraining(gate={"slices": {"early": {"sources": "*1*", "data": "fruit", "tolerance": 0.002}}})
    result, text = tick_and_text()
    assert result["outcome"] == "promoted"
    assert (
        "✓ Slice early loses 0.0000 nats per token against the version before, with confidence at most 0.0000" in text
    )
    assert "against its best version, with confidence at most 0.0000; within 0.006." in text


def test_a_slice_that_nothing_is_part_of_costs_one_line_before_anything_is_trained() -> None:
    arrive("sea")
    write_retraining(gate={"slices": {"x": {"sources": "nobody"}}})
    before = ledger(), stages(), list(Path("mlruns/batches").glob("*"))
    with pytest.raises(ConfigError, match=r"^gate.slices.x.sources=nobody: no source of held-out text is named so; "):
        tick()
    assert (ledger(), stages(), list(Path("mlruns/batches").glob("*"))) == before


def test_a_slice_that_no_candidate_could_pass_is_refused_before_anything_is_trained() -> None:
    arrive("sea")
    one = read_corpus("fruit", SourceConfig(files="fruit.jsonl", heldout_fraction=0.1), Path("data/cache")).heldout[0]
    write_retraining(gate={"slices": {"few": {"sources": one.source}}})
    before = ledger(), stages()
    with pytest.raises(ConfigError, match=r"1 held-out document\(s\) are of it; at least 5 are needed"):
        tick()
    assert (ledger(), stages()) == before


def test_a_plan_with_slices_is_carried_out_and_says_what_they_are() -> None:
    arrive("sea")
    part = {"sources": "*1*", "data": "fruit", "tolerance": 0.002}
    write_retraining(gate={"slices": {"early": part}})
    plan = tick(dry_run=True)["plan"]
    assert json.loads(Path(plan).read_text(encoding="utf-8"))["gate"]["slices"] == {"early": part}
    write_retraining(gate={"slices": {"early": part | {"tolerance": None}}})
    with pytest.raises(StalePlanError):
        tick(plan=plan)
    write_retraining(gate={"slices": {"early": part}})
    assert tick(plan=plan)["outcome"] == "promoted"


def test_plans_and_waiting_batches_from_before_there_were_slices_stay_valid() -> None:
    gate = load_retraining("retrain.yaml").settings.gate
    assert "slices" not in as_written(gate) and as_written(gate)["tolerance"] == gate.tolerance
