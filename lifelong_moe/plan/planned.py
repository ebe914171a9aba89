"""A planned stage: specification, key and cost. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lifelong_moe.config.routing.base import Bundles
from lifelong_moe.config.routing.routers import ClusterConfig
from lifelong_moe.config.run import RunConfig
from lifelong_moe.data.tokens.identity import DataIdentity
from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.architecture import Architecture, first_generation
from lifelong_moe.plan.cost import ParameterCount, count_parameters, parameters_by_part
from lifelong_moe.plan.flops import stage_flops
from lifelong_moe.plan.key import stage_key
from lifelong_moe.plan.spec import BASE_NAME, StageSpec
from lifelong_moe.storage.keys import content_key


@dataclass(frozen=True)
class PlannedStage:
    """A stage that is resolved on its run's data."""

    index: int
    """Its place in the order of training."""
    depth: int
    """Stages that it continues, directly or not; seeds depend on it."""
    spec: StageSpec
    key: str
    parent_key: str | None
    architecture: Architecture
    """At the end of the stage."""
    parameters: ParameterCount
    trainable: int
    """Parameters that this stage trains."""
    flops: int
    """Active FLOPs, the teacher's included."""

    @classmethod
    def of(
        cls, spec: StageSpec, index: int, depth: int, parent: tuple[str, Architecture] | None, data: DataIdentity
    ) -> PlannedStage:
        """Resolve a stage; ``parent`` is the key and the architecture of the stage that it continues.

        Raises:
            ConfigError: If it would train nothing.
        """
        # What is recorded must be what the key is of: a record whose key is of something else is not read again.
        spec = spec.effective()
        parent_key, before = parent or (None, None)
        # Checked here, where the stage's index is known for the message.
        after = spec.architecture(before, data.vocab_size, data.bos_id, data.tokens_added(index))
        trainable = trainable_parameters(spec, after)
        if not trainable:
            raise ConfigError(
                f"stages[{index}]: nothing is left to train. Set stages[{index}].trunk.train=full or "
                f"stages[{index}].finetune.trainable=all."
            )
        return cls(
            index=index,
            depth=depth,
            spec=spec,
            key=stage_key(spec, parent_key, data.at(index)),
            parent_key=parent_key,
            architecture=after,
            parameters=count_parameters(after),
            trainable=trainable,
            flops=stage_flops(spec, after, before),
        )

    @property
    def is_from_scratch(self) -> bool:
        """Whether it is a model from scratch, for comparison with a stage of the run's chain."""
        return self.index > 0 and self.spec.parent is None

    @property
    def tokens_added(self) -> int:
        """Tokens that it adds to the vocabulary."""
        return self.architecture.generations[-1].tokens if self.spec.vocabulary is not None else 0

    @property
    def tokens(self) -> int:
        """Tokens trained on: whole steps."""
        return self.spec.steps * self.spec.optim.batch_tokens

    @property
    def routing(self) -> str:
        """The routing in a few words, for tables."""
        routing = self.spec.routing
        if routing.bundles != Bundles.none:
            return f"{routing.mode}, bundles by {routing.bundles}"
        return f"cluster/{routing.level}" if isinstance(routing, ClusterConfig) else routing.mode


def trainable_parameters(spec: StageSpec, architecture: Architecture) -> int:
    """Parameters that a stage trains."""
    counts = parameters_by_part(architecture)
    return sum(num for (part, generation), num in counts.items() if spec.trains_part(architecture, part, generation))


@dataclass(frozen=True)
class PlannedBase:
    """A checkpoint's model before anything is trained."""

    identity: Mapping[str, Any]
    """What its key is a hash of: the checkpoint's files, and what the run makes of them."""
    architecture: Architecture

    @property
    def key(self) -> str:
        """Its content address."""
        return content_key(self.identity)


def planned_base(config: RunConfig, bos_id: int) -> PlannedBase | None:
    """The checkpoint of a run; None if it begins with random weights.

    Args:
        config: The run.
        bos_id: The document separator.
    """
    if not config.base.is_given:
        return None
    routing = config.routing.effective(grown=False)
    first = (first_generation(BASE_NAME, config.model),)
    architecture = Architecture(config.model, routing, config.base.vocab_size, bos_id, first)
    # A run's context and masks are the model's, and each later stage's architecture is its parent's.
    identity = {"derived": "import", "from": None, "sha256": config.base.sha256, "model": architecture.to_json()}
    return PlannedBase(identity, architecture)
