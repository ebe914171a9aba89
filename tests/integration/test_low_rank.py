"""A run whose later generations change experts of the first by products of low rank: trained, read, moved on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.console import Console

from lifelong_moe.store.stages import StageStore
from lifelong_moe.store.trace import trace_expert
from lifelong_moe.training.derived import derived_stage
from lifelong_moe.training.restore import load_model
from pipelines.inspect.evaluate import evaluate_text
from tests.retrain_lab import arrive, base_config, tick_and_text, write_retraining
from tests.tiny import CONTEXT, SEQUENCES, STEPS, tiny_config, train, write_config

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
        assert [one.tensors for one in trace_expert([first, second, third], store.holders, name).stages] == trained
    assert evaluate_text("tiny", None, "sea.jsonl", None, Console(quiet=True))["nats_per_token"] < 6
    left = derived_stage(store, third, "code")
    architecture = load_model(store, left).architecture
    assert [(one.stage, one.rank) for one in architecture.generations] == [("fruit", 0), ("sea", 2)]


def test_text_of_experts_that_low_rank_ones_change_is_grown_for(lab: Path) -> None:
    config = base_config()
    config["stage_defaults"]["tokens"] = STEPS * SEQUENCES * CONTEXT
    config["stages"][1]["grow"] = {"rank": 2}
    train(write_config(config))
    write_retraining(stage={"grow": {"rank": 2}})
    Path("inbox").mkdir()
    arrive("fruit")
    # So low a limit that nothing has to be probed.
    outcome, printed = tick_and_text("limits.experts=4")
    assert outcome["outcome"] == "over budget" and "more than limits.experts=4" in outcome["reason"]
    assert "Continuing is not considered, and growing takes its place: stage fruit's experts do not train on" in printed
    assert "the new data did not drift" not in printed
    facts = json.loads(Path(outcome["plan"]).read_text())
    assert facts["decision"]["terms"]["drifted"] == 0
    # As for every batch above a limit, a plan of it is no plan to train.
    outcome, printed = tick_and_text("limits.experts=9", dry_run=True)
    assert "Growing gains" in printed and "Continuing gains" not in printed
