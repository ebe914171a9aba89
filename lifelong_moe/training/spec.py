"""A stage, fully resolved: what it reads, and hence its key. Torch-free."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lifelong_moe.growth.config import GrowConfig
from lifelong_moe.model.architecture import Architecture, Generation
from lifelong_moe.model.config import ModelConfig
from lifelong_moe.model.cost import training_flops
from lifelong_moe.retention.config import DistillConfig, DistillText, TrunkConfig, TrunkTraining
from lifelong_moe.routing.config import Features, Level, RoutingConfig
from lifelong_moe.stages.keys import SCHEMA, content_key
from lifelong_moe.training.config import OptimConfig

HASH_WARMUP = 0.1
"""Share of the first stage that trains with hash routing before centroids of hidden states are fitted."""


@dataclass(frozen=True)
class Phase:
    """A part of a stage with an optimizer and a schedule of its own."""

    name: str
    steps: int
    fits_clusters: bool
    """Fit the stage's centroids before it begins."""


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """What a method wants of one stage. Absent mechanisms are None, so that equal work has equal keys."""

    name: str
    data: str
    """The distribution it learns."""
    parent: int | None
    """Index of the stage it continues; None begins from random weights."""
    replayed: tuple[str, ...]
    """Earlier distributions whose training text is mixed in."""
    replay_fraction: float
    tokens: int
    grow: GrowConfig | None
    trunk: TrunkConfig | None
    """None trains the shared parts like everything else."""
    distill: DistillConfig | None
    optim: OptimConfig
    model: ModelConfig
    routing: RoutingConfig
    seed: int
    precision: str
    gradient_clip: float
    accumulate: int
    """Micro-batches a step; the load-balancing loss is one of each micro-batch, so they change the result."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.tokens // self.optim.batch_tokens

    @property
    def global_batch(self) -> int:
        """Sequences a step."""
        return self.optim.batch_tokens // self.model.context

    @property
    def distilled_share(self) -> float:
        """Share of the stage's sequences that a teacher is asked about."""
        if self.distill is None:
            return 0.0
        share = self.replay_fraction if self.distill.text == DistillText.replay else 1 - self.replay_fraction
        return share * self.distill.fraction

    @property
    def teacher_tokens(self) -> int:
        """Tokens of the stage that a teacher is asked about, nearly."""
        return round(self.steps * self.optim.batch_tokens * self.distilled_share)

    def phases(self) -> list[Phase]:
        """The stage's parts in order; one, but where clusters are made of hidden states that must be learned first."""
        routing = self.routing
        clustered = routing.mode == "cluster"
        of_hidden = clustered and routing.level == Level.token and routing.features == Features.hidden
        fits = clustered and (self.parent is None or self.grow is not None)
        if of_hidden and self.parent is None:
            warmup = max(1, round(HASH_WARMUP * self.steps))
            return [Phase("hash", warmup, False), Phase("train", self.steps - warmup, True)]
        return [Phase("train", self.steps, fits)]

    def architecture(self, parent: Architecture | None, vocab_size: int, bos_id: int) -> Architecture:
        """The model at the end of this stage."""
        if parent is None:
            first = (Generation(self.name, self.model.experts),)
            architecture = Architecture(self.model, self.routing, vocab_size, bos_id, first)
        else:
            architecture = parent.grown(self.name, self.grow.experts) if self.grow else parent
        if self.routing.mode != "label":
            return architecture
        known = self.data in dict(architecture.labels)
        return architecture.labelled(self.data) if self.grow or not known else architecture

    def flops(self, architecture: Architecture, parent: Architecture | None) -> int:
        """Active FLOPs of the stage, the teacher's forward passes included."""
        tokens = self.steps * self.optim.batch_tokens
        return training_flops(architecture, tokens, parent, self.teacher_tokens)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        return dataclasses.asdict(self)

    def key(self, parent_key: str | None, data_hash: str, replay_hashes: dict[str, str], tokenizer: Any) -> str:
        """The stage's content address.

        Args:
            parent_key: Key of the stage it continues.
            data_hash: Of its training documents.
            replay_hashes: Of each replayed distribution's training documents.
            tokenizer: Recipe and hash of the tokenizer, plain JSON data.
        """
        spec = self.to_json()
        # What has no effect on the result must not change the address.
        spec["tokens"] = self.steps * self.optim.batch_tokens
        del spec["parent"]
        if self.grow:
            del spec["grow"]["min_share"]
        if self.trunk and self.trunk.train != TrunkTraining.gentle:
            del spec["trunk"]["lr_scale"]
        replay = [replay_hashes[name] for name in self.replayed]
        return content_key(
            {
                "schema": SCHEMA,
                "spec": {**spec, "replayed": replay},
                "parent": parent_key,
                "data": data_hash,
                "tokenizer": tokenizer,
            }
        )
