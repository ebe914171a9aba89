"""What has no effect on a stage changes none of its bits, so arms that differ in it share the stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor

from lifelong_moe.config.load import read_config
from lifelong_moe.config.model import Activation
from lifelong_moe.config.retention import TrunkConfig, TrunkTraining
from lifelong_moe.config.routing.base import BalanceOver, Bundles, Centroids, RoutingConfig
from lifelong_moe.config.training import CheckpointConfig, FrozenConfig, Schedule, TrainerConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.comparison import load_comparison
from lifelong_moe.plan.key import stage_key
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.store.garbage import collect
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.training.callbacks.interrupt import Interrupt
from lifelong_moe.training.continuing import continued_model
from lifelong_moe.training.loop.context import StageEnvironment
from lifelong_moe.training.restore import load_model
from lifelong_moe.training.stage import train_stage
from pipelines.compare.compare import compare
from pipelines.shared.workspace import Prepared, prepare
from tests.tiny import hashes, tiny_config, train, write_config

SILENT = Console(quiet=True)
FROZEN: dict[str, Any] = {"trunk": {"train": "frozen"}}
BUNDLES = {"bundles": "cluster", "chunk_tokens": 4, "clusters": 2}


@pytest.fixture(autouse=True)
def any_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages have keys of the tests' own, or of settings that the tests treat as an earlier version did."""
    monkeypatch.setattr("lifelong_moe.store.stages.require_own_key", lambda *_: None)


def stage_of(prepared: Prepared, spec: StageSpec, key: str, parent: CommittedStage | None = None) -> CommittedStage:
    """A stage trained by a specification just as it is, whatever of it has no effect."""
    environment = StageEnvironment(
        store=StageStore(Path("mlruns")),
        work=Path("mlruns/work"),
        trainer=prepared.config.trainer,
        checkpoint=CheckpointConfig(),
        frozen=FrozenConfig(),
        interrupt=Interrupt(),
        console=SILENT,
        send=lambda points: None,
    )
    planned = replace(prepared.plan[0 if parent is None else 1], spec=spec, key=key)
    return train_stage(planned, parent, prepared.data, environment)


def tensors_of(stage: CommittedStage) -> dict[str, Tensor]:
    return StageStore(Path("mlruns")).tensors(stage)


def optim(spec: StageSpec, **changes: Any) -> StageSpec:
    return replace(spec, optim=replace(spec.optim, **changes))


def bundled_config() -> dict[str, Any]:
    return tiny_config(model={"document_mask": True}, routing=BUNDLES, stage_defaults=FROZEN)


def routing(spec: StageSpec, **changes: Any) -> StageSpec:
    return replace(spec, routing=replace(spec.routing, **changes))


def test_the_first_stage_is_the_same_bits_whatever_later_ones_need(lab: Path) -> None:
    prepared = prepare(read_config(write_config(tiny_config(model={"document_mask": True})), []))
    spec = prepared.plan[0].spec
    others = {
        "bundles": routing(spec, bundles=Bundles.cluster, clusters=2, chunk_tokens=4),
        "labels": routing(spec, bundles=Bundles.label),
        "margin": routing(spec, margin=0.0, feature_width=5, centroids=Centroids.random),
        "balance": routing(spec, balance_over=BalanceOver.active),
        "rewarm": optim(spec, rewarm=0.1, router_until=0.1),
        "decay": optim(spec, decay_fraction=0.9),  # the schedule is a cosine
        "dense": replace(spec, model=replace(spec.model, dense_width=3, dense_activation=Activation.relu)),
    }
    first = tensors_of(stage_of(prepared, spec, "0" * 64))
    for digit, (what, other) in enumerate(others.items(), start=1):
        assert other != spec and stage_key(other, None, prepared.data.identity) == stage_key(
            spec, None, prepared.data.identity
        ), what
        found = tensors_of(stage_of(prepared, other, str(digit) * 64))
        assert all(torch.equal(found[name], tensor) for name, tensor in first.items()), what
        assert set(found) - set(first) == ({"document_clusters.centroids_0"} if what == "bundles" else set())
    moved = tensors_of(stage_of(prepared, optim(spec, schedule=Schedule.constant), "a" * 64))
    assert not torch.equal(moved["embedding.weight"], first["embedding.weight"])


def test_a_later_stage_is_the_same_bits_whatever_it_does_not_use(lab: Path) -> None:
    prepared = prepare(read_config(write_config(tiny_config(stage_defaults={"trunk": {"train": "full"}})), []))
    one, two = prepared.plan
    parent = stage_of(prepared, one.spec, one.key)
    spec = two.spec
    assert spec.grow is not None and spec.grow.freezes
    others = {
        "trunk": replace(spec, trunk=TrunkConfig(train=TrunkTraining.full, lr_scale=0.5, rank=3)),
        "gentle": replace(spec, trunk=TrunkConfig(train=TrunkTraining.gentle, lr_scale=1.0)),
        "layers": replace(spec, grow=replace(spec.grow, layers=[0, 1], old_until=0.5, min_share=0.5)),
        "margin": routing(spec, margin=0.0, clusters=3),
    }
    same = tensors_of(stage_of(prepared, spec, "0" * 64, parent))
    for digit, (what, other) in enumerate(others.items(), start=1):
        assert other != spec and stage_key(other, "p", prepared.data.identity) == stage_key(
            spec, "p", prepared.data.identity
        ), what
        found = tensors_of(stage_of(prepared, other, str(digit) * 64, parent))
        assert found.keys() == same.keys() and all(torch.equal(found[name], same[name]) for name in same), what


def test_bundles_go_on_from_a_stage_that_was_trained_without(lab: Path) -> None:
    config = tiny_config(model={"document_mask": True})
    train(write_config(config))
    with_bundles = write_config(bundled_config(), "bundles.yaml")
    report, printed = train(with_bundles, "run=bundled")
    assert "fruit (shared)" in printed and hashes()[0] == hashes(run_name="bundled")[0]
    assert [stage["routing"] for stage in report["stages"]] == ["learned", "learned, bundles by cluster"]
    store = StageStore(Path("mlruns"))
    head = json.loads(Path("mlruns/runs/bundled/head.json").read_text())
    first, second = (store.get(key) for key in head["stages"])
    model = load_model(store, second)
    assert model.document_clusters is not None
    fitted = [centroids.any(dim=1).tolist() for centroids in model.document_clusters.all_centroids()]
    assert fitted == [[True, True], [True, True]]
    kept = store.tensors(store.get(head["centroids"]))
    assert list(kept) == ["document_clusters.centroids_0"]
    assert torch.equal(kept["document_clusters.centroids_0"], model.document_clusters.all_centroids()[0])
    assert "document_clusters.centroids_0" not in store.tensors(first)
    naive, _ = train(with_bundles, "run=naive", "method=sequential")  # has one generation, hence no bundles at all
    assert [stage["routing"] for stage in naive["stages"]] == ["learned", "learned"]
    assert naive["stages"][0]["shared"]
    far = 10.0**10  # everything is old by then
    assert not collect(Path("mlruns"), Path("data/cache"), far).stages
    again, printed = train(with_bundles, "run=bundled")
    assert "Nothing to train" in printed and again == report


def test_the_first_stage_s_text_is_read_once(lab: Path) -> None:
    """A later stage finds its centroids committed; were they lost, the text would be asked for."""
    path = write_config(bundled_config())
    prepared = prepare(read_config(path))
    one, two = prepared.plan
    train(path)
    store = StageStore(Path("mlruns"))
    first = store.get(one.key)
    elsewhere = {name: replace(corpus, split_hash="0" * 64) for name, corpus in prepared.data.corpora.items()}
    found = replace(prepared, data=replace(prepared.data, corpora=elsewhere))
    assert stage_of(found, two.spec, "0" * 64, first).weights_hash == store.get(two.key).weights_hash
    with pytest.raises(ConfigError, match=r"text that stage fruit learned, but distributions\.fruit no longer is"):
        stage_of(found, routing(two.spec, clusters=3), "1" * 64, first)


def test_a_comparison_of_what_comes_later_trains_the_base_once(lab: Path) -> None:
    write_config(tiny_config(model={"document_mask": True}))
    off = ["stage_defaults.replay.fraction=0", "stage_defaults.distill.weight=0"]
    frozen = ["stage_defaults.trunk.train=frozen"]
    arms = {
        "plain": [],
        "bundles": ["routing.bundles=cluster", "routing.clusters=2", *frozen, *off],
        "frozen": frozen,
        "rewarmed": ["stage_defaults.optim.rewarm=0.5"],
        "naive": ["method=sequential"],
    }  # fmt: skip
    Path("compare.yaml").write_text(yaml.safe_dump({"compare": "c", "base": "tiny.yaml", "arms": arms}))
    found = compare(load_comparison("compare.yaml"), [], False, SILENT)
    assert {run["status"] for arm in found["arms"] for run in arm["runs"]} == {"committed"}
    names = sorted(path.name.rsplit("-", 1)[0] for path in Path("mlruns/stages").iterdir())
    assert names == ["code"] * 5 + ["fruit", "fruit.centroids"]
    evaluations = len(list(Path("mlruns/evaluations").iterdir()))
    assert evaluations == 1 + 1 + 5  # with both distributions: of the untrained model, the base and five second stages


def test_a_first_stage_of_an_earlier_version_is_gone_on_with(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was stored with keys that had no effect as they were written, and with bundles with its centroids."""
    by_document = {"mode": "cluster", "level": "document", "top_k": 1, "sample_tokens": 9000}
    bundled = {**BUNDLES, "clusters": 3}
    for name, routing, fitted in (("documents", by_document, None), ("bundles", bundled, 3), ("refitted", bundled, 5)):
        settings: dict[str, Any] = {"model": {"document_mask": True, "experts": 4}, "routing": routing}
        settings["stage_defaults"] = FROZEN
        with monkeypatch.context() as patch:
            patch.setattr(RoutingConfig, "effective", lambda self, *, grown: self)
            train(write_config(tiny_config(("fruit",), **settings) | {"run": name}, f"{name}.yaml"))
        if fitted:
            settings["routing"] = {**routing, "clusters": fitted}
        path = write_config(tiny_config(**settings) | {"run": f"{name}-next"}, f"{name}-next.yaml")
        prepared, store = prepare(read_config(path)), StageStore(Path("mlruns"))
        parent = store.get(json.loads(Path(f"mlruns/runs/{name}/head.json").read_text())["stages"][0])
        model = continued_model(store, parent, prepared.plan[1].spec.routing, prepared.data.corpora, TrainerConfig())
        assert model.document_clusters is not None
        centroids = model.document_clusters.all_centroids()[0]
        assert bool(centroids.any()) and (fitted is None or len(centroids) == fitted)
