"""Every way of routing goes through growth to the end, and measures the same when asked twice."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lifelong_moe.config.parts import Part
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.restore import load_model
from pipelines.inspect.evaluate import evaluate_text
from pipelines.inspect.generate import generate_text
from pipelines.shared.options import SamplingOptions
from tests.tiny import tiny_config, train, write_config

ONE = {"top_k": 1, "renormalize": False}
CLUSTER = {**ONE, "mode": "cluster", "sample_tokens": 2048, "feature_width": 16}
ROUTERS = '''
import torch
from torch import nn

from lifelong_moe.routing.base import Router, Routing, hashed_experts


class RoundRobin(Router):
    """By token id; nothing to train."""

    trained = False

    def __init__(self, config, *, width, layer, offset=0):
        super().__init__(config, width=width, layer=layer)
        self.offset = offset

    def add_experts(self, num):
        self.generations.append(num)

    def forward(self, x_TD, context):
        k = self.config.top_k
        ids_T1 = (context.token_ids_T + self.offset).unsqueeze(1) + torch.arange(k)
        allowed = self.num_experts - (self.generations[-1] if self.masks_newest else 0)
        return Routing(ids_T1 % allowed, torch.full(ids_T1.shape, 1.0 / k), self.num_experts)


class Own(Router):
    """Trained, with parameters of its own kind."""

    def __init__(self, config, *, width, layer):
        super().__init__(config, width=width, layer=layer)
        self.vectors = nn.ParameterList()

    def add_experts(self, num):
        self.generations.append(num)
        self.vectors.append(nn.Parameter(torch.full((num, self.width), 0.01)))

    def forward(self, x_TD, context):
        scores_TE = x_TD.float() @ torch.cat(list(self.vectors)).t()
        scores_TE = scores_TE[:, : self.num_available]
        weights_TK, ids_TK = scores_TE.sigmoid().topk(self.config.top_k, dim=-1)
        return Routing(ids_TK, weights_TK, self.num_experts)
'''

FROZEN = {"model": {"document_mask": True}, "stage_defaults": {"trunk": {"train": "frozen"}}}
MODES: dict[str, dict[str, Any]] = {
    "learned": {"routing": {"balance_over": "active"}, "model": {"experts": 4}},
    "learned top 1": {"routing": ONE},
    "token clusters of embeddings": {"routing": CLUSTER},
    "token clusters of hidden states": {"routing": {**CLUSTER, "features": "hidden"}},
    "document clusters": {
        "routing": {**CLUSTER, "level": "document", "chunk_tokens": 8}, "model": {"document_mask": True},
    },
    "labels": {"routing": {**ONE, "mode": "label"}},
    "hash": {"routing": {**ONE, "mode": "hash"}},
    "bundles by cluster": {"routing": {**ONE, "bundles": "cluster", "chunk_tokens": 4, "clusters": 2}, **FROZEN},
    "bundles by label": {"routing": {**ONE, "bundles": "label"}, **FROZEN},
    "random token clusters": {"routing": {**CLUSTER, "centroids": "random"}},
    "random document clusters": {
        "routing": {**CLUSTER, "level": "document", "chunk_tokens": 8, "centroids": "random"},
        "model": {"document_mask": True},
    },
    "own, fixed": {"routing": {**ONE, "mode": "my_routers.RoundRobin", "options": {"offset": 3}}},
    "own, trained": {"routing": {**ONE, "mode": "my_routers.Own"}},
    "tied embeddings": {"routing": ONE, "model": {"tie_embeddings": True}},
}  # fmt: skip


@pytest.fixture
def routers(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``my_routers`` can be imported, as if a user had written it."""
    (lab / "my_routers.py").write_text(ROUTERS)
    monkeypatch.syspath_prepend(lab)
    monkeypatch.delitem(__import__("sys").modules, "my_routers", raising=False)


@pytest.mark.usefixtures("routers")
@pytest.mark.parametrize("mode", MODES)
def test_two_stages_to_the_end(lab: Path, mode: str) -> None:
    config = tiny_config(**MODES[mode])
    report, _ = train(write_config(config))
    born = report["stages"][0]["experts_per_layer"]
    assert [stage["experts_per_layer"] for stage in report["stages"]] == [born, born + 2]
    for i, stage in enumerate(report["stages"]):
        scored = report["loss_nats_per_token"][i]
        assert all(0 < value < 8 for value in scored), stage["name"]
    assert report["loss_nats_per_token"][1][1] < report["loss_at_init"][1]
    top_k = config["routing"]["top_k"]
    for name, counts in report["expert_counts"].items():
        tokens = {round(sum(layer), 6) for layer in counts}  # a mixture counts by weight
        assert len(tokens) == 1 and tokens.pop() % top_k == 0, name
    shutil.rmtree(lab / "mlruns/evaluations")
    again, printed = train()
    assert "Nothing to train" in printed
    assert again == report
    store = StageStore(Path("mlruns"))
    last = store.get(report["stages"][1]["key"])
    model = load_model(store, last)
    check_evaluation_and_generation("code" if "label" in mode else None)
    if "own" in mode:  # what a router of the user's own has is not in the cost formulas
        return
    assert sum(p.numel() for p in model.parameters()) == report["stages"][1]["parameters_total"]
    trained = model.parameters_of()
    if "bundles" in mode:  # the trunk is frozen
        trained = model.parameters_of(Part.expert) | model.parameters_of(Part.router)
    learns = [parameter for parameter in trained.values() if parameter.requires_grad]
    assert sum(p.numel() for p in learns) == report["stages"][1]["parameters_trainable"]


def check_evaluation_and_generation(label: str | None) -> None:
    """From the store, on other text, repeatable."""
    console = Console(file=io.StringIO())
    first = None if label is None else "fruit"  # the only label that the first stage knows
    stages = (("fruit", first), ("code", label), ("code", label))
    scored = [evaluate_text("tiny", stage, "sea.jsonl", known, console) for stage, known in stages]
    assert scored[1] == scored[2]
    assert scored[0]["tokens"] == scored[1]["tokens"] > 0
    sampling = SamplingOptions(max_new_tokens=8, top_p=1.0)
    said = [
        generate_text(
            "tiny", None, "apple", replace(sampling, temperature=temperature, seed=seed), console, label=label
        )["text"]
        for temperature, seed in ((0.0, 0), (0.0, 1), (5.0, 1), (5.0, 1), (5.0, 2))
    ]
    assert said[0] == said[1] and said[2] == said[3] != said[4]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16(lab: Path, precision: str) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no bfloat16 kernels on this machine")
    write_config(tiny_config(routing={"top_k": 2, "renormalize": True}, trainer={"precision": precision}))
    report, _ = train()
    assert report["loss_nats_per_token"][1][1] < report["loss_at_init"][1]
    store = StageStore(Path("mlruns"))
    stage = store.get(report["stages"][1]["key"])
    tensors = store.tensors(stage)
    again, printed = train()
    assert "Nothing to train" in printed and again == report
    kept = torch.float32 if precision == "bf16-mixed" else torch.bfloat16
    assert {tensor.dtype for tensor in tensors.values()} == {kept}


def test_biases_are_committed_as_they_added_up(lab: Path) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no bfloat16 kernels on this machine")
    routing = {"score": "sigmoid", "bias_rate": 0.001, "top_k": 1, "renormalize": False}
    report, _ = train(write_config(tiny_config(routing=routing, trainer={"precision": "bf16-true"})))
    store = StageStore(Path("mlruns"))
    stage = store.get(report["stages"][1]["key"])
    for tensors in (store.tensors(stage), load_model(store, stage).state_dict()):
        for name in (f"blocks.{layer}.moe.router.bias_{g}" for layer in range(2) for g in range(2)):
            steps = tensors[name] / 0.001  # whole steps up and down, 12 of them
            assert tensors[name].dtype == torch.float32 and bool(steps.any())
            assert float((steps - steps.round()).abs().max()) < 1e-3 and float(steps.abs().max()) < 12.001


@pytest.mark.parametrize("by", ["label", "cluster"])
def test_bundles_with_a_frozen_trunk_forget_nothing(lab: Path, by: str) -> None:
    config = tiny_config(
        ("fruit", "code", "sea"),
        routing={**ONE, "bundles": by, "chunk_tokens": 4, "clusters": 2} | ({} if by == "label" else {"mixture": None}),
        model={"document_mask": True},
    )
    config["stage_defaults"] |= {"trunk": {"train": "frozen"}, "replay": {"fraction": 0.0}, "distill": {"weight": 0.0}}
    report, _ = train(write_config(config))
    losses = report["loss_nats_per_token"]
    assert all(abs(losses[2][j] - losses[j][j]) <= 1e-6 for j in range(2))
    assert losses[1][1] < losses[0][1] and losses[2][2] < losses[1][2]
    assert all(statistics["leak"] == 0 for statistics in report["routing"].values())


@pytest.mark.parametrize("features", ["embedding", "hidden"])
def test_clusters_beside_a_dense_layer(lab: Path, features: str) -> None:
    """It has no centroids to fit, and no token chooses in it."""
    config = tiny_config(routing={"mode": "cluster", "level": "token", "features": features, "top_k": 1})
    config["model"]["dense_layers"] = 1
    report, _ = train(write_config(config))
    assert [stage["name"] for stage in report["stages"]] == ["fruit", "code"]
    stored = load_file(next(Path("mlruns/stages").glob("fruit-*")) / "model.safetensors")
    sizes = {name: len(tensor) for name, tensor in stored.items() if "centroids" in name}
    assert sorted(sizes.values()) == [0, 2] and all(bool(stored[name].any()) for name, size in sizes.items() if size)
