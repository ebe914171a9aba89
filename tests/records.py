"""Specifications and records of stages that nobody trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.retention import ReplayConfig
from lifelong_moe.config.routing.topk import LearnedConfig
from lifelong_moe.config.training import OptimConfig
from lifelong_moe.data.tokens.identity import TokenizerIdentity
from lifelong_moe.plan.architecture import Architecture, first_generation
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.store.record import StageRecord
from lifelong_moe.store.stages import CommittedStage, StageStore

METRICS: dict[str, Any] = {
    "tokens": 1000, "seconds": 2.0, "tokens_per_second": 500.0, "epochs": 0.5, "trainable_parameters": 10,
}  # fmt: skip
"""What every trained stage tells of its training."""


def made_spec(name: str = "one", **changes: Any) -> StageSpec:
    """A stage that learns ``<name>_text`` from random weights, and nothing else."""
    plain: dict[str, Any] = {
        "name": name, "data": f"{name}_text", "parent": None, "replayed": (), "replay_weights": (),
        "replay": ReplayConfig(fraction=0.0), "fisher_data": (),
        "tokens": 1000, "grow": None, "continues": None, "trunk": None, "distill": None, "penalty": None,
        "review": None, "optim": OptimConfig(), "finetune": None, "model": ModelConfig(), "routing": LearnedConfig(),
        "seed": 0, "precision": "32-true", "gradient_clip": 1.0, "accumulate": 1, "processes": 1,
    }  # fmt: skip
    return StageSpec(**plain | changes)


def made_record(key: str, name: str = "one", **changes: Any) -> StageRecord:
    """Of a first stage of an earlier version, whose key is taken at its word, by default."""
    spec = made_spec(name)
    architecture = Architecture(spec.model, spec.routing, 300, 0, (first_generation(name, spec.model),))
    plain: dict[str, Any] = {
        "key": key, "name": name, "parent": None, "spec": spec, "architecture": architecture, "data": {}, "split": {},
        "tokenizer": TokenizerIdentity({"vocab_size": 300}, "7" * 64), "schema": 4,
    }  # fmt: skip
    return StageRecord(**plain | changes)


def commit_made(root: Path, key: str, name: str = "one") -> CommittedStage:
    """Put such a stage into the store at ``root``; its weights are no model's."""
    import torch

    return StageStore(root).commit(made_record(key, name), METRICS, {"w": torch.zeros(1)})
