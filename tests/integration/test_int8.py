"""A stage that holds frozen experts in eight bits commits the bits that were stored before."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.restore import load_model
from pipelines.inspect.evaluate import evaluate_text
from tests.tiny import tiny_config, train, write_config


def test_stored_bits_stay(lab: Path) -> None:
    config = tiny_config()
    config["stage_defaults"]["grow"]["frozen_weights"] = "int8"
    report, _ = train(write_config(config))
    full, _ = train("tiny.yaml", "run=full", "stage_defaults.grow.frozen_weights=full")
    store = StageStore(Path("mlruns"))
    first, second = (store.get(stage["key"]) for stage in report["stages"])
    assert full["stages"][0]["key"] == first.key  # the same stage 0, another stage 1
    assert full["stages"][1]["weights_sha256"] != report["stages"][1]["weights_sha256"]
    old, new = store.tensors(first), store.tensors(second)
    frozen = load_model(store, second).stored_names(trained=False)
    assert frozen and all(torch.equal(old[name], new[name]) for name in frozen)
    for ours, theirs in zip(report["loss_nats_per_token"][1], full["loss_nats_per_token"][1], strict=True):
        assert abs(ours - theirs) < 0.02
    silent = Console(quiet=True)
    whole = evaluate_text("tiny", None, "fruit.jsonl", None, silent)["nats_per_token"]
    held = evaluate_text("tiny", None, "fruit.jsonl", None, silent, int8=True)["nats_per_token"]
    assert 0 < abs(held - whole) < 0.02
