"""Plan a run: its stages with keys and costs, before anything is trained. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lifelong_moe.config.routing.shared import TextClusterConfig
from lifelong_moe.config.run import RunConfig
from lifelong_moe.data.tokens.identity import DataIdentity
from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.disk import DiskNeed, disk_need
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.plan.planned import PlannedStage, planned_base
from lifelong_moe.plan.spec import BASE


def plan_stages(config: RunConfig, data: DataIdentity) -> list[PlannedStage]:
    """Resolve all stages of a run on its data."""
    planned: list[PlannedStage] = []
    base = planned_base(config, data.bos_id)
    # Depth, key and architecture by index; specs come in order of training, so the parent is there already.
    known = {} if base is None else {BASE: (0, base.key, base.architecture)}
    for index, spec in enumerate(stage_specs(config)):
        parent = None if spec.parent is None else known[spec.parent]
        depth = parent[0] + 1 if parent else 0
        stage = PlannedStage.of(spec, index, depth, parent[1:] if parent else None, data)
        known[index] = depth, stage.key, stage.architecture
        planned.append(stage)
    return planned


def plan_next(
    config: RunConfig, parent_key: str, parent: Architecture, data: DataIdentity, gone: Collection[str] = ()
) -> PlannedStage:
    """Resolve the run's last stage alone, as the successor of a committed stage.

    Args:
        config: The run, the new stage its last; a chain.
        parent_key: Of the stage that it continues.
        parent: That stage's architecture, also of a derived stage.
        data: What the run reads.
        gone: Distributions whose training text was removed, which are not replayed.
    """
    spec, index = stage_specs(config, gone)[-1], len(config.stages) - 1
    return PlannedStage.of(spec, index, index + config.base.is_given, (parent_key, parent), data)


def chain(planned: list[PlannedStage]) -> list[PlannedStage]:
    """The run's own stages in order, without the models that are trained from scratch for comparison."""
    return [stage for stage in planned if not stage.is_from_scratch]


def stage_need(planned: PlannedStage, config: RunConfig) -> DiskNeed:
    """Upper bound of what a stage of a run writes."""
    return disk_need(planned.spec, planned.trainable, config.checkpoint, config.trainer)


def check_clusters(planned: list[PlannedStage], documents: Mapping[str, int]) -> None:
    """Require a training document for every document cluster.

    Args:
        planned: The run's stages.
        documents: Training documents of each distribution.

    Raises:
        ConfigError: Naming the first stage with more clusters than documents.
    """
    for stage in planned:
        routing = stage.spec.routing
        fits = stage.spec.parent is None or stage.spec.grow
        if not isinstance(routing, TextClusterConfig) or not routing.by_document or not fits:
            continue
        clusters = routing.num_clusters(stage.architecture.generations[-1].experts)
        # With bundles, the first stage's centroids are fitted when the first stage grows, in the same number.
        for one in (stage, planned[0]) if routing.by_generation else (stage,):
            if clusters > documents[one.spec.data]:
                raise ConfigError(
                    f"stages[{one.index}]: {clusters} document clusters need as many training documents; "
                    f"{one.spec.data} has {documents[one.spec.data]}. Set routing.clusters lower."
                )
