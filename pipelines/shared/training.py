"""Train a stage; the one way from the commands to Lightning, which takes longer to import than torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lifelong_moe.training.callbacks.late import importing_lightning

if TYPE_CHECKING:
    from lifelong_moe.data.tokens.prepare import PreparedData
    from lifelong_moe.plan.planned import PlannedStage
    from lifelong_moe.store.stages import CommittedStage
    from lifelong_moe.training.loop.context import StageEnvironment


def train_stage(
    planned: PlannedStage, parent: CommittedStage | None, data: PreparedData, environment: StageEnvironment
) -> CommittedStage:
    """As :func:`lifelong_moe.training.stage.train_stage`, imported only now: a run may have nothing to train."""
    with importing_lightning():
        from lifelong_moe.training.stage import train_stage as train

    return train(planned, parent, data, environment)
