"""A stage on a mixture of distributions: what it trains on, what is measured of it, and what comes after it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lifelong_moe.config.load import read_config
from lifelong_moe.data.tokens.blocks import BlockDataset
from lifelong_moe.errors import ConfigError
from lifelong_moe.store.stages import StageStore
from pipelines.run.plan import plan
from pipelines.shared.output import silent
from tests import retrain_lab
from tests.tiny import SEQUENCES, STEPS, tiny_config, train, write_config, write_corpora


def mixed_config(**sections: Any) -> dict[str, Any]:
    """Fruit and the sea, then code with some fruit."""
    return tiny_config(({"data": {"fruit": 0.75, "sea": 0.25}}, {"data": {"code": 3, "fruit": 1}}), **sections)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The samples that each phase read, by number."""
    seen: list[set[int]] = []
    made, read = BlockDataset.__init__, BlockDataset.__getitem__

    def begin(self: BlockDataset, *arguments: Any) -> None:
        made(self, *arguments)
        self.seen = set()  # type: ignore[attr-defined]
        seen.append(self.seen)  # type: ignore[attr-defined]

    def note(self: BlockDataset, n: int) -> Any:
        self.seen.add(self._order.at(n)[0] * 10_000 + n)  # type: ignore[attr-defined]
        return read(self, n)

    monkeypatch.setattr(BlockDataset, "__init__", begin)
    monkeypatch.setattr(BlockDataset, "__getitem__", note)
    return seen


def test_each_distribution_has_its_share_of_the_training(lab: Path, drawn: list[set[int]]) -> None:
    write_config(mixed_config())
    report, printed = train()
    phases = [Counter(number // 10_000 for number in seen) for seen in drawn if len(seen) == STEPS * SEQUENCES]
    assert phases[0] == {0: 36, 1: 12}
    # A quarter is replayed sea; three quarters of the rest are code.
    assert phases[1] == {0: 27, 1: 9, 2: 12}
    first, second = report["stages"]
    assert (first["name"], first["data"], first["learns"]) == ("fruit-sea", "fruit", ["fruit", "sea"])
    # What it rehearses stays old text, which can be forgotten.
    assert (second["name"], second["data"], second["learns"]) == ("code-fruit", "code", ["code"])
    assert set(report["forgetting_bits_per_byte"]) == {"fruit", "sea"}
    passes = second["training"]["epochs_by_distribution"]
    assert second["epochs"] == max(passes.values()) and set(passes) == {"code", "fruit"}
    assert "fruit-sea: a mixture of fruit 75.0% (0.16 epochs), sea 25.0% (0.02 epochs)" in printed
    planned = plan(read_config("tiny.yaml"), silent())["stages"]
    assert planned[1]["mixture"] == {
        "code": {"share": 0.75, "epochs": passes["code"]},
        "fruit": {"share": 0.25, "epochs": passes["fruit"]},
    }
    assert planned[1]["epochs"] == second["epochs"]
    record = StageStore(Path("mlruns")).get(second["key"])
    assert set(record.split) == {"code", "fruit", "sea"} and record.spec.mix_weights == (3, 1)


def test_more_passes_than_allowed_are_refused_before_there_is_a_store(lab: Path) -> None:
    config = mixed_config()
    config["stages"][0]["max_epochs"] = 0.1
    write_config(config)
    with pytest.raises(ConfigError, match=r"^stages\[0\].max_epochs=0.1: fruit would be gone through 0.2 times"):
        train()
    assert not (lab / "mlruns").exists()


@pytest.mark.parametrize("method", ["joint", "unrestrained"])
def test_methods_for_comparison(lab: Path, method: str) -> None:
    write_config({**mixed_config(), "method": method})
    report, _ = train()
    if method == "joint":
        assert [stage["learns"] for stage in report["stages"]] == [["fruit", "sea", "code"]]
        return
    # The model from scratch learned the second stage's mixture, of which code is new.
    scratch = report["from_scratch"]
    assert set(scratch) == {"code"} and scratch["code"]["tokens"] == STEPS * SEQUENCES * 32 * 3 // 4


@pytest.mark.parametrize(
    ("routing", "model"),
    [
        ({"mode": "cluster", "sample_tokens": 2048}, {}),
        ({"mode": "label"}, {}),
        ({"bundles": "cluster", "chunk_tokens": 4, "clusters": 2}, {"document_mask": True}),
        ({"bundles": "cluster", "mixture": None, "chunk_tokens": 4, "clusters": 2}, {"document_mask": True}),
    ],
)
def test_a_generation_is_the_whole_mixtures(lab: Path, routing: dict[str, Any], model: dict[str, Any]) -> None:
    write_config(mixed_config(routing=routing, model=model, stage_defaults={"trunk": {"train": "frozen"}}))
    report, _ = train()
    second = StageStore(Path("mlruns")).get(report["stages"][1]["key"])
    assert [one.stage for one in second.architecture.generations] == ["fruit-sea", "code-fruit"]
    assert dict(second.architecture.labels) == {"sea": 0, "fruit": 1, "code": 1}


def test_mlflow_has_the_text_and_the_epochs_of_each_distribution(lab: Path, template: Path) -> None:
    from mlflow import MlflowClient

    (lab / "mlruns").mkdir()
    shutil.copy(template, lab / "mlruns/mlflow.db")
    write_config(mixed_config(tracking={"enabled": True}))
    report, _ = train()
    head = json.loads(Path("mlruns/runs/tiny/head.json").read_text())
    client = MlflowClient(f"sqlite:///{Path('mlruns/mlflow.db').absolute()}")
    run = client.get_run(head["mlflow"]["stages"][report["stages"][1]["key"]])
    contexts = {one.dataset.name: one.tags[0].value for one in run.inputs.dataset_inputs}
    assert contexts == {"code": "training", "fruit": "training", "sea": "replay"}
    passes = report["stages"][1]["training"]["epochs_by_distribution"]
    assert {name: run.data.metrics[f"usage_epochs/{name}"] for name in passes} == passes
    assert (run.data.params["mixture.others"], run.data.params["mixture.weights"]) == ('["fruit"]', "[3, 1]")


def test_a_first_champion_may_have_learned_a_mixture(lab: Path) -> None:
    write_corpora(lab)
    config = retrain_lab.base_config()
    config["stages"] = [{"data": {"fruit": 3, "code": 1}}]
    write_config(config)
    train()
    retrain_lab.write_retraining()
    Path("inbox").mkdir()
    retrain_lab.arrive("sea")
    outcome = retrain_lab.tick()
    assert outcome["outcome"] in ("promoted", "rejected"), outcome
    head = retrain_lab.head()
    (base,) = head["versions"][0]["stages"]
    assert (base["data"], base["mixed"]) == ("fruit", ["code"])
    # Each of its distributions is old text with a bound of its own.
    assert set(head["best"]) >= {"fruit", "code"}
