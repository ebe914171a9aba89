"""Turn a configuration into data and a plan, and check that text and disk space suffice for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from lifelong_moe.config.load import LoadedConfig, written_config
from lifelong_moe.config.references import stored_config
from lifelong_moe.config.routing.own import allow_router
from lifelong_moe.config.routing.topk import CustomRouterConfig
from lifelong_moe.config.run import RunConfig
from lifelong_moe.config.sections import section
from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.data.tokens.prepare import PreparedData, prepare_data
from lifelong_moe.data.tokens.records import Remembered
from lifelong_moe.errors import DataError
from lifelong_moe.interop.layout.folder import read_checkpoint
from lifelong_moe.interop.layout.place import folder_of
from lifelong_moe.plan.disk import require_space, run_need, used_space
from lifelong_moe.plan.key import SCHEMA
from lifelong_moe.plan.memory import require_memory
from lifelong_moe.plan.methods import added_vocabulary
from lifelong_moe.plan.planned import PlannedBase, PlannedStage, planned_base
from lifelong_moe.plan.stages import check_clusters, check_shares, plan_stages, stage_need
from lifelong_moe.storage.keys import SHORT
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import RunRecord, require_head
from lifelong_moe.store.stages import StageStore
from lifelong_moe.training.first_centroids import find_centroids, needs_first_centroids
from pipelines.shared.places import CACHE, ROOT
from pipelines.shared.remembering import remembered

__all__ = [
    "CACHE",
    "ROOT",
    "Prepared",
    "prepare",
    "read_data",
    "recorded_trainer",
    "remembered",
    "require_room",
]


@dataclass(frozen=True)
class Prepared:
    """A configuration with its data and its plan."""

    loaded: LoadedConfig
    data: PreparedData
    plan: list[PlannedStage]

    @property
    def base(self) -> PlannedBase | None:
        """The checkpoint that the first stage continues."""
        return planned_base(self.config, self.data.tokenizer.bos_id)

    @property
    def config(self) -> RunConfig:
        """The validated configuration."""
        return self.loaded.config


def prepare(loaded: LoadedConfig, memory: dict[str, PreparedData] | None = None) -> Prepared:
    """Prepare a configuration's data, and plan its stages.

    Args:
        loaded: The configuration.
        memory: Data that was read before, by what was requested; several runs on the same data share it.

    Raises:
        DataError: If a stage that is not committed needs text that is gone.
    """
    config = loaded.config
    require_memory(config)
    allow_router(config.routing.mode)  # its user gave the configuration to this command
    if isinstance(config.routing, CustomRouterConfig):
        from lifelong_moe.routing.registry import build_router  # imports torch

        # Only for its errors: a class that cannot be built is reported before data is read.
        build_router(config.routing, width=config.model.width, layer=0)
    head = RunRecord(ROOT, config.run).head()
    if head is None and config.base.is_given:
        _require_sound(folder_of(config.base), config.base.sha256)
    data = read_data(config, memory, remembered(head, written_config(loaded.raw)))
    plan = plan_stages(config, data.identity)
    check_clusters(plan, {name: record.documents for name, record in data.records.items()})
    check_shares(plan, config, data.corpora)
    require_text(plan, data, head)
    return Prepared(loaded, data, plan)


@cache
def _require_sound(folder: Path, sha256: str | None) -> None:
    """Read a checkpoint's numbers before a new run writes anything; ``sha256`` tells checkpoints of one place apart."""
    from lifelong_moe.interop.pretrained import require_sound  # imports torch

    require_sound(read_checkpoint(folder))


def require_text(plan: Sequence[PlannedStage], data: PreparedData, head: RunHead | None) -> None:
    """Raise an error if a stage that has yet to be trained needs text that is gone.

    Args:
        plan: All stages.
        data: What was read for them.
        head: The run's head; None if there is none yet.

    Raises:
        DataError: Naming the text and the stage; or another error that says why the text could not be read.
    """
    if not data.gone:
        return
    store = StageStore(ROOT)
    for planned in plan:
        needed = [name for name in planned.spec.uses if name in data.gone]
        if not needed or store.find(planned.key) is not None:
            continue
        name, spec, was = needed[0], planned.spec, dict(enumerate(head.plan if head else ())).get(planned.index)
        verb = "learns" if name in spec.learns else "replays" if name in spec.reads else "measures old weights on"
        why = "is not committed"
        if was is not None and was != planned.key and store.find(was) is not None:
            why = f"is committed with another configuration ({was[:SHORT]}, not {planned.key[:SHORT]})"
        # The same type: unreachable text remains a TryAgainError, with its exit code 75.
        raise type(data.gone[name])(f"{data.gone[name]} Stage {spec.name}, which {verb} {name}, {why}.")
    _require_first_text(plan, data, store)


def _require_first_text(plan: Sequence[PlannedStage], data: PreparedData, store: StageStore) -> None:
    """Raise a DataError if centroids of the first stage's text are needed, but were not fitted before it was gone."""
    if plan[0].spec.parent is not None:  # a checkpoint writes the text for its centroids itself
        return
    each = ((planned.spec.name, planned.spec.routing) for planned in plan)
    grown = next(((name, routing) for name, routing in each if needs_first_centroids(routing)), None)
    first = store.find(plan[0].key)
    gone = [name for name in plan[0].spec.learns if name in data.gone]
    if grown is None or not gone or first is None or find_centroids(store, first, grown[1]) is not None:
        return
    raise DataError(
        f"{data.gone[gone[0]]} Stage {grown[0]} needs centroids of that text (routing.bundles=cluster), and "
        f"they were never fitted."
    )


def further_training(head: RunHead, plan: list[PlannedStage], store: StageStore) -> str:
    """A remedy to append to the message that a plan differs from its run's; empty if there is none.

    It tells how to train a committed stage further, if only the stage's tokens were raised; or that an earlier version
    trained the stage, whose keys differ.

    Args:
        head: The run's head; its stages differ from the planned ones.
        plan: The planned stages.
        store: The committed stages.
    """
    first = next(i for i, (old, new) in enumerate(zip(head.plan, plan, strict=False)) if old != new.key)
    stage, spec = store.find(head.plan[first]), plan[first].spec
    if stage is None:
        return ""
    if stage.schema != SCHEMA:
        return (
            f" Stage {stage.name} was trained by an earlier version: it can be read, evaluated and retrained from, but "
            f"run trains it anew."
        )
    if not (before := stage.spec.tokens) < spec.tokens:
        return ""
    if replace(stage.spec, tokens=spec.tokens) != spec:
        return ""
    parts = (f"{name}: {share}" for name, share in zip(spec.new, spec.shares, strict=True))
    told = f"{{{', '.join(parts)}}}" if spec.mixed else spec.data
    return (
        f" Stage {spec.name} is committed with {before:,} tokens; to train it further, leave it as it is and append a "
        f"stage {{data: {told}, continues: {spec.name}}}."
    )


def read_data(
    config: RunConfig, memory: dict[str, PreparedData] | None = None, known: Remembered | None = None
) -> PreparedData:
    """Read and tokenize all distributions of a run, or open what was read before.

    Args:
        config: The run.
        memory: See :func:`prepare`.
        known: Records and held-out documents that replace text that is gone.
    """
    used = {name: config.distributions[name] for name in config.evaluated}
    asked = (used, config.tokenizer, config.trained, config.model.context)
    vocabulary = added_vocabulary(config)
    known = known or Remembered()
    if not config.evaluate.keep_heldout:
        known = replace(known, heldout=None)
    memory = {} if memory is None else memory
    # Text that is there is read without records, so runs with different records share it.
    name = repr((asked, vocabulary))
    if name not in memory and (name := repr((asked, vocabulary, known.records, known.heldout is None))) not in memory:
        data = prepare_data(*asked, CACHE, known, vocabulary)
        memory[name if data.gone else repr((asked, vocabulary))] = data
        return data
    return memory[name]


def require_room(stages: Sequence[PlannedStage], config: RunConfig) -> None:
    """Require disk space for stages that are about to be trained; what they have already written counts as free.

    Args:
        stages: Stages that are not committed yet, trained one after the other.
        config: Their run's configuration.

    Raises:
        ResourceError: If the file system has less than :func:`stage_need` says.
    """
    written = sum(used_space(ROOT / "work" / stage.key[:SHORT]) for stage in stages)
    what = f"stage {stages[0].spec.name}" if len(stages) == 1 else f"run={config.run}"
    require_space(ROOT, run_need([stage_need(stage, config) for stage in stages]) - written, what)


def recorded_trainer(run: str) -> TrainerConfig:
    """The ``trainer`` section of a run that exists."""
    return section(TrainerConfig, stored_config(require_head(ROOT, run).config).get("trainer"), "trainer")
