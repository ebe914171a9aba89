"""Runs of earlier versions whose file says ``method: lifelong`` and no more of it."""

from __future__ import annotations

from pathlib import Path

from lifelong_moe.store.runs import require_head
from pipelines.preflight import read_retraining
from tests.e2e.conftest import Cli
from tests.tiny import tiny_config, write_config


def test_a_run_that_was_begun_before_goes_on_as_it_was(lab: Path, cli: Cli) -> None:
    config = tiny_config()
    assert "bundles" not in config.get("routing", {})
    for key in ("replay", "distill", "trunk"):
        config["stage_defaults"].pop(key, None)
    # Without the word, the file means what it meant to earlier versions with it.
    write_config(config)
    assert cli("run", "tiny.yaml").code == 0
    keys = require_head(Path("mlruns"), "tiny").plan
    write_config(config | {"method": "lifelong"})
    result = cli("run", "tiny.yaml")
    assert result.code == 0 and "Nothing to train" in result.out, result.err
    assert "run=tiny was begun when method: lifelong alone meant replay" in result.out
    assert require_head(Path("mlruns"), "tiny").plan == keys
    Path("retrain.yaml").write_text("base: tiny.yaml\ninbox: {path: inbox}\n")
    assert "bundles" not in read_retraining("retrain.yaml", []).base.get("routing", {})
    assert read_retraining("retrain.yaml", ["run=other"]).base.routing.bundles == "cluster"
    planned = cli("plan", "tiny.yaml", "run=other", "--json")
    assert planned.code == 0 and keys[1] not in planned.out


def test_a_run_that_was_begun_with_overrides_goes_on_with_its_own_command(lab: Path, cli: Cli) -> None:
    config = tiny_config()
    for key in ("replay", "distill", "trunk"):
        config["stage_defaults"].pop(key, None)
    trained_on = ["run=q", "stages[1].grow.experts=0"]
    by_hand = ["run=h", "routing.bundles=cluster", "model.document_mask=true", "stage_defaults.trunk.train=deltas"]
    for overrides in (trained_on, [*by_hand, "routing.clusters=2"]):
        write_config(config)
        assert cli("run", "tiny.yaml", *overrides).code == 0
        write_config(config | {"method": "lifelong"})
        planned = cli("plan", "tiny.yaml", *overrides)
        assert planned.code == 0 and "exists with other stages" not in planned.out, planned.err
        assert "was begun when method: lifelong alone meant replay" in planned.out
