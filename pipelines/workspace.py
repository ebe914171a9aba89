"""How a configuration becomes a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from lifelong_moe.config import RunConfig, build_config, read_config, section, whole_config, written_config
from lifelong_moe.data.prepare import PreparedData, prepare_data
from lifelong_moe.methods.plan import PlannedStage, check_clusters, plan_stages, stage_need
from lifelong_moe.routing.registry import build_router
from lifelong_moe.stages.keys import SCHEMA, SHORT, canonical_json
from lifelong_moe.stages.runs import require_head
from lifelong_moe.stages.store import StageStore
from lifelong_moe.training.config import TrainerConfig
from lifelong_moe.training.disk import require_space, run_need, used_space
from pipelines.places import CACHE, ROOT

__all__ = ["CACHE", "ROOT", "Prepared", "prepare", "read_data", "recorded_trainer", "require_room"]


@dataclass(frozen=True)
class Prepared:
    """A configuration with its data and its plan."""

    config: RunConfig
    raw: dict[str, Any]
    """The configuration as written, interpolations unresolved: nothing resolved is ever logged."""
    whole: dict[str, Any]
    """The same with all defaults."""
    data: PreparedData
    plan: list[PlannedStage]


def prepare(config_path: str, overrides: list[str], memory: dict[str, PreparedData] | None = None) -> Prepared:
    """Read the configuration, prepare its data, and plan its stages.

    Args:
        config_path: YAML file.
        overrides: ``key=value``.
        memory: Data by what was asked for; several runs on the same data then read it once.
    """
    raw = read_config(config_path, overrides)
    config = build_config(raw)
    build_router(config.routing, width=config.model.width, layer=0)  # one of the user's own is found, or not, now
    data = read_data(config, memory)
    hashes = {name: corpus.train_hash for name, corpus in data.corpora.items()}
    plan = plan_stages(config, hashes, data.tokenizer_identity(), data.tokenizer.bos_id)
    check_clusters(plan, {name: corpus.train.num_documents for name, corpus in data.corpora.items()})
    return Prepared(config, written_config(raw), whole_config(raw), data, plan)


def further_training(head: Mapping[str, Any], plan: list[PlannedStage], store: StageStore) -> str:
    """What else there is to say of a plan that is not the run's: nothing, or how to train a committed stage further.

    That is if all that was changed is that it should have more tokens. What an earlier version trained has other keys.

    Args:
        head: Of the run, whose stages are not the planned ones.
        plan: What would be trained.
        store: Where the stages are.
    """
    first = next(i for i, (old, new) in enumerate(zip(head["plan"], plan, strict=False)) if old != new.key)
    stage, spec = store.find(head["plan"][first]), plan[first].spec
    if stage is None:
        return ""
    if stage.config.get("schema") != SCHEMA:
        return (
            f" Stage {stage.name} was trained by an earlier version: it can be read, evaluated and retrained from, but "
            f"run trains it anew."
        )
    if not (before := stage.config["spec"]["tokens"]) < spec.tokens:
        return ""
    then, now = (canonical_json({**one, "tokens": None}) for one in (stage.config["spec"], spec.to_json()))
    if then != now:
        return ""
    return (
        f" Stage {spec.name} is committed with {before:,} tokens; to train it further, leave it as it is and append a "
        f"stage {{data: {spec.data}, continues: {spec.name}}}."
    )


def read_data(config: RunConfig, memory: dict[str, PreparedData] | None = None) -> PreparedData:
    """Read and tokenize all distributions of a run, or open what was read before."""
    trained = [stage.data for stage in config.stages]
    used = {name: config.distributions[name] for name in config.evaluated}
    asked = (used, config.tokenizer, trained, config.model.context)
    memory = {} if memory is None else memory
    if repr(asked) not in memory:
        memory[repr(asked)] = prepare_data(*asked, CACHE)
    return memory[repr(asked)]


def require_room(stages: Sequence[PlannedStage], config: RunConfig) -> None:
    """Refuse to train stages for which the disk has no room; what they have written already is theirs to use.

    Args:
        stages: Those that are not committed yet, trained one after the other.
        config: Of their run.

    Raises:
        ResourceError: If the file system has less than :func:`stage_need` says.
    """
    written = sum(used_space(ROOT / "work" / stage.key[:SHORT]) for stage in stages)
    what = f"stage {stages[0].spec.name}" if len(stages) == 1 else f"run={config.run}"
    require_space(ROOT, run_need([stage_need(stage, config) for stage in stages]) - written, what)


def recorded_trainer(run: str) -> TrainerConfig:
    """The ``trainer`` section of a run that exists."""
    return section(TrainerConfig, OmegaConf.create(require_head(ROOT, run)["config"]).get("trainer"), "trainer")
