"""What a run would train and what it would cost, before anything is trained. Torch-free until a stage is opened."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lifelong_moe.config.run import RunConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.methods.graph import stage_specs
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.cost import ParameterCount, count_parameters, parameters_by_part
from lifelong_moe.plan.disk import DiskNeed, disk_need
from lifelong_moe.plan.flops import stage_flops
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.routing.config import Bundles


@dataclass(frozen=True)
class PlannedStage:
    """A stage with its key and its cost."""

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

    @property
    def beside(self) -> bool:
        """Whether it is a model of its own beside the run's chain of stages."""
        return self.index > 0 and self.spec.parent is None

    @property
    def tokens(self) -> int:
        """Tokens trained on: whole steps."""
        return self.spec.steps * self.spec.optim.batch_tokens

    @property
    def routing(self) -> str:
        """The routing in a word or two."""
        routing = self.spec.routing
        if routing.bundles != Bundles.none:
            return f"{routing.mode}, bundles by {routing.bundles}"
        return f"cluster/{routing.level}" if routing.mode == "cluster" else routing.mode


def plan_stages(
    config: RunConfig, data_hashes: Mapping[str, str], tokenizer: Mapping[str, Any], bos_id: int
) -> list[PlannedStage]:
    """Resolve all stages of a run.

    Args:
        config: The run.
        data_hashes: Hash of each distribution's training documents.
        tokenizer: ``recipe``, ``hash`` and ``vocab_size``.
        bos_id: Its document separator.
    """
    planned: list[PlannedStage] = []
    for index, spec in enumerate(stage_specs(config)):
        parent = None if spec.parent is None else planned[spec.parent]
        depth = parent.depth + 1 if parent else 0
        before, key = (parent.architecture, parent.key) if parent else (None, None)
        planned.append(_planned(spec, index, depth, before, key, data_hashes, tokenizer, bos_id))
    return planned


def plan_next(
    config: RunConfig,
    parent: Architecture,
    parent_key: str,
    data_hashes: Mapping[str, str],
    tokenizer: Mapping[str, Any],
    bos_id: int,
    gone: Collection[str] = (),
) -> PlannedStage:
    """Resolve the run's last stage alone, as the one that comes after a committed stage.

    Args:
        config: The run, the new stage its last; a chain.
        parent: Of the stage that it continues, whatever made that one.
        parent_key: Its key.
        data_hashes: Hash of each distribution's training documents.
        tokenizer: ``recipe``, ``hash`` and ``vocab_size``.
        bos_id: Its document separator.
        gone: Distributions whose training text is not there any more: of those nothing is replayed.
    """
    spec, index = stage_specs(config, gone)[-1], len(config.stages) - 1
    return _planned(spec, index, index, parent, parent_key, data_hashes, tokenizer, bos_id)


def _planned(
    spec: StageSpec,
    index: int,
    depth: int,
    before: Architecture | None,
    parent_key: str | None,
    data_hashes: Mapping[str, str],
    tokenizer: Mapping[str, Any],
    bos_id: int,
) -> PlannedStage:
    after = spec.architecture(before, tokenizer["vocab_size"], bos_id)
    trainable = trainable_parameters(spec, after)
    if not trainable:
        raise ConfigError(
            f"stages[{index}]: nothing is left to train. Set stages[{index}].trunk.train=full or "
            f"stages[{index}].finetune.trainable=all."
        )
    identity = {"recipe": tokenizer["recipe"], "hash": tokenizer["hash"]}
    return PlannedStage(
        index=index,
        depth=depth,
        spec=spec,
        key=spec.key(parent_key, data_hashes[spec.data], dict(data_hashes), identity),
        parent_key=parent_key,
        architecture=after,
        parameters=count_parameters(after),
        trainable=trainable,
        flops=stage_flops(spec, after, before),
    )


def chain(planned: list[PlannedStage]) -> list[PlannedStage]:
    """The run's own stages in order, without those beside them."""
    return [stage for stage in planned if not stage.beside]


def trainable_parameters(spec: StageSpec, architecture: Architecture) -> int:
    """Parameters that a stage trains."""
    counted = parameters_by_part(architecture)
    return sum(num for (part, generation), num in counted.items() if spec.trains_part(architecture, part, generation))


def stage_need(planned: PlannedStage, config: RunConfig) -> DiskNeed:
    """What a stage of a run writes at most."""
    return disk_need(planned.spec, planned.trainable, config.checkpoint, config.trainer)


def check_clusters(planned: list[PlannedStage], documents: Mapping[str, int]) -> None:
    """Every document cluster needs a document.

    Args:
        planned: The run's stages.
        documents: Training documents of each distribution.

    Raises:
        ConfigError: Naming the first stage with more clusters than documents.
    """
    for stage in planned:
        routing = stage.spec.routing
        if not routing.by_document or not (stage.spec.parent is None or stage.spec.grow):
            continue
        clusters = routing.clusters_of(stage.architecture.generations[-1].experts)
        # With bundles the first stage's centroids are fitted for the first stage that grows.
        for one in (stage, planned[0]) if routing.has_bundles else (stage,):
            if clusters > documents[one.spec.data]:
                raise ConfigError(
                    f"stages[{one.index}]: {clusters} document clusters need as many training documents; "
                    f"{one.spec.data} has {documents[one.spec.data]}. Set routing.clusters lower."
                )
