"""A model of a run, by the run's name."""

from __future__ import annotations

from pathlib import Path

from lifelong_moe.errors import ConfigError
from lifelong_moe.serving.model import StageModel
from lifelong_moe.storage.plain_files import require_plain_files
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import require_head
from lifelong_moe.store.stages import StageStore

CHAMPION = "champion"


def load(
    run: str, stage: str | None = None, *, version: int | str | None = None, store: str | Path = "mlruns"
) -> StageModel:
    """Load a model from a store.

    Args:
        run: Name of a run.
        stage: One of its stages; the last one by default.
        version: A version by number, or ``champion``, the one that serves; in place of a stage.
        store: The folder of runs and stages.

    Raises:
        ConfigError: If there is no such run, stage or version.
        CorruptError: If the store is damaged, or holds something that no store holds.
    """
    root = Path(store)
    require_plain_files(root)
    head, stages = require_head(root, run), StageStore(root)
    if version is None:
        return StageModel(stages, stages.get(head.require_stage(stage)))
    if stage is not None:
        raise ConfigError(f"stage={stage} and version={version} both name a model; leave one out.")
    return StageModel(stages, stages.get(_version_key(head, version)))


def _version_key(head: RunHead, version: int | str) -> str:
    if version == CHAMPION:
        # Until something is promoted or dropped, a finished run's last stage serves.
        head.require_finished()
        return head.champion.key if head.versions else head.stages[-1]
    known = {str(one.id): one for one in head.versions}
    if str(version) not in known:
        there = ", ".join(known) or "none yet"
        raise ConfigError(f"run {head.run} has no version {version}; there are {there}, and {CHAMPION}.")
    return known[str(version)].key
