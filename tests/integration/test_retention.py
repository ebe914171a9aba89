"""What holds old knowledge in place, in whole stages: review, penalties, generated text, deltas, partial growth."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lifelong_moe.config.load import read_config
from lifelong_moe.data.tokens.prepare import PreparedData
from lifelong_moe.errors import CorruptError
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.plan.planned import PlannedStage
from lifelong_moe.retention.generated import generate_blocks
from lifelong_moe.retention.penalty import WeightAnchor, fisher_diagonal
from lifelong_moe.store.lineage import lineage_rows
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.training import preparation
from lifelong_moe.training import stage as stages
from lifelong_moe.training.callbacks.progress import StepCheckpoint
from lifelong_moe.training.loop import phase as phases
from lifelong_moe.training.loop.data import text_sample
from lifelong_moe.training.loop.module import StageModule
from lifelong_moe.training.preparation import _importances
from lifelong_moe.training.restore import load_model
from pipelines.shared.workspace import prepare
from tests.tiny import CONTEXT, STEPS, fork, kill_self, stored_evaluations, tiny_config, train, write_config

ONE = {"top_k": 1, "renormalize": False}


def stage(name: str) -> CommittedStage:
    """The committed stage of this name; a test has one."""
    (path,) = Path("mlruns/stages").glob(f"{name}-*/config.json")
    return StageStore(Path("mlruns")).get(json.loads(path.read_text())["key"])


def tensors(name: str) -> dict[str, Tensor]:
    """All tensors of a stage's model."""
    return StageStore(Path("mlruns")).tensors(stage(name))


@pytest.fixture
def at_last_step(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Tensor]]:
    """What the model was at the end of each phase, by ``stage/phase``."""
    seen: dict[str, dict[str, Tensor]] = {}
    original = StepCheckpoint.on_train_batch_end

    def on_train_batch_end(self: StepCheckpoint, trainer: Any, pl_module: StageModule, *args: Any) -> None:
        original(self, trainer, pl_module, *args)
        state = pl_module.model.state_dict()
        seen[f"{pl_module.spec.name}/{pl_module.phase.name}"] = {name: t.clone() for name, t in state.items()}

    monkeypatch.setattr(StepCheckpoint, "on_train_batch_end", on_train_batch_end)
    return seen


@pytest.fixture
def trained_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """What has a gradient in each phase, by ``stage/phase``."""
    seen: dict[str, set[str]] = {}
    original = StageModule.configure_optimizers

    def configure_optimizers(self: StageModule) -> Any:
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        seen[f"{self.spec.name}/{self.phase.name}"] = trained
        return original(self)

    monkeypatch.setattr(StageModule, "configure_optimizers", configure_optimizers)
    return seen


@pytest.fixture
def order_seeds(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Seed of each phase's order of samples, by ``stage/phase``."""
    seen: dict[str, int] = {}
    original = phases.phase_dataset

    def phase_dataset(models: Any, spec: Any, phase: Any, corpora: Any, seed: int) -> Any:
        seen[f"{spec.name}/{phase.name}"] = seed
        return original(models, spec, phase, corpora, seed)

    monkeypatch.setattr(phases, "phase_dataset", phase_dataset)
    return seen


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in after.items() if name not in before or not torch.equal(before[name], tensor)}


def test_a_review_changes_the_new_rows_alone(
    lab: Path,
    at_last_step: dict[str, dict[str, Tensor]],
    trained_in: dict[str, set[str]],
    order_seeds: dict[str, int],
) -> None:
    config = tiny_config()
    config["stage_defaults"]["review"] = {"fraction": 0.25, "old_loss": 0.5}
    report, _ = train(write_config(config))
    assert set(at_last_step) == {"fruit/train", "code/train", "code/review"}
    rows = {f"blocks.{i}.moe.router.rows.1" for i in (0, 1)}
    assert differing(at_last_step["code/train"], at_last_step["code/review"]) == rows
    assert differing(at_last_step["code/review"], tensors("code")) == set()
    assert trained_in["code/review"] == rows < trained_in["code/train"]
    assert order_seeds == {"fruit/train": 0, "code/train": 1000, "code/review": 1500}
    # The trunk trained before, the old experts and rows never.
    changed = differing(tensors("fruit"), tensors("code"))
    assert "embedding.weight" in changed and "blocks.0.moe.router.rows.0" not in changed
    measured = report["stages"][1]["training"]
    assert measured["steps"] == STEPS and report["stages"][1]["tokens"] == STEPS * 128
    assert "train/old_loss" in measured["final"] and "train/balance_loss" not in measured["final"]
    assert "train/distill_loss" not in measured["final"]


@pytest.mark.parametrize("kind", ["l2", "ewc"])
def test_a_heavy_penalty_pins_old_weights(lab: Path, kind: str) -> None:
    """Norms and head, where all text has a gradient; what only new text uses may move under EWC."""
    distances = []
    for method, name in (("sequential", "free"), (kind, "pinned")):
        config = tiny_config(method=method)
        config["stage_defaults"]["penalty"] = {"weight": 1e7, "fisher_tokens": 512}
        report, _ = train(write_config(config), f"run={name}", f"stages[1].name={name}")
        old, new = tensors("fruit"), tensors(name)
        shared = [n for n in old if "head" in n or "norm" in n]
        distances.append(sum(float((new[n] - old[n]).square().sum()) for n in shared) ** 0.5)
        assert ("train/penalty" in report["stages"][1]["training"]["final"]) is (method == kind)
    free, pinned = distances
    assert 0 < pinned < 0.3 * free


def test_ewc_measures_the_parent_on_earlier_text(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anchors, original = [], preparation.make_anchor

    def make_anchor(*args: Any) -> WeightAnchor:
        anchors.append(original(*args))
        return anchors[-1]

    monkeypatch.setattr(preparation, "make_anchor", make_anchor)
    config = tiny_config(method="ewc", stage_defaults={"penalty": {"fisher_tokens": 256}})
    train(write_config(config))
    (anchor,) = anchors
    prepared = prepare(read_config("tiny.yaml"))
    parent = load_model(StageStore(Path("mlruns")), stage("fruit"))
    sample = text_sample(parent, prepared.plan[1].spec, prepared.data.corpora["fruit"], 256)
    assert sample["token_ids"].shape == (8, CONTEXT)
    expected = fisher_diagonal(parent, sample)
    assert anchor.weight == 1000.0 and anchor.importances is not None
    assert set(anchor.importances) == set(expected) == set(anchor.anchors)
    assert differing(expected, anchor.importances) == set()
    assert differing(dict(parent.named_parameters()), anchor.anchors) == set()


def test_ewc_reads_from_the_buffer_only(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, original = [], preparation.fisher_diagonal

    def fisher(model: Any, sample: Any) -> Any:
        samples.append(sample)
        return original(model, sample)

    monkeypatch.setattr(preparation, "fisher_diagonal", fisher)
    kept, seed = 3, 5  # blocks; with this seed the whole text's sample lies mostly beyond them
    replay = {"fraction": 0.25, "buffer_tokens": kept * CONTEXT + 1}
    config = tiny_config(seed=seed, stage_defaults={"penalty": {"kind": "ewc", "fisher_tokens": 256}, "replay": replay})
    train(write_config(config))
    prepared = prepare(read_config("tiny.yaml"))
    tokens = torch.as_tensor(prepared.data.corpora["fruit"].train.tokens[: kept * CONTEXT + 1].astype("int64"))
    (sample,) = samples
    blocks = sorted(map(tuple, sample["target_ids"].tolist()))
    assert blocks == sorted(map(tuple, tokens[1:].reshape(kept, CONTEXT).tolist()))


@pytest.fixture
def nothing_stored(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """No stage but the first is given any text besides its own; names the stages that were trained."""
    original, names = stages.train_stage, []

    def alone(planned: PlannedStage, parent: Any, data: PreparedData, environment: Any) -> CommittedStage:
        names.append(planned.spec.name)
        own = replace(data, corpora={planned.spec.data: data.corpora[planned.spec.data]})
        return original(planned, parent, own, environment)

    monkeypatch.setattr("pipelines.run.run.train_stage", alone)
    yield names
    assert names


GENERATED = {"fraction": 0.25, "source": "generated"}


@pytest.mark.parametrize(
    "sections",
    [
        {"distill": {"weight": 0.5, "text": "replay"}, "review": {"fraction": 0.25}},
        {"distill": {"weight": 0.5, "text": "new"}},
    ],
    ids=["distilled", "plain"],
)
def test_generated_text_needs_no_stored_text(lab: Path, nothing_stored: list[str], sections: dict[str, Any]) -> None:
    config = tiny_config(stage_defaults={"replay": GENERATED, **sections})
    report, _ = train(write_config(config))
    assert nothing_stored == ["fruit", "code"]
    assert set(stage("code").data) == {"code"}
    assert "train/distill_loss" in report["stages"][1]["training"]["final"] or "review" in sections
    assert report["loss_nats_per_token"][1][1] < report["loss_nats_per_token"][0][1]
    assert list(Path("mlruns/work").iterdir()) == []


def test_generated_text_for_bundles(lab: Path, nothing_stored: list[str]) -> None:
    """Groups of what the model wrote come from what it wrote."""
    config = tiny_config(
        routing={**ONE, "bundles": "cluster", "chunk_tokens": 4, "clusters": 2}, model={"document_mask": True}
    )
    config["stage_defaults"] |= {"replay": GENERATED, "trunk": {"train": "frozen"}}
    report, _ = train(write_config(config))
    assert report["loss_nats_per_token"][1][1] < report["loss_nats_per_token"][0][1]


def die_after(step: int) -> Callable[[], None]:
    """A run that gets SIGKILL at a step of stage ``code``."""

    def action() -> None:
        original = StepCheckpoint.on_train_batch_end

        def on_train_batch_end(self: StepCheckpoint, trainer: Any, pl_module: Any, *args: Any) -> None:
            original(self, trainer, pl_module, *args)
            if (pl_module.spec.name, trainer.global_step) == ("code", step):
                kill_self()

        StepCheckpoint.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign]
        train()

    return action


@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd does not survive a fork once CUDA is there")
def test_text_is_written_once_however_often_a_stage_begins(lab: Path) -> None:
    write_config(tiny_config(stage_defaults={"replay": GENERATED}))
    written = []
    for step in (3, 6):
        child = fork(die_after(step))
        assert child.wait() == -signal.SIGKILL, child.output
        (path,) = Path("mlruns/work").glob("*/generated/blocks.safetensors")
        written.append((path.read_bytes(), path.stat().st_ino, path.stat().st_mtime_ns))
    assert written[0] == written[1]
    damaged = bytearray(written[0][0])
    damaged[-1] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(CorruptError, match=r"blocks\.safetensors"):
        train()
    path.write_bytes(written[0][0])
    _, printed = train()
    assert "code: continuing from step-0-00000004" in printed


@pytest.mark.parametrize(
    ("sections", "trunk", "experts"),
    [
        ({}, True, False),
        ({"trunk": {"train": "frozen"}}, False, False),
        ({"grow": {"experts": 2, "sample_tokens": 512, "old_lr_scale": 0.5}}, True, True),
        ({"grow": {"experts": 0}}, True, True),
    ],
    ids=["grown", "frozen trunk", "nothing frozen", "nothing new"],
)
def test_the_teacher_is_the_parent_to_the_end(
    lab: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], trunk: bool, experts: bool
) -> None:
    """It shares what does not train, and nothing else; what trains is as without it."""
    teachers, original = [], preparation.make_teacher

    def make_teacher(*args: Any) -> Any:
        teachers.append(original(*args))
        return teachers[-1]

    monkeypatch.setattr(preparation, "make_teacher", make_teacher)
    train(write_config(tiny_config(stage_defaults={"distill": {"weight": 0.5}, **sections})))
    (teacher,), old = teachers, tensors("fruit")
    assert differing(old, teacher.state_dict()) == set()
    changed = differing(old, tensors("code")) & set(old)
    assert ("embedding.weight" in changed, "blocks.0.moe.banks.experts.0.down" in changed) == (trunk, experts)


def test_old_experts_train_on_for_a_while(lab: Path) -> None:
    config = tiny_config(stage_defaults={"distill": {"weight": 0.0}})
    config["stage_defaults"]["grow"] |= {"old_lr_scale": 0.5, "old_until": 0.5}
    report, _ = train(write_config(config))
    changed = differing(tensors("fruit"), tensors("code"))
    assert {"blocks.0.moe.banks.experts.0.down", "blocks.0.moe.router.rows.0", "embedding.weight"} <= changed
    assert stage("code").architecture.frozen == 0
    (first, second) = report["stages"]
    assert second["parameters_trainable"] == second["parameters_total"] > first["parameters_total"]


def test_only_some_layers_grow(lab: Path) -> None:
    config = tiny_config(("fruit", "code", "sea"))
    config["stages"] = [
        {"data": "fruit"}, {"data": "code", "grow": {"layers": [1]}}, {"data": "sea", "grow": {"layers": [0]}},
    ]  # fmt: skip
    report, _ = train(write_config(config))
    assert [one.layers for one in stage("sea").architecture.generations] == [None, (1,), (0,)]
    assert [stage["experts_per_layer"] for stage in report["stages"]] == [2, 4, 4]
    counts = report["expert_counts"]["fruit"]
    assert [len(layer) for layer in counts] == [4, 4]
    born = lineage_rows(StageStore(Path("mlruns")), [one["key"] for one in report["stages"]])
    assert [row.experts for row in born] == ["fruit/L0..1/E0..1", "code/L1/E2..3", "sea/L0/E2..3"]
    for i, one in enumerate(report["stages"]):
        model = StageStore(Path("mlruns")).tensors(stage(("fruit", "code", "sea")[i]))
        assert one["parameters_total"] == sum(tensor.numel() for tensor in model.values())
        assert "new_expert_share" in one["training"] or i == 0
    again, printed = train()
    assert again == report and "Nothing to train" in printed


def documents_per_token(nats_per_token: float) -> float:
    """Of the held-out text on which a stage had this loss."""
    [ratio] = {
        one["documents"] / one["tokens"] for one in stored_evaluations() if one.get("nats_per_token") == nats_per_token
    }
    return float(ratio)


BY: dict[str, dict[str, Any]] = {
    "label": {"bundles": "label"},
    "selection": {"bundles": "cluster", "mixture": None},
    "mixture": {"bundles": "cluster", "mixture": {"likelihood": 1.0, "drop": 0.0}},
}
"""Ways to predict with bundles."""


@pytest.mark.parametrize("by", BY)
def test_bundles_with_deltas_forget_nothing(lab: Path, by: str) -> None:
    """By construction: no token of an earlier bundle meets anything that a later stage trains."""
    names = ("fruit", "code", "sea")
    config = tiny_config(
        names,
        routing={**ONE, **BY[by], "chunk_tokens": 4, "clusters": 2},
        model={"document_mask": True},
    )
    config["stage_defaults"] |= {"trunk": {"train": "deltas", "rank": 4}, "distill": {"weight": 0.0}}
    config["stage_defaults"]["replay"] = {"fraction": 0.0}
    report, _ = train(write_config(config))
    losses = report["loss_nats_per_token"]
    for j in range(2):
        for i in range(j, 3):
            if by == "mixture":
                # By Bayes' rule, with equal shares before a text begins, it costs so much more to have more members.
                most = math.log((i + 1) / (j + 1)) * documents_per_token(losses[i][j])
                assert losses[i][j] <= losses[j][j] + most + 1e-6, (i, j)
            else:
                assert abs(losses[i][j] - losses[j][j]) <= 1e-6, (i, j)
    # And yet each stage learns.
    assert losses[1][1] < losses[0][1] - 0.05 and losses[2][2] < losses[1][2] - 0.05
    assert by == "mixture" or all(statistics["leak"] == 0 for statistics in report["routing"].values())
    models = [tensors(name) for name in names]
    for before, after in pairwise(models):
        new = differing(before, after)
        assert not new & set(before) and any(".deltas." in name for name in new)
        assert all(".deltas." in name or ".experts." in name or ".rows." in name or "centroids" in name for name in new)
    for i, one in enumerate(report["stages"]):
        trained = [t.numel() for name, t in models[i].items() if "centroids" not in name]
        assert one["parameters_total"] == sum(trained)
        assert stage(names[i]).architecture.generations[i].delta_rank == (4 if i else 0)


def test_token_clusters_within_bundles(lab: Path) -> None:
    """`routing.mode=cluster` is one key away there too: nothing old moves, and new experts work."""
    bundles = {"mode": "cluster", "bundles": "label", "top_k": 1, "renormalize": False}
    defaults = {"trunk": {"train": "deltas", "rank": 4}, "distill": {"weight": 0.0}, "replay": {"fraction": 0.0}}
    config = tiny_config(routing=bundles, model={"document_mask": True})
    config["stage_defaults"] |= defaults
    report, _ = train(write_config(config))
    nats = report["loss_nats_per_token"]
    assert abs(nats[1][0] - nats[0][0]) < 1e-6 and nats[1][1] < nats[0][1] - 0.1
    assert report["routing"]["fruit"]["leak"] == 0 and report["stages"][1]["training"]["new_expert_share"] > 0


def test_a_router_that_collapses_is_named_while_it_trains(
    lab: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lifelong_moe.routing.linear import LinearRouter

    whole = LinearRouter.logits

    def to_one(self: LinearRouter, x_TD: torch.Tensor, present: frozenset[int] | None = None) -> torch.Tensor:
        logits_TE = whole(self, x_TD, present)
        return logits_TE + 99.0 * (torch.arange(logits_TE.shape[1]) == 0) * (self.layer == 1)

    monkeypatch.setattr(LinearRouter, "logits", to_one)
    train(write_config(tiny_config(("fruit",))))
    warnings = [message for message in caplog.messages if "collapsed" in message]
    assert len(warnings) == 1 and "stage fruit: the router of layer 1 has collapsed in steps 1 to 4" in warnings[0]


def test_ewc_without_stored_text(lab: Path) -> None:
    """The Fisher information is that of text which the old model writes: by hand, from its weights and seed alone."""
    ewc = {"kind": "ewc", "fisher_tokens": 100}
    stage = {"penalty": ewc, "replay": {"fraction": 0.0, "source": "generated"}, "distill": {"weight": 0.0}}
    prepared = prepare(read_config(write_config(tiny_config(stage_defaults=stage))))
    spec = prepared.plan[1].spec
    assert (spec.fisher_data, spec.reads, spec.uses) == ((), (), ("code",))
    assert (spec.written_blocks, spec.fisher_measured_tokens, spec.teacher_tokens) == ((0, 3), 96, 96)
    report, _ = train()
    store = StageStore(Path("mlruns"))
    first, second = (store.get(one["key"]) for one in report["stages"])
    assert second.data.keys() == {"code"}
    without, _ = train("tiny.yaml", "run=free", "stage_defaults.penalty.kind=none")
    assert report["stages"][1]["weights_sha256"] != without["stages"][1]["weights_sha256"]

    model = load_model(store, first)
    rows = generate_blocks(model, 3, context=32, seed=1000)
    tokens = torch.from_numpy(rows)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    model.eval()
    for row in tokens:  # 32 times, of 32 tokens a block, the mean over blocks of the squared gradient of the mean loss
        model.zero_grad()
        hidden = model(TokenBatch(row[None, :-1], document_ids_BS=torch.zeros(1, 32, dtype=torch.int64))).hidden_BSD
        torch.nn.functional.cross_entropy(model.head.logits(hidden[0]), row[1:]).backward()
        for name, p in model.named_parameters():
            expected[name] += 0 if p.grad is None else 32 / 3 * p.grad**2
    run: Any = SimpleNamespace(spec=spec, corpora={})
    found = _importances(model, run, rows)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-9)
