"""A Lightning Trainer as ``trainer`` asks for it, or a line on why this machine cannot have it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.training.callbacks.checkpoint import SafeCheckpointIO
from lifelong_moe.training.callbacks.logger import BatchedLogger


def build_trainer(
    config: TrainerConfig, steps: int, callbacks: Sequence[Callback] = (), logger: BatchedLogger | None = None
) -> Trainer:
    """A Lightning Trainer for so many steps; what a stage needs of its own stays ours.

    Raises:
        ConfigError: If this machine cannot do what ``trainer`` asks for.
    """
    on_cpu = config.accelerator == "cpu" or (config.accelerator == "auto" and not torch.cuda.is_available())
    try:
        strategy, plugins = _strategy(config)
        trainer = Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=strategy,
            precision=config.precision,  # type: ignore[arg-type]
            accumulate_grad_batches=config.accumulate_grad_batches,
            log_every_n_steps=1,  # our Meter decides
            deterministic=on_cpu if config.deterministic is None else config.deterministic,
            benchmark=config.benchmark,
            detect_anomaly=config.detect_anomaly,
            profiler=config.profiler,
            max_steps=steps,
            max_epochs=-1,
            callbacks=list(callbacks),
            logger=logger or False,
            plugins=[*plugins],
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ImportError, ValueError, TypeError) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from None
    if trainer.world_size > 1 and (not on_cpu or trainer.world_size != config.processes):
        raise ConfigError(
            f"trainer.devices={config.devices} makes {trainer.world_size} processes, but several processes train on "
            f"CPU only so far. Set trainer.devices=1, or trainer.accelerator=cpu."
        )
    return trainer


def _strategy(config: TrainerConfig) -> tuple[str | DDPStrategy, list[CheckpointIO | ClusterEnvironment]]:
    """How processes work together, and Lightning's plugins; it starts none itself."""
    if config.processes == 1:
        return "auto" if config.strategy == "ddp" else config.strategy, [SafeCheckpointIO()]
    # A rank may have no token for an expert or a bundle. Nothing in a buffer changes in training.
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True, forward_sync_buffers=False)
    return strategy, [SafeCheckpointIO(), LightningEnvironment()]
