"""The gate of versions that learned nothing new: no distribution may get worse by it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from lifelong_moe.data.records import Remembered
from lifelong_moe.errors import ConfigError
from lifelong_moe.methods.retraining import RetrainConfig, Retraining
from lifelong_moe.retraining.config import GateConfig
from lifelong_moe.retraining.gate import Verdict, unharmed
from lifelong_moe.stages.store import CommittedStage, StageStore
from lifelong_moe.stages.versions import Head, Version
from lifelong_moe.training.interrupt import Interrupt
from pipelines.candidates import Bench, ServedData, served_stages
from pipelines.gating import kinds_of_text
from pipelines.kept_text import remembered_by, wait_for_text
from pipelines.workspace import read_data


def served_data(head: Head, version: Version, store: StageStore, without: str | None = None) -> ServedData:
    """What a version's distributions are, by the run's own configuration and the batches that it kept.

    Raises:
        ConfigError, DataError: If their text is gone and nothing is known of it, or none of it is left to measure on,
            that of one distribution aside.
        TryAgainError: If held-out text that was not kept cannot be had now.
    """
    base: Any = OmegaConf.create(head["config"])
    retraining = Retraining(RetrainConfig(base=""), base, head["run"])
    config = retraining.config(*served_stages(version, store))
    known = remembered_by(head, head["config"], version, store)
    served = ServedData(config, read_data(config, None, known))
    wait_for_text(served.data)
    if not served.measured(without):
        raise ConfigError(f"no text of run {head['run']} is left to measure on")
    return served


def gate_derived(
    store: StageStore,
    version: Version,
    stage: CommittedStage,
    served: ServedData,
    without: str | None,
    config: GateConfig,
    console: Console,
) -> Verdict:
    """Hold a derived stage against the version that it was made of.

    Args:
        store: Where stages are.
        version: That serves.
        stage: That might.
        served: The version's configuration and data.
        without: A distribution that does not count: it is meant to be forgotten.
        config: Limits.
        console: Where people read.
    """
    retraining = Retraining(RetrainConfig(base=""), OmegaConf.create({}), served.config.run)
    bench = Bench(retraining, version, "", "", Remembered(), store, Interrupt(), console)
    names = served.measured(without)
    with console.status(f"{stage.name}: at the gate"):
        after = {name: bench.losses(stage, served, name) for name in names}
        before = {name: bench.losses(bench.parent, served, name) for name in names}
    kinds = kinds_of_text(version, store)
    judged = unharmed(after=after, before=before, config=config, seed=served.config.seed, kinds=kinds)
    return replace(judged, notes=tuple(served.unmeasured()))
