"""What earlier versions committed stays readable: a run of two stages with bundles, as commit 217e367 left it.

``earlier/mlruns`` is its output without MLflow (schema 3 of stage keys, schema 2 of reports), ``recorded.json`` what
that version said of ``text.txt``, and of ``def return self value`` as a prompt, without sampling.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

from lifelong_moe.config.load import build_config, read_config
from lifelong_moe.config.retention import TrunkConfig
from lifelong_moe.config.training import CheckpointConfig, FrozenConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.callbacks.interrupt import Interrupt
from lifelong_moe.training.loop.context import StageEnvironment
from lifelong_moe.training.loop.optimizer import freeze_trunk
from lifelong_moe.training.restore import load_model
from lifelong_moe.training.stage import train_stage
from pipelines.inspect import trace
from pipelines.inspect.evaluate import evaluate_text
from pipelines.inspect.generate import generate_text
from pipelines.inspect.lineage import show_lineage
from pipelines.inspect.report import show_report
from pipelines.inspect.status import show_status
from pipelines.shared.options import SamplingOptions
from pipelines.shared.workspace import prepare
from tests.tiny import VOCABULARIES, train, write_config, write_corpus

EARLIER = Path(__file__).with_name("earlier")
SILENT = Console(quiet=True)
STAGES = ("fruit", "code")


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A copy to work in, with the text that was trained on; returns what was recorded."""
    shutil.copytree(EARLIER, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(STAGES):
        write_corpus(Path(f"{name}.jsonl"), VOCABULARIES[name].split(), seed, 40)
    recorded: dict[str, Any] = json.loads(Path("recorded.json").read_text())
    return recorded


def earlier_config() -> str:
    head: dict[str, Any] = json.loads(Path("mlruns/runs/old/head.json").read_text())
    return write_config(head["config"], "old.yaml")


def said(command: Any) -> str:
    printed = io.StringIO()
    command(Console(file=printed, width=200))
    return printed.getvalue()


def test_status_report_and_lineage_read_it() -> None:
    status = said(lambda console: show_status("old", console))
    assert all(re.search(rf"{name}.*committed", status) for name in STAGES)
    report = said(lambda console: show_report(["old"], console))
    counts = json.loads(Path("mlruns/runs/old/report.json").read_text())["expert_counts"]
    unused = int((np.array(counts["fruit"]) + np.array(counts["code"]) == 0).sum())
    assert re.search(rf"experts that no distribution uses\W+{unused}\b", report)
    lineage = said(lambda console: show_lineage("old", console))
    assert "fruit/L0..1/E0..1" in lineage and "code/L0..1/E2..3" in lineage


@pytest.mark.parametrize("stage", STAGES)
def test_it_says_what_it_said(stage: str, kept: dict[str, Any]) -> None:
    sampling = SamplingOptions(max_new_tokens=24, temperature=0.0, top_p=1.0)
    generated = generate_text("old", stage, "def return self value", sampling, SILENT)
    assert generated["text"] == kept["generated"][stage]
    measured = evaluate_text("old", stage, "text.txt", None, SILENT)
    for key, value in kept["evaluated"][stage].items():
        assert measured[key] == pytest.approx(value, rel=1e-6), key


def test_the_same_configuration_is_told_that_the_stages_are_older() -> None:
    message = (
        r"run=old exists with another configuration .*, or --replace .* Stage fruit was trained by an earlier version"
    )
    with pytest.raises(ConfigError, match=message):
        train(earlier_config())


def test_a_new_stage_goes_on_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As retraining does: from the first stage, whose centroids it holds itself, and from the second."""
    trained: list[LanguageModel] = []
    # The stages trained here have keys of the test's own.
    monkeypatch.setattr("lifelong_moe.store.stages.require_own_key", lambda *_: None)

    def seen(model: LanguageModel, trunk: TrunkConfig | None) -> None:
        trained.append(model)
        freeze_trunk(model, trunk)

    monkeypatch.setattr("lifelong_moe.training.preparation.freeze_trunk", seen)
    path = earlier_config()
    prepared, store = prepare(read_config(path)), StageStore(Path("mlruns"))
    head = json.loads(Path("mlruns/runs/old/head.json").read_text())
    planned = prepared.plan[1]
    environment = StageEnvironment(
        store=store,
        work=Path("mlruns/work"),
        trainer=prepared.config.trainer,
        checkpoint=CheckpointConfig(),
        frozen=FrozenConfig(),
        interrupt=Interrupt(),
        console=SILENT,
        send=lambda points: None,
    )
    for i, key in enumerate(head["stages"]):
        parent = store.get(key)
        grows = replace(planned, spec=replace(planned.spec, name=f"new-{i}"), key=str(i) * 64)
        stage = train_stage(grows, parent, prepared.data, environment)
        old, new = store.tensors(parent), store.tensors(stage)
        assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
        # Its 0.01 was a factor of a mean over layers, and what is trained now is a sum.
        routings = [one.architecture.routing for one in (parent, stage)]
        assert [routing.balance_loss for routing in routings] == [0.01, 0.0025]
        assert {layer.router.config.balance_loss for layer in trained.pop().moe_layers()} == {0.0025}
        assert len(stage.architecture.generations) == i + 2
        assert load_model(store, stage).document_clusters is not None


def test_settings_that_are_refused_today_may_stand_in_a_run_of_then() -> None:
    """``sample_tokens`` does nothing with learned routing: a new run may not have it, and that one may be looked at."""
    path = Path("mlruns/runs/old/head.json")
    head = json.loads(path.read_text())
    head["config"].setdefault("routing", {})["sample_tokens"] = 100_000
    path.write_text(json.dumps(head))
    text = json.loads(Path("fruit.jsonl").read_text().splitlines()[0])["text"]
    assert build_config(OmegaConf.create(head["config"]), is_stored=True).routing.to_json()["sample_tokens"] == 32_768
    found = trace.document("old", hashlib.sha256(text.encode()).hexdigest(), SILENT)
    assert found["held_by"][0]["distribution"] == "fruit"
    with pytest.raises(ConfigError, match=r"routing\.sample_tokens .* has no effect without model\.from"):
        build_config(OmegaConf.create(head["config"]))
