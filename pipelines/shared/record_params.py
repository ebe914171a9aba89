"""Settings as MLflow shows them: params of runs and of stages, and configurations as files."""

from __future__ import annotations

from typing import Any

import yaml

from lifelong_moe.config.load import whole_config, written_config
from lifelong_moe.plan.planned import PlannedStage
from pipelines.shared.workspace import Prepared

CONFIG = "config.yaml"
KEYS = {
    "mixed": "mixture.others",
    "mix_weights": "mixture.weights",
    "replayed": "replay.distributions",
    "replay_weights": "replay.weights",
    "replay_fraction": "replay.fraction",
    "replay_source": "replay.source",
    "replay_buffer": "replay.buffer_tokens",
    "precision": "trainer.precision",
    "gradient_clip": "trainer.gradient_clip",
    "accumulate": "trainer.accumulate_grad_batches",
}
"""Configuration keys of those stage settings that have another name there."""
OFF: dict[str, dict[str, Any]] = {
    "grow": {"experts": 0},
    "trunk": {"train": "full"},
    "distill": {"weight": 0.0},
    "penalty": {"kind": "none"},
    "review": {"fraction": 0.0},
}
"""Configuration values that stand for an unused mechanism, for which a stage has None."""


def run_params(prepared: Prepared) -> dict[str, Any]:
    """A run's settings with all defaults; its stages as written: each has its own MLflow run with all settings."""
    written, whole = written_config(prepared.loaded.raw), whole_config(prepared.loaded.raw)
    params = {key: value for key, value in whole.items() if key != "run"}
    params |= {key: written[key] for key in ("distributions", "stage_defaults", "stages") if key in written}
    return params | {"num_stages": len(prepared.config.stages)}


def stage_params(planned: PlannedStage) -> dict[str, Any]:
    """A stage's resolved settings under the configuration's keys, and the sizes that follow from them."""
    spec = planned.spec
    # Zero is left out of a specification, whose key must not change.
    plain = {"average": 0.0} | {key: value for key, value in spec.to_json().items() if key not in ("name", "parent")}
    return {
        "stage": planned.depth,
        "experts_per_layer": planned.architecture.num_experts,
        "parameters_total": planned.parameters.total,
        "parameters_active": planned.parameters.active,
        "parameters_trainable": planned.trainable,
        "tokens_trained": planned.tokens,
        # `optim.lr` is the first stage's; with `optim.rewarm` later ones have another.
        "lr": spec.peak_lr,
    } | {KEYS.get(key, key): OFF[key] if value is None and key in OFF else value for key, value in plain.items()}


def config_yaml(whole: dict[str, Any]) -> str:
    """A configuration as the text of a file that ``lifelong-moe run`` accepts."""
    return yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)
