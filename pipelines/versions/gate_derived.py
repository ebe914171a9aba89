"""The gate of derived versions, which learned nothing new: no distribution may get worse."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from rich.console import Console

from lifelong_moe.config.references import stored_config
from lifelong_moe.config.retraining.policy import GateConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.evaluation.measurements import Measurements
from lifelong_moe.plan.retraining import RetrainConfig, Retraining
from lifelong_moe.retraining.checks import Verdict
from lifelong_moe.retraining.gate import judge_derived
from lifelong_moe.store.evaluations import EvaluationStore
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.readings import ReadingCache
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.store.versions import Version
from pipelines.shared.kept_text import remembered_by, wait_for_text
from pipelines.shared.places import CACHE, ROOT
from pipelines.shared.workspace import read_data
from pipelines.versions.candidates import model_loader
from pipelines.versions.gating import kinds_of_text, require_slices
from pipelines.versions.served import served_stages


def served_measurements(
    head: RunHead, version: Version, store: StageStore, gate: GateConfig, without: Collection[str] = ()
) -> Measurements:
    """Measurements on a version's distributions, from the run's stored configuration and batches.

    Args:
        head: The run's head.
        version: The run's champion.
        store: Committed stages.
        gate: What they are for: its slices must have held-out text.
        without: Distributions that may be gone.

    Raises:
        ConfigError, DataError: If text is gone that nothing is recorded of, or none is left to measure on.
        TryAgainError: If held-out text that was not kept cannot be read now.
    """
    # No retraining file is read: drop and consolidate know only the run, so defaults stand in.
    retraining = Retraining(RetrainConfig(base=""), stored_config(head.config), head.run)
    config = retraining.config(*served_stages(version, store))
    known = remembered_by(head, None, version, store)
    data, models = read_data(config, None, known), model_loader(store, config.trainer)
    wait_for_text(data)
    served = Measurements(config, data, EvaluationStore(ROOT), models, store.architecture, ReadingCache(CACHE))
    names = served.measurable(without)
    if not names:
        raise ConfigError(f"no text of run {head.run} is left to measure on")
    require_slices(gate, {name: data.heldout_documents[name] for name in names})
    return served


def gate_derived(
    store: StageStore,
    version: Version,
    stage: CommittedStage,
    served: Measurements,
    without: Collection[str],
    config: GateConfig,
    console: Console,
) -> Verdict:
    """Judge a derived stage against the version that it was derived from.

    Args:
        store: Committed stages.
        version: The champion.
        stage: The derived stage.
        served: Measurements on the version's distributions.
        without: Distributions that do not count, since they are meant to be forgotten.
        config: Limits and level.
        console: Output for people.
    """
    names = served.measurable(without)
    with console.status(f"{stage.name}: at the gate"):
        # One model after the other: each is loaded once.
        after = {name: served.losses(stage.key, name) for name in names}
        before = {name: served.losses(version.key, name) for name in names}
    kinds = kinds_of_text(version, store)
    verdict = judge_derived(after=after, before=before, config=config, seed=served.config.seed, kinds=kinds)
    return replace(verdict, notes=tuple(served.unmeasurable()))
