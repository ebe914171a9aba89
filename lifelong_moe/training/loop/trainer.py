"""A Lightning Trainer from the ``trainer`` section, or one line on why this machine cannot run it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy

from lifelong_moe.config.training import TrainerConfig
from lifelong_moe.errors import ConfigError
from lifelong_moe.training.callbacks.checkpoint import SafeCheckpointIO
from lifelong_moe.training.callbacks.own import build_own
from lifelong_moe.training.loop.device import rounds_products
from lifelong_moe.training.ranks.parts import ExpertParallelStrategy
from lifelong_moe.training.ranks.sharding import ShardedStrategy


def build_trainer(
    config: TrainerConfig,
    steps: int,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    writer: CheckpointIO | None = None,
) -> Trainer:
    """A Lightning Trainer for ``steps`` steps, whose checkpoints a writer writes.

    Raises:
        ConfigError: If this machine cannot do what ``trainer`` asks for.
    """
    # Deterministic by default on the CPU, where resuming is exact bit for bit; on a GPU it is the user's choice.
    on_cpu = config.accelerator == "cpu" or (config.accelerator == "auto" and not torch.cuda.is_available())
    try:
        strategy, plugins = _strategy(config, writer or SafeCheckpointIO())
        trainer = Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=strategy,
            precision=lightning_precision(config),  # type: ignore[arg-type]
            accumulate_grad_batches=config.accumulate_grad_batches,
            # The Meter decides when to log.
            log_every_n_steps=1,
            deterministic=on_cpu if config.deterministic is None else config.deterministic,
            benchmark=config.benchmark,
            detect_anomaly=config.detect_anomaly,
            profiler=config.profiler,
            max_steps=steps,
            max_epochs=-1,
            callbacks=list(callbacks),
            logger=list(loggers) or False,
            plugins=[*plugins],
            # StepBatchSampler, StepCheckpoint and ProgressReport take the place of Lightning's own.
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


def lightning_precision(config: TrainerConfig) -> str:
    """Lightning's word for ``trainer.precision``, of which ``auto`` is ours."""
    if config.precision != "auto":
        return config.precision
    return "bf16-mixed" if rounds_products(config) else "32-true"


def own_callbacks(config: TrainerConfig) -> list[Callback]:
    """New instances of the callbacks that the configuration names."""
    return build_own(config.callbacks, Callback, "trainer.callbacks")


def own_loggers(config: TrainerConfig) -> list[Logger]:
    """New instances of the loggers that the configuration names."""
    return build_own(config.logger, Logger, "trainer.logger")


def _strategy(
    config: TrainerConfig, writer: CheckpointIO
) -> tuple[str | DDPStrategy, list[CheckpointIO | ClusterEnvironment]]:
    """Lightning's strategy and plugins for the configured number of processes."""
    # With LOCAL_RANK set, this environment makes Lightning join the ranks that run_ranks starts, and start none. One
    # process needs it too: in a job of SLURM's, Lightning would take the job's tasks for processes of its own.
    plugins: list[CheckpointIO | ClusterEnvironment] = [writer, LightningEnvironment()]
    if config.processes == 1:
        return "auto" if config.strategy in ("ddp", "fsdp") else config.strategy, plugins
    if config.strategy == "fsdp":
        return ShardedStrategy(config.expert_parallel), plugins
    if config.expert_parallel > 1:
        return ExpertParallelStrategy(config.expert_parallel), plugins
    # Unused parameters: a rank may have no token for an expert or a generation. Buffers do not change in training.
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True, forward_sync_buffers=False)
    return strategy, plugins
