"""Candidates: stages that could follow the champion, planned and trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from lifelong_moe.config.load import build_config
from lifelong_moe.config.run import RunConfig
from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.data.tokens.prepare import PreparedData
from lifelong_moe.data.tokens.records import Remembered
from lifelong_moe.data.tokens.texts import Texts
from lifelong_moe.errors import ConfigError
from lifelong_moe.evaluation.documents import generation_shares
from lifelong_moe.evaluation.measurements import Load, Measurements
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.plan.planned import PlannedStage
from lifelong_moe.plan.retraining import NewStage, Retraining
from lifelong_moe.plan.stages import plan_next
from lifelong_moe.store.evaluations import EvaluationStore
from lifelong_moe.store.readings import ReadingCache
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.store.versions import Version
from lifelong_moe.training.callbacks.interrupt import Interrupt
from lifelong_moe.training.callbacks.points import Send
from lifelong_moe.training.loop.context import StageEnvironment
from lifelong_moe.training.loop.device import on_configured_device
from lifelong_moe.training.restore import load_model
from pipelines.shared.kept_text import wait_for_text
from pipelines.shared.novelty import read_texts
from pipelines.shared.places import CACHE, ROOT
from pipelines.shared.training import train_stage
from pipelines.shared.workspace import read_data, require_room
from pipelines.versions.served import served_stages


@dataclass(frozen=True)
class Candidate:
    """A stage that could follow the champion, with the run's configuration and data extended by it."""

    measurements: Measurements
    """On the held-out text of the extended run."""
    planned: PlannedStage
    raw: DictConfig
    """The extended configuration, unresolved."""
    grow: Mapping[str, Any] | None = None
    """Settings of growth over the configured ones."""

    @property
    def config(self) -> RunConfig:
        """Configuration of the extended run."""
        return self.measurements.config

    @property
    def data(self) -> PreparedData:
        """Data of the extended run."""
        return self.measurements.data


@dataclass
class CandidateTrainer:
    """Plans and trains the candidates of one batch."""

    retraining: Retraining
    champion: Version
    new: str
    """Name of the batch's distribution."""
    files: str
    """Path of its documents."""
    known: Remembered
    """Records of text that is gone."""
    store: StageStore
    interrupt: Interrupt
    console: Console
    load: Load
    """From a stage's key to its model."""
    # A tick plans several candidates on the same text, which is prepared once.
    memory: dict[str, PreparedData] = field(default_factory=dict)

    @cached_property
    def parent(self) -> CommittedStage:
        """The champion's last stage."""
        return self.store.get(self.champion.key)

    @cached_property
    def architecture(self) -> Architecture:
        """Architecture of the champion."""
        return self.parent.architecture

    @cached_property
    def texts(self) -> Texts:
        """Documents of every distribution, the batch's included."""
        kept, added = served_stages(self.champion, self.store)
        found = read_texts(self.retraining.config(kept, [*added, NewStage(self.new, self.files)]), self.known)
        found.remember()
        return found

    def plan(
        self, continues: str | None, tokens: int | None = None, grow: Mapping[str, Any] | None = None
    ) -> Candidate:
        """Plan a stage on the batch.

        Args:
            continues: Stage whose experts train on; None grows.
            tokens: Training tokens, if other than configured: a probe's.
            grow: Settings of growth over the configured ones.

        Raises:
            ConfigError: If tokenizer, sizes or routing are no longer the champion's.
        """
        kept, added = served_stages(self.champion, self.store)
        new = NewStage(self.new, self.files, continues, tokens, grow)
        raw = self.retraining.extended(kept, [*added, new])
        config = build_config(raw, is_stored=True)
        data = read_data(config, self.memory, self.known)
        wait_for_text(data, stage_specs(config)[-1].uses)
        self._require_same_model(config, data)
        planned = plan_next(config, self.champion.key, self.architecture, data.identity, data.gone)
        measurements = Measurements(
            config, data, EvaluationStore(ROOT), self.load, self.store.architecture, ReadingCache(CACHE)
        )
        return Candidate(measurements, planned, raw, grow)

    def _require_same_model(self, config: RunConfig, data: PreparedData) -> None:
        """Refuse a configuration whose model the champion could not become.

        Raises:
            ConfigError: Naming what differs.
        """
        if data.tokenizer.hash != (had := self.parent.tokenizer.hash):
            raise ConfigError(
                f"tokenizer: it is {data.tokenizer.hash[:16]} now, but the champion was trained with {had[:16]}. Bring "
                f"that one back, or begin another run."
            )
        now, then = config.model, self.architecture.model
        if (now.width, now.layers, now.expert_width) != (then.width, then.layers, then.expert_width):
            raise ConfigError("model: its sizes are not the champion's. Bring them back, or begin another run.")
        # With one generation the stage routes by its own configuration, which must be the champion's but for the router
        # losses: those are the new stage's own, and earlier releases averaged them over layers.
        trained = self.architecture.routing.with_losses_of(config.routing)
        now_routing, then_routing = (r.effective(grown=False) for r in (config.routing, trained))
        if len(self.architecture.generations) == 1 and now_routing != then_routing:
            raise ConfigError("routing: it is not the champion's. Bring it back, or begin another run.")

    def train(self, candidate: Candidate, send: Send, run_id: str | None) -> CommittedStage:
        """Train and commit a candidate, or return the committed stage.

        Raises:
            ResourceError: If disk or memory does not suffice.
        """
        config, data, planned = candidate.config, candidate.data, candidate.planned
        if self.store.find(planned.key) is None:
            require_room([planned], config)
        environment = StageEnvironment(
            store=self.store,
            work=ROOT / "work",
            trainer=config.trainer,
            checkpoint=config.checkpoint,
            frozen=config.frozen,
            interrupt=self.interrupt,
            console=self.console,
            send=send,
            run_id=run_id,
            watch=config.evaluate.watch,
        )
        return train_stage(planned, self.parent, data, environment)

    def leak(self, stage: CommittedStage, candidate: Candidate, distribution: str) -> float:
        """Router leak: share of a distribution's tokens that are routed to generations later than its stage.

        In a mixture that is 0: a later generation weighs as much as it explains the text better, which is no harm.
        """
        if stage.architecture.mixture is not None:
            return 0.0
        counts = candidate.measurements.expert_counts(stage.key, distribution)
        shares = generation_shares(counts, stage.architecture)
        known = self._generations_known(distribution)
        return sum(share for generation, share in shares.items() if generation not in known)

    def _generations_known(self, distribution: str) -> list[str]:
        """Generations that existed when a distribution was learned; all of the champion's if it never was."""
        stage = next((stage for stage in self.champion.stages if distribution in stage.learns), None)
        learned = self.parent if stage is None else self.store.get(stage.key)
        return [g.stage for g in learned.architecture.generations]


def model_loader(store: StageStore, trainer: TrainerConfig) -> Load:
    """A function from a stage's key to its model, on the device of evaluation."""
    # One model stays in memory: callers measure one model on all distributions before the next.
    return lru_cache(maxsize=1)(lambda key: on_configured_device(load_model(store, store.get(key)), trainer))


def changed_frozen(store: StageStore, before: CommittedStage, after: CommittedStage) -> list[str]:
    """Names of frozen tensors whose bits differ between a stage and the one before."""
    # Tensors that are new in this stage have nothing to be compared with.
    frozen = load_model(store, after).stored_names(trained=False)
    old, new = store.tensors(before), store.tensors(after)
    return sorted(name for name in frozen & set(old) if not torch.equal(old[name], new[name]))
