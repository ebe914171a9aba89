"""The full specification of a stage. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lifelong_moe.config.growth import GrowConfig, VocabularyConfig
from lifelong_moe.config.model import ModelConfig
from lifelong_moe.config.parts import Part
from lifelong_moe.config.retention import (
    DistillConfig,
    DistillText,
    PenaltyConfig,
    PenaltyKind,
    ReplayConfig,
    ReplaySource,
    ReviewConfig,
    TrunkConfig,
    TrunkTraining,
)
from lifelong_moe.config.routing.base import RoutingConfig
from lifelong_moe.config.routing.modes import stored_routing
from lifelong_moe.config.training import FinetuneConfig, OptimConfig
from lifelong_moe.plan.architecture import Architecture, Generation, first_generation
from lifelong_moe.plan.phase import Phase, Trains
from lifelong_moe.storage.grammars import Name
from lifelong_moe.storage.plain import PlainError, from_plain

BASE = -1
"""In place of a stage's index: the checkpoint that a run begins with."""
BASE_NAME = "base"
"""The stage that a checkpoint's experts are attributed to."""
HASH_WARMUP = 0.1
"""Share of the first stage that trains with hash routing before centroids of hidden states are fitted."""
_REPLAY = {"replay_fraction": "fraction", "replay_source": "source", "replay_buffer": "buffer_tokens"}
"""Names of :class:`ReplayConfig`'s fields in a stage's JSON data."""


def own_text(learns: Sequence[str], earlier: Collection[str]) -> tuple[str, ...]:
    """The distributions by which a stage is judged: what it learns that no earlier stage learned, or else all of it.

    What an earlier stage learned and a mixture trains on beside new text is rehearsed, as replay would: it can be
    forgotten all the same. What comes back without any new text is learned once more.

    Args:
        learns: Of the stage.
        earlier: What the stages before it learned.
    """
    return tuple(name for name in learns if name not in earlier) or tuple(learns)


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """All settings of a stage. Mechanisms that are off are None, so that equal work has equal keys."""

    name: Name
    data: Name
    """The distribution it learns; of a mixture, that with the largest share."""
    parent: int | None
    """Index of the stage it continues, :data:`BASE` for a checkpoint; None begins from random weights."""
    replayed: tuple[Name, ...]
    """Earlier distributions whose text is mixed in; without a parent, those that are learned at the same time."""
    replay_weights: tuple[int, ...]
    """Turns of each in a round."""
    replay: ReplayConfig
    """Its source and buffer also apply to the text for the Fisher information."""
    fisher_data: tuple[Name, ...]
    """Earlier distributions for the Fisher information; empty without EWC, or with generated text."""
    tokens: int
    grow: GrowConfig | None
    continues: Name | None
    """Birth stage of the experts that alone train on; None trains new ones, or those that trained last."""
    trunk: TrunkConfig | None
    """None trains the shared parts like everything else."""
    distill: DistillConfig | None
    penalty: PenaltyConfig | None
    average: float = 0.0
    """Share of the parent's weights in the average at the end; 0 is none."""
    review: ReviewConfig | None
    optim: OptimConfig
    finetune: FinetuneConfig | None
    """Learn answers to prompts; None learns all text."""
    model: ModelConfig
    routing: RoutingConfig
    seed: int
    precision: str
    gradient_clip: float
    accumulate: int
    """Micro-batches per step and process."""
    # Each has a load-balancing loss of its own, over all processes: their number changes the result, that of processes
    # changes rounding alone, unless each process draws noise.
    processes: int
    """Processes that take a step together."""
    vocabulary: VocabularyConfig | None = None
    """Tokens that it adds; None adds none."""
    mixed: tuple[Name, ...] = ()
    """The other distributions of a mixture that it learns."""
    mix_weights: tuple[int, ...] = ()
    """Shares of ``data`` and each of ``mixed`` in the new text, in proportion; empty without a mixture."""
    text_ends: tuple[int, ...] = ()
    """Tokens besides BOS that end a document in text that the parent's model writes, for it descends from a checkpoint
    that ends text so. Also of the checkpoint's own record."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.tokens // self.optim.batch_tokens

    @property
    def review_steps(self) -> int:
        """Steps at the end in which only router rows train."""
        return round(self.steps * self.review.fraction) if self.review else 0

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up, of parameters that train at the full rate."""
        return self.optim.lr * (self.optim.rewarm if self.parent is not None else 1.0)

    @property
    def global_batch(self) -> int:
        """Sequences a step."""
        return self.optim.batch_tokens // self.model.context

    def __post_init__(self) -> None:
        if len(self.mix_weights) != (len(self.mixed) + 1 if self.mixed else 0) or min(self.mix_weights, default=1) < 1:
            raise PlainError("must have a positive number for each distribution of the mixture", ".mix_weights")
        if len(set(self.new)) < len(self.new):
            raise PlainError("must name each distribution of the mixture once", ".mixed")

    @property
    def new(self) -> tuple[str, ...]:
        """The distributions of its new text, in the order of :attr:`shares`."""
        return (self.data, *self.mixed)

    @property
    def shares(self) -> tuple[int, ...]:
        """Shares of :attr:`new` in the new text, in proportion."""
        return self.mix_weights or (1,)

    @property
    def learns(self) -> tuple[str, ...]:
        """Distributions that are new in this stage."""
        return self.new if self.parent is not None else (*self.new, *self.replayed)

    @property
    def generates(self) -> bool:
        """Whether the parent's model writes the replayed text."""
        return bool(self.replayed) and self.replay.source == ReplaySource.generated

    @property
    def measures_generated(self) -> bool:
        """Whether the Fisher information is measured on text that the parent's model writes."""
        by_fisher = self.penalty is not None and self.penalty.kind == PenaltyKind.ewc
        # Earlier versions measured on stored text even if they replayed generated text.
        return by_fisher and self.replay.source == ReplaySource.generated and not self.fisher_data

    @property
    def written_blocks(self) -> tuple[int, int]:
        """Blocks that the parent's model writes: for replay, and for the Fisher information."""
        replayed = max(1, self.replayed_tokens // self.model.context) if self.generates else 0
        return replayed, self.fisher_measured_tokens // self.model.context if self.measures_generated else 0

    @property
    def reads(self) -> tuple[str, ...]:
        """Other distributions whose training text it replays."""
        return () if self.generates else self.replayed

    @property
    def uses(self) -> tuple[str, ...]:
        """Distributions whose training text affects its result."""
        return (*self.new, *self.reads, *self.fisher_data)

    @property
    def distilled_share(self) -> float:
        """Share of the sequences outside the review on which the teacher is asked."""
        if self.distill is None:
            return 0.0
        share = self.replay.fraction if self.distill.text == DistillText.replay else 1 - self.replay.fraction
        return share * self.distill.fraction

    @property
    def distilled_tokens(self) -> int:
        """Approximate number of tokens on which the teacher is asked."""
        until = 0.0 if self.distill is None else self.distill.until
        return round((self.steps - self.review_steps) * self.optim.batch_tokens * self.distilled_share * until)

    @property
    def teacher_tokens(self) -> int:
        """Approximate number of tokens that the parent's model reads as teacher, or writes."""
        measured = self.fisher_measured_tokens if self.measures_generated else 0
        return self.distilled_tokens + (self.replayed_tokens if self.generates else 0) + measured

    @property
    def buffer_blocks(self) -> int | None:
        """Blocks kept of each earlier distribution's text; None keeps all."""
        return None if self.replay.buffer_tokens is None else max(1, self.replay.buffer_tokens // self.model.context)

    @property
    def fisher_measured_tokens(self) -> int:
        """Tokens, in whole blocks, for the Fisher information; less if there is less text."""
        if self.penalty is None:
            return 0
        blocks = max(1, self.penalty.fisher_tokens // self.model.context)
        if self.measures_generated:
            return blocks * self.model.context
        kept = blocks if self.buffer_blocks is None else min(blocks, self.buffer_blocks)
        return len(self.fisher_data) * kept * self.model.context

    @property
    def replayed_tokens(self) -> int:
        """Approximate number of replayed tokens that it trains on."""
        return round(sum(p.steps * self.optim.batch_tokens * p.replay_fraction for p in self.phases()))

    def phases(self) -> list[Phase]:
        """The stage's phases in order: usually one."""
        fits = self.routing.is_clustered and (self.parent is None or self.grow is not None)
        steps, share = self.steps - self.review_steps, self.replay.fraction
        phases = []
        # Clusters of hidden states need hidden states that have been learned: hash routing trains them.
        if self.routing.clusters_hidden and self.parent is None:
            warmup = max(1, round(HASH_WARMUP * steps))
            phases.append(Phase(name="hash", steps=warmup, replay_fraction=share))
            steps -= warmup
        phases.append(Phase(name="train", steps=steps, replay_fraction=share, fits_clusters=fits, follows=bool(phases)))
        if self.review is not None:
            phases.append(
                Phase(
                    name="review",
                    steps=self.review_steps,
                    replay_fraction=self.review.replay_fraction,
                    trains=Trains.router,
                    lr_scale=self.review.lr_scale,
                    old_loss=self.review.old_loss,
                )
            )
        return phases

    @property
    def student(self) -> list[int] | None:
        """Layers of the parent that this stage's model keeps, if it is a shallower student."""
        return None if self.distill is None else self.distill.student

    def generation(self, tokens: int = 0) -> Generation | None:
        """The generation that this stage adds, with so many tokens of its own; None without growth."""
        if self.grow is None:
            return None
        layers = None if self.grow.layers is None else tuple(self.grow.layers)
        if layers is None and len(self.model.moe_layers) < self.model.layers:
            layers = self.model.moe_layers
        return Generation(self.name, self.grow.experts, layers, self.delta_rank, rank=self.grow.rank, tokens=tokens)

    @property
    def delta_rank(self) -> int:
        """Rank of the trunk's low-rank changes that this stage trains; 0 for none."""
        return self.trunk.rank if self.trunk is not None and self.trunk.train == TrunkTraining.deltas else 0

    def architecture(self, parent: Architecture | None, vocab_size: int, bos_id: int, tokens: int = 0) -> Architecture:
        """The model at the end of this stage.

        Args:
            parent: The model that it continues.
            vocab_size: Rows of a first stage's embedding.
            bos_id: The document separator.
            tokens: Number of tokens that the stage adds, found in its text.
        """
        generation = self.generation(tokens)
        if parent is not None and len(parent.generations) == 1:
            # How to tell generations apart is not settled before there are several.
            parent = replace(parent, routing=self.routing)
        elif parent is not None:
            parent = replace(parent, routing=parent.routing.with_losses_of(self.routing))
        if parent is None:
            first = (first_generation(self.name, self.model),)
            architecture = Architecture(self.model, self.routing, vocab_size, bos_id, first)
        elif self.continues is not None:
            architecture = parent.continuing(self.continues)
        elif self.student is not None:
            architecture = parent.shallow(self.student)
        elif generation is None or self.grow is None:
            architecture = parent
        else:
            architecture = parent.grown(generation, self.grow.freezes)
        # A label stays with its generation until a stage that adds or continues one learns its distribution again.
        for name in self.new:
            if self.grow or self.continues or name not in dict(architecture.labels):
                architecture = architecture.labelled(name)
        return architecture

    def trains_part(self, architecture: Architecture, part: Part, generation: int | None) -> bool:
        """Whether it trains a part of the trunk, or of a generation; a student trains all of itself."""
        if self.finetune is not None and not self.finetune.trains(part):
            return False
        if generation is not None:
            return architecture.trains(generation)
        return self.trunk is None or not self.trunk.is_frozen or self.student is not None

    def to_json(self) -> dict[str, object]:
        """As plain JSON data."""
        data = dataclasses.asdict(self) | {"model": self.model.to_json(), "routing": self.routing.to_json()}
        data["grow"] = self.grow and self.grow.to_json()
        # Left out as in stages from before it existed, whose keys must not change.
        if self.vocabulary is None:
            del data["vocabulary"]
        # Flat, as in stages from before replay was a section, whose keys must not change.
        replay = data.pop("replay")
        # As in stages from before there were such.
        for name in ("average", "text_ends", "mixed", "mix_weights"):
            if not data[name]:
                del data[name]
        return data | {name: replay[key] for name, key in _REPLAY.items()}

    @classmethod
    def from_json(cls, data: Any) -> StageSpec:
        """The inverse of :meth:`to_json`.

        Raises:
            PlainError: If the data is no specification.
        """
        if not isinstance(data, Mapping) or not {"routing", *_REPLAY} <= set(data):
            raise PlainError("not the specification of a stage")
        # Earlier versions trained in one process, and their stages do not say so.
        replay = {key: data[name] for name, key in _REPLAY.items()}
        others = {name: value for name, value in data.items() if name not in _REPLAY}
        others["routing"] = stored_routing(data["routing"])
        return from_plain(cls, {"processes": 1, "replay": replay, **others})

    @property
    def varies_by_process(self) -> bool:
        """Whether the number of processes changes what is learned: each draws noise of its own."""
        return self.routing.varies_by_process or bool(self.finetune and self.finetune.expert_dropout)

    def effective(self) -> StageSpec:
        """The same stage with every setting without effect at its default, so that equal work has equal keys."""
        # Each section knows its own idle keys; here is what depends on the stage's place in the chain.
        has_rows, grow = self.routing.has_rows, self.grow
        if grow is not None:
            everywhere = grow.layers == list(self.model.moe_layers)
            grow = replace(grow.effective(has_rows=has_rows), layers=None if everywhere else grow.layers)
        return replace(
            self,
            tokens=self.steps * self.optim.batch_tokens,  # whole steps
            model=self.model.effective(),
            routing=self.routing.effective(grown=self.parent is not None),
            optim=self.optim.effective(continues=self.parent is not None, has_rows=has_rows),
            grow=grow,
            trunk=self.trunk and self.trunk.effective(),
            penalty=self.penalty and self.penalty.effective(),
            finetune=self.finetune and self.finetune.effective(),
            processes=self.processes if self.varies_by_process else 1,
            text_ends=self.text_ends if any(self.written_blocks) else (),
        )
