"""Open stages for the commands that run their models: `evaluate`, `generate` and `inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from lifelong_moe.config.routing.own import require_allowed
from lifelong_moe.config.routing.topk import CustomRouterConfig
from lifelong_moe.plan.spec import BASE_NAME
from lifelong_moe.serving.prompts import require_label
from lifelong_moe.store.head import RunHead
from lifelong_moe.store.runs import require_head
from lifelong_moe.store.stages import CommittedStage, StageStore
from pipelines.shared.places import ROOT

if TYPE_CHECKING:
    from lifelong_moe.model.transformer import LanguageModel


def open_stage(run: str, stage: str | None) -> tuple[StageStore, CommittedStage]:
    """A committed stage of a run by name; the last one by default.

    Raises:
        ConfigError: If there is no such stage, or it needs a router of somebody's own that the user has not named.
    """
    head, store = require_head(ROOT, run), StageStore(ROOT)
    base = _checkpoint(head, store) if stage == BASE_NAME else None
    committed = base or store.get(head.require_stage(stage))
    # `build_router` asks as well; here it costs no import of torch.
    if isinstance(committed.architecture.routing, CustomRouterConfig):
        require_allowed(committed.architecture.routing.mode)
    return store, committed


def open_stages(run: str) -> dict[str, CommittedStage]:
    """All committed stages of a run by name, oldest first; before them the checkpoint that it began with, if any.

    Raises:
        ConfigError: As for :func:`open_stage`.
    """
    head, store = require_head(ROOT, run), StageStore(ROOT)
    base = _checkpoint(head, store)
    names = [*([BASE_NAME] if base is not None else []), *head.committed]
    return {name: open_stage(run, name)[1] for name in names}


def _checkpoint(head: RunHead, store: StageStore) -> CommittedStage | None:
    """The checkpoint that a run's first stage continues; None if there is none, or a stage has its name."""
    head.require_stage()
    first = store.chain(next(iter(head.committed.values())))[0]
    is_checkpoint = first.name == BASE_NAME and BASE_NAME not in head.committed
    return first if is_checkpoint else None


def step_of(head: RunHead, key: str) -> int:
    """A stage's step in MLflow's curves over stages; -1 for the checkpoint before them."""
    return head.stages.index(key) if key in head.stages else -1


def check_label(stage: CommittedStage, label: str | None, console: Console) -> None:
    """Check ``--label`` against the stage's routing, and say which domain is assumed without one.

    Raises:
        ConfigError: If the routing ignores labels, or does not know this one.
    """
    require_label(stage, label, "--label")
    architecture = stage.architecture
    if label is None and architecture.routing.by_label:
        # A checkpoint's text has no label.
        oldest = next((name for name, domain in architecture.labels if domain == 0), architecture.generations[0].stage)
        console.print(f"no --label: routed as {oldest}; there are {', '.join(name for name, _ in architecture.labels)}")


def load_on_device(run: str, store: StageStore, committed: CommittedStage, *, int8: bool) -> LanguageModel:
    """A stage's model on the run's device, without gradients."""
    # Imported here: what the user named is checked before torch is imported, which takes seconds.
    from lifelong_moe.config.growth import FrozenWeights
    from lifelong_moe.model.int8 import hold_frozen
    from lifelong_moe.training.loop.device import on_configured_device
    from lifelong_moe.training.restore import load_model
    from pipelines.shared.workspace import recorded_trainer

    model = load_model(store, committed).requires_grad_(False)
    # Only frozen matrices are quantized, hence no gradients above; on the CPU, so the device holds 8 bits alone.
    if int8:
        hold_frozen(model, FrozenWeights.int8)
    return on_configured_device(model, recorded_trainer(run))
