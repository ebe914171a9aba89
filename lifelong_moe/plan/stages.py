"""Plan a run: its stages with keys and costs, before anything is trained. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from lifelong_moe.config.routing.shared import TextClusterConfig
from lifelong_moe.config.run import RunConfig
from lifelong_moe.config.stage_rules import small_share
from lifelong_moe.data.tokens.identity import DataIdentity
from lifelong_moe.data.tokens.packing import epochs
from lifelong_moe.data.tokens.shards import TokenizedCorpus
from lifelong_moe.errors import ConfigError
from lifelong_moe.plan.architecture import Architecture
from lifelong_moe.plan.disk import DiskNeed, disk_need
from lifelong_moe.plan.methods import stage_specs
from lifelong_moe.plan.planned import PlannedStage, planned_base
from lifelong_moe.plan.spec import BASE, StageSpec


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
            if clusters > (there := sum(documents[name] for name in one.spec.new)):
                raise ConfigError(
                    f"stages[{one.index}]: {clusters} document clusters need as many training documents; "
                    f"{', '.join(one.spec.new)} has {there}. Set routing.clusters lower."
                )


def new_tokens(spec: StageSpec) -> dict[str, float]:
    """Tokens of each distribution that a stage learns, without those of replay; exact to a block."""
    tokens, whole = spec.steps * spec.optim.batch_tokens - spec.replayed_tokens, sum(spec.shares)
    return {name: tokens * share / whole for name, share in zip(spec.new, spec.shares, strict=True)}


def epochs_by_distribution(spec: StageSpec, corpora: Mapping[str, TokenizedCorpus]) -> dict[str, float]:
    """Passes over the training text of each distribution that a stage learns, without those of replay."""
    return {name: epochs(tokens, corpora[name].train, spec.model.context) for name, tokens in new_tokens(spec).items()}


def check_shares(planned: Sequence[PlannedStage], config: RunConfig, corpora: Mapping[str, TokenizedCorpus]) -> None:
    """Require a block of training for each distribution of a mixture, and no more passes over a text than is allowed.

    Args:
        planned: The run's stages.
        config: The run.
        corpora: Tokenized text by distribution; what is gone is not counted.

    Raises:
        ConfigError: Naming the stage, the distribution and what to change.
    """
    index = {stage.name: i for i, stage in enumerate(config.stages)}
    for one in planned:
        # A joint stage and models from scratch are none of the configuration's.
        if (i := index.get(one.spec.name)) is None:
            continue
        most = config.stages[i].max_epochs
        for name, tokens in new_tokens(one.spec).items():
            if tokens < config.model.context and one.spec.mixed:
                raise ConfigError(small_share(i, name, config.model.context))
            passes = epochs(tokens, corpora[name].train, config.model.context) if name in corpora else 0.0
            if most is not None and passes > most:
                raise ConfigError(
                    f"stages[{i}].max_epochs={most:g}: {name} would be gone through {passes:.1f} times. Lower its "
                    f"weight or stages[{i}].tokens, or raise max_epochs."
                )
