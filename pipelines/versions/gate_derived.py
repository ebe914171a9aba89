"""The gate of versions that learned nothing new: no distribution may get worse by it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from lifelong_moe.config.retraining.policy import GateConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.evaluation.measurements import Measurements
from lifelong_moe.plan.retraining import RetrainConfig, Retraining
from lifelong_moe.retraining.checks import Verdict
from lifelong_moe.retraining.gate import judge_derived
from lifelong_moe.store.evaluations import EvaluationStore
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.store.versions import Version
from pipelines.shared.kept_text import remembered_by, wait_for_text
from pipelines.shared.places import ROOT
from pipelines.shared.workspace import read_data
from pipelines.versions.candidates import model_loader, served_stages
from pipelines.versions.gating import kinds_of_text


def served_measurements(head: RunHead, version: Version, store: StageStore, without: str | None = None) -> Measurements:
    """Of a version's distributions, by the run's own configuration and the batches that it kept.

    Raises:
        ConfigError, DataError: If their text is gone and nothing is known of it, or none of it is left to measure on,
            that of one distribution aside.
        TryAgainError: If held-out text that was not kept cannot be had now.
    """
    base: Any = OmegaConf.create(head.config)
    retraining = Retraining(RetrainConfig(base=""), base, head.run)
    config = retraining.config(*served_stages(version, store))
    known = remembered_by(head, head.config, version, store)
    data, models = read_data(config, None, known), model_loader(store, config.trainer)
    wait_for_text(data)
    served = Measurements(config, data, EvaluationStore(ROOT), models)
    if not served.measurable(without):
        raise ConfigError(f"no text of run {head.run} is left to measure on")
    return served


def gate_derived(
    store: StageStore,
    version: Version,
    stage: CommittedStage,
    served: Measurements,
    without: str | None,
    config: GateConfig,
    console: Console,
) -> Verdict:
    """Hold a derived stage against the version that it was made of.

    Args:
        store: Where stages are.
        version: That serves.
        stage: That might.
        served: Of the version's distributions.
        without: A distribution that does not count: it is meant to be forgotten.
        config: Limits.
        console: Where people read.
    """
    names = served.measurable(without)
    with console.status(f"{stage.name}: at the gate"):
        after = {name: served.losses(stage.key, name) for name in names}
        before = {name: served.losses(version.key, name) for name in names}
    kinds = kinds_of_text(version, store)
    judged = judge_derived(after=after, before=before, config=config, seed=served.config.seed, kinds=kinds)
    return replace(judged, notes=tuple(served.unmeasurable()))
