"""Fewer experts: merged, gated, served or kept aside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lifelong_moe.errors import ConfigError
from lifelong_moe.evaluation.measurements import Measurements
from lifelong_moe.retraining.bounds import DocumentLosses
from lifelong_moe.store.runs import require_head
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.restore import load_model
from pipelines.inspect.evaluate import evaluate_text
from pipelines.inspect.generate import generate_text
from pipelines.inspect.inspect import inspect_stage
from pipelines.shared.options import InspectionRequest, SamplingOptions
from pipelines.versions.consolidate import consolidate
from pipelines.versions.rollback import rollback
from tests.known_stages import use_known_stages
from tests.retrain_lab import head
from tests.tiny import tiny_config, train, write_config, write_corpora

SILENT = Console(quiet=True)
MLRUNS = Path("mlruns")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two stages with a learned router."""
    root = tmp_path_factory.mktemp("consolidate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        use_known_stages(patch, tmp_path_factory)
        write_corpora(root)
        write_config(tiny_config(("fruit", "code", "fruit")))
        train()
    return root


@pytest.fixture(autouse=True)
def lab(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in."""
    root = tmp_path / "lab"
    shutil.copytree(base, root)
    monkeypatch.chdir(root)
    return root


def served() -> list[str]:
    return [stage.name for stage in require_head(MLRUNS, "tiny").champion.stages]


def test_a_stage_with_fewer_experts_serves_and_can_be_undone() -> None:
    files = {path: path.read_bytes() for path in Path("mlruns/stages").rglob("*") if path.is_file()}
    result = consolidate("tiny", "fruit", 1, SILENT, ["gate.tolerance=9"])
    store = StageStore(MLRUNS)
    before, after = store.chain(result["key"])[-2:]
    old, new = load_model(store, before), load_model(store, after)
    first = old.architecture.generations[0].experts
    assert result["outcome"] == "promoted" and served()[-1] == "fruit.consolidated"
    assert new.architecture.generations[0].experts == first - 1
    assert [one["layer"] for one in result["merged"]] == list(range(old.architecture.model.layers))
    assert torch.equal(new.embedding.weight, old.embedding.weight)  # and is borrowed
    assert all(path.read_bytes() == content for path, content in files.items())
    assert json.loads(Path("mlruns/runs/tiny/ledger.jsonl").read_text().splitlines()[-1])["event"] == "consolidate"
    again = consolidate("tiny", "code", 1, SILENT, ["gate.tolerance=9"])
    assert served()[-1] == "code.consolidated" and again["key"] != result["key"]
    rollback("tiny", None, SILENT)
    rollback("tiny", 0, SILENT)
    assert consolidate("tiny", "fruit", 1, SILENT, ["gate.tolerance=9"])["key"] == result["key"]  # found again


def test_models_are_read_on_the_device_of_the_run(caplog: pytest.LogCaptureFixture) -> None:
    path = Path("mlruns/runs/tiny/head.json")
    recorded = json.loads(path.read_text())
    recorded["config"]["trainer"] |= {"accelerator": "gpu", "devices": [1]}
    path.write_text(json.dumps(recorded))
    for read in (
        lambda: evaluate_text("tiny", None, "sea.jsonl", None, SILENT),
        lambda: generate_text("tiny", None, "apple", SamplingOptions(max_new_tokens=2, temperature=0.0), SILENT),
        lambda: inspect_stage("tiny", None, InspectionRequest(text="apple"), SILENT),
        lambda: inspect_stage("tiny", None, InspectionRequest(tokens=200), SILENT),
        lambda: consolidate("tiny", "fruit", 1, SILENT, ["gate.tolerance=9"]),
    ):
        caplog.clear()
        read()
        # It is asked for, and told where a machine does not have it.
        told = [message for message in caplog.messages if "using the CPU instead" in message]
        assert told and all("trainer.accelerator=gpu, trainer.devices=[1]" in message for message in told)


def test_what_gets_worse_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    before, measured = head()["plan"], Measurements.losses

    def worse(self: Measurements, key: str, name: str) -> DocumentLosses:
        losses = measured(self, key, name)
        lost = losses.tokens * 0.1 * (StageStore(MLRUNS).get(key).name == "fruit.consolidated")
        return DocumentLosses(losses.nats + lost, losses.tokens, losses.sources)

    monkeypatch.setattr(Measurements, "losses", worse)
    result = consolidate("tiny", "fruit", 1, SILENT)
    assert result["outcome"] == "rejected" and head()["plan"] == before
    assert StageStore(MLRUNS).find(result["key"]) is not None


@pytest.mark.parametrize(
    ("stage", "experts", "message"),
    [
        ("fruit", 2, r"--experts=2: stage fruit has 2 experts a layer"),
        ("soup", 1, "holds no experts born in stage soup"),
        ("fruit-2", 1, "must be frozen"),
    ],
)
def test_what_cannot_be_merged(stage: str, experts: int, message: str) -> None:
    before = head()
    with pytest.raises(ConfigError, match=message):
        consolidate("tiny", stage, experts, SILENT)
    assert head() == before
