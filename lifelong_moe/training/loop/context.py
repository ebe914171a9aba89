"""The inputs of a stage and of each of its phases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from lifelong_moe.config.training import CheckpointConfig, FrozenConfig, Offload, TrainerConfig
from lifelong_moe.data.tokens.prepare import PreparedData
from lifelong_moe.data.tokens.shards import TokenizedCorpus
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.phase import Phase
from lifelong_moe.plan.planned import PlannedStage
from lifelong_moe.plan.spec import StageSpec, own_text
from lifelong_moe.retention.penalty import WeightAnchor
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.store.stages import CommittedStage, StageStore
from lifelong_moe.training.callbacks.interrupt import Interrupt
from lifelong_moe.training.callbacks.points import Send
from lifelong_moe.training.loop.device import on_configured_device
from lifelong_moe.training.ranks.surroundings import Surroundings

if TYPE_CHECKING:
    from lifelong_moe.training.loop.rollback import Rollbacks  # which needs Lightning


@dataclass(frozen=True)
class Outlook:
    """A stage's place in the run that trains it."""

    place: int
    """From 1."""
    stages: int
    later_flops: float
    """Of the stages that are trained after it."""


@dataclass(frozen=True)
class StageEnvironment:
    """Everything around a stage on which its result does not depend."""

    store: StageStore
    work: Path
    """``mlruns/work``."""
    trainer: TrainerConfig
    checkpoint: CheckpointConfig
    frozen: FrozenConfig
    interrupt: Interrupt
    console: Console
    send: Send
    """Receives training curves."""
    run_id: str | None = None
    watch: float = 0.0
    """``evaluate.watch``."""
    outlook: Outlook | None = None
    """None where a stage stands alone."""

    @property
    def surroundings(self) -> Surroundings:
        """What the training loop gets of it."""
        return Surroundings(self.interrupt, self.send, self.console)

    def place(self, model: LanguageModel) -> LanguageModel:
        """A model where it reads and writes text before, between and after the phases: the device that trains it."""
        # Frozen weights that are offloaded do not fit there.
        return model.cpu() if self.frozen.offload == Offload.cpu else on_configured_device(model, self.trainer)


@dataclass(frozen=True)
class StageRun:
    """One stage under way."""

    planned: PlannedStage
    parent: CommittedStage | None
    """The stage that it continues."""
    data: PreparedData
    environment: StageEnvironment

    @property
    def spec(self) -> StageSpec:
        """What to train."""
        return self.planned.spec

    @cached_property
    def corpora(self) -> Mapping[str, TokenizedCorpus]:
        """Tokenized text by distribution, as the stage's model reads it."""
        return self.data.corpora_by(self.architecture.vocabulary_of)

    @cached_property
    def corpora_before(self) -> Mapping[str, TokenizedCorpus]:
        """The same as the parent's model reads it, which does not know the tokens that the stage adds."""
        return self.data.corpora if self.before is None else self.data.corpora_by(self.before.vocabulary_of)

    @cached_property
    def _learned(self) -> list[str]:
        """Distributions that the parent's model has learned, oldest first."""
        chain = [] if self.parent is None else self.environment.store.chain(self.parent.key)
        made = [stage.derived or {} for stage in chain]
        dropped = {one.get("stage") for one in made if one.get("derived") == "drop"}
        # A derived stage repeats its source's specification, and a checkpoint's says nothing of its text.
        learned = [s.spec.learns for s in chain if s.derived is None and s.name not in dropped]
        return list(dict.fromkeys(name for names in learned for name in names))

    @property
    def own(self) -> tuple[str, ...]:
        """The distributions by which the stage is judged."""
        return own_text(self.spec.learns, self._learned)

    @property
    def known(self) -> list[str]:
        """Distributions with held-out text that the parent's model has learned, oldest first, but the stage's own."""
        return [name for name in self._learned if name in self.data.heldout and name not in self.own]

    @property
    def before(self) -> Architecture | None:
        """The parent's model, as it was committed."""
        return None if self.parent is None else self.parent.architecture

    @property
    def architecture(self) -> Architecture:
        """The model at the end of the stage."""
        tokenizer = self.data.tokenizer
        return self.spec.architecture(self.before, tokenizer.vocab_size, tokenizer.bos_id, self.planned.tokens_added)

    @property
    def seed(self) -> int:
        """Seed of growth, clustering and sample order."""
        # By depth, not by index: the same stage gets the same seed whatever stands beside its chain. With one seed for
        # all stages, each would replay the same blocks of an earlier distribution.
        return self.spec.seed + 1000 * self.planned.depth

    @property
    def work(self) -> Path:
        """Directory of step checkpoints and other work in progress."""
        # By key, so that equal stages of two runs share the work, and one of them waits for the other.
        return self.environment.work / self.planned.key[:SHORT]


@dataclass(frozen=True)
class StageModels:
    """The model that a stage trains, and what preserves earlier knowledge."""

    model: LanguageModel
    teacher: LanguageModel | None = None
    """Source of distillation."""
    anchor: WeightAnchor | None = None
    """The old weights, to which the penalty pulls."""
    generated: NDArray[np.int64] | None = None
    """Blocks that the parent's model wrote, if they are replayed in place of stored text."""
    start: Mapping[str, Tensor] = field(default_factory=dict)
    """The old weights, if the trained ones are averaged with them."""


@dataclass(frozen=True)
class PhaseRun:
    """One phase and its place in the stage."""

    stage: StageRun
    number: int
    phase: Phase
    first_step: int
    """Steps of the stage before it."""
    order_step: int
    """Steps before it that share its order of samples."""
    seed: int
    """Seed of that order."""
    resume: Path | None
    """Step checkpoint to continue from."""
    rollbacks: Rollbacks
    """Of the stage so far."""
    is_done: bool = False
    """Whether a checkpoint of a later phase holds its result."""
