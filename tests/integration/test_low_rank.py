"""A run whose later generations change experts of the first by products of low rank: trained, read, moved on."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from lifelong_moe.store.stages import StageStore
from lifelong_moe.store.trace import trace_expert
from lifelong_moe.training.derived import derived_stage
from lifelong_moe.training.restore import load_model
from pipelines.inspect.evaluate import evaluate_text
from tests.tiny import tiny_config, train, write_config

NAMES = ("base", "down_a", "down_b", "gate_up_a", "gate_up_b")


def test_low_rank_experts_are_stored_traced_evaluated_and_dropped(lab: Path) -> None:
    config = tiny_config(("fruit", "code", "sea"))
    config["stage_defaults"]["grow"] |= {"rank": 2, "frozen_weights": "int8"}
    report, _ = train(write_config(config))
    store = StageStore(Path("mlruns"))
    first, second, third = (store.get(stage["key"]) for stage in report["stages"])
    old, new = store.tensors(first), store.tensors(third)
    assert {name.rsplit(".", 1)[1] for name in new if ".experts.2." in name} == set(NAMES)
    assert all(torch.equal(old[name], new[name]) for name in old if ".experts." in name)
    # An expert that is traced, and one of another kind.
    for name, trained in (("code/L1/E2", ["trained", "borrowed"]), ("fruit/L0/E1", ["trained"] + 2 * ["borrowed"])):
        assert [one.tensors for one in trace_expert([first, second, third], name).stages] == trained
    assert evaluate_text("tiny", None, "sea.jsonl", None, Console(quiet=True))["nats_per_token"] < 6
    left = derived_stage(store, third, "code")
    architecture = load_model(store, left).architecture
    assert [(one.stage, one.rank) for one in architecture.generations] == [("fruit", 0), ("sea", 2)]
