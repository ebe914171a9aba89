"""A stage that trains an older stage's experts on: nothing else moves, in any way of routing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lifelong_moe.config.load import read_config
from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.store.stages import StageStore
from pipelines.shared.workspace import prepare
from tests.tiny import hashes, tiny_config, train, write_config, write_corpora

BUNDLES = {
    "model": {"document_mask": True},
    "routing": {"bundles": "cluster", "chunk_tokens": 4},
    "stage_defaults": {"trunk": {"train": "deltas", "rank": 2}, "replay": {"fraction": 0}, "distill": {"weight": 0}},
}
ROUTINGS: dict[str, dict[str, Any]] = {
    "learned": {"stage_defaults": {"trunk": {"train": "frozen"}}},
    "bundles": BUNDLES,
    "label": {**BUNDLES, "routing": {"mode": "label"}},
}


@pytest.fixture(autouse=True)
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with corpora."""
    monkeypatch.chdir(tmp_path)
    write_corpora(tmp_path)
    return tmp_path


def config_of(continues: str, **sections: Any) -> dict[str, Any]:
    """Two stages, then one on more text that goes on with the experts of one of them."""
    config = tiny_config(("fruit", "code", "sea"))
    for name, value in sections.items():
        for key, setting in value.items():
            old = config[name].get(key) if name in config else None
            merged = {**old, **setting} if isinstance(old, dict) and isinstance(setting, dict) else setting
            config.setdefault(name, {})[key] = merged
    config["stages"] = [{"data": "fruit"}, {"data": "code"}, {"data": "sea", "continues": continues}]
    return config


def models(num: int) -> list[dict[str, Tensor]]:
    """All tensors of each stage's model."""
    store = StageStore(Path("mlruns"))
    plan = prepare(read_config("tiny.yaml")).plan
    return [store.tensors(store.get(planned.key)) for planned in plan][:num]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("continues", ["fruit", "code"])
def test_only_the_continued_experts_change(routing: str, continues: str) -> None:
    write_config(config_of(continues, **ROUTINGS[routing]))
    train()
    _, before, after = models(3)
    changed = {name for name in after if not after[name].equal(before[name])}
    generation = 0 if continues == "fruit" else 1
    experts = {f".experts.{e}." for e in (range(2) if generation == 0 else range(2, 4))}
    own = {f".rows.{generation}", f".deltas.{generation}."} | experts
    assert changed and set(before) == set(after)
    assert not [name for name in changed if not any(part in f"{name}" for part in own)]
    assert any(".experts." in name for name in changed)
    if routing != "learned" and generation == 1:
        assert any(".deltas.1." in name for name in changed)


def test_it_is_planned_stored_and_grown_from() -> None:
    config = config_of("fruit", **BUNDLES)
    config["stages"].append({"data": "code", "name": "more"})
    write_config(config)
    plan = prepare(read_config("tiny.yaml")).plan
    assert plan[2].parameters.total == plan[1].parameters.total
    assert plan[2].trainable == plan[0].parameters.unfrozen  # two experts and two rows a layer, and no trunk
    report, _ = train()
    assert [stage["experts_per_layer"] for stage in report["stages"]] == [2, 4, 4, 6]
    assert [stage["parameters_trainable"] for stage in report["stages"]] == [p.trainable for p in plan]
    store = StageStore(Path("mlruns"))
    stage = store.get(plan[2].key)
    architecture = stage.architecture
    assert (architecture.continued, architecture.frozen) == (0, 2)
    assert Architecture.from_json(plan[3].architecture.to_json()).continued is None
    assert sorted(store.holders(stage))[0] == "blocks.0.attention.key.deltas.1.down"


def test_the_label_of_continued_text_is_the_old_one() -> None:
    write_config(config_of("fruit", **ROUTINGS["label"]))
    plan = prepare(read_config("tiny.yaml")).plan
    assert plan[2].architecture.labels == (("fruit", 0), ("code", 1), ("sea", 0))


def test_continuing_is_deterministic_and_part_of_the_key() -> None:
    write_config(config_of("fruit", **BUNDLES))
    train()
    first, other = hashes(), prepare(read_config("tiny.yaml", ["stages[2].continues=code"])).plan
    assert (
        other[2].key != prepare(read_config("tiny.yaml")).plan[2].key
        and other[1].key == prepare(read_config("tiny.yaml")).plan[1].key
    )
    for path in Path("mlruns/stages").glob("sea-*/*"):
        path.unlink()
    for path in Path("mlruns/stages").glob("sea-*"):
        path.rmdir()
    train()
    assert hashes() == first


@pytest.mark.parametrize(
    ("name", "message"),
    [("cod", "stages[2].continues=cod is unknown. Did you mean code?"), ("sea", "stages[2].continues=sea is unknown")],
)
def test_only_an_earlier_stage_with_experts_can_be_continued(name: str, message: str) -> None:
    write_config(config_of(name))
    with pytest.raises(ConfigError) as refused:
        prepare(read_config("tiny.yaml"))
    assert str(refused.value).startswith(message)
