"""One phase of a stage: a Trainer of its own over its mix of text, with checkpoints and interruption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from lifelong_moe.clustering.kmeans import churn
from lifelong_moe.data.shards import TokenizedCorpus
from lifelong_moe.data.windows import evaluation_windows
from lifelong_moe.errors import ConfigError, ResourceError, memory_is_full
from lifelong_moe.evaluation.loss import evaluate
from lifelong_moe.model.offload import courier_to
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.flops import loop_flops
from lifelong_moe.plan.phase import Phase
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.retention.teacher_cache import TeacherCache
from lifelong_moe.routing.config import Features, Level
from lifelong_moe.stages.store import StageStore
from lifelong_moe.training.callbacks import Meter, ProgressReport, StepCheckpoint
from lifelong_moe.training.checkpoint import SafeCheckpointIO, checkpoint_path
from lifelong_moe.training.collapse import CollapseWarning
from lifelong_moe.training.config import CheckpointConfig, FrozenConfig, Offload, TrainerConfig
from lifelong_moe.training.data import StageData, phase_dataset, text_sample
from lifelong_moe.training.execution import documents_apart, executed, expert_dropout, keep_freed_memory
from lifelong_moe.training.interrupt import Interrupt
from lifelong_moe.training.logger import BatchedLogger, Send
from lifelong_moe.training.module import StageModule
from lifelong_moe.training.optimizer import phase_parameters, training_only
from lifelong_moe.training.random_state import seed_rank
from lifelong_moe.training.ranks import Work, run_ranks
from lifelong_moe.training.rollback import NonfiniteStepsError, Rollbacks
from lifelong_moe.training.stopping import EarlyStopping


@dataclass(frozen=True)
class StageEnvironment:
    """Everything around a stage that its result does not depend on."""

    store: StageStore
    work: Path
    """``mlruns/work``."""
    trainer: TrainerConfig
    checkpoint: CheckpointConfig
    frozen: FrozenConfig
    interrupt: Interrupt
    console: Console
    send: Send
    """Receives training curves."""
    run_id: str | None = None


@dataclass(frozen=True)
class PhaseRun:
    """One phase's place in its stage."""

    number: int
    phase: Phase
    first_step: int
    """Steps of the stage before it."""
    order_step: int
    """Steps before it that share its order of samples."""
    seed: int
    """Of that order: another one each stage, or every stage would replay the same blocks."""
    work: Path
    resume: Path | None
    rollbacks: Rollbacks
    """Of the stage so far."""


def train_phase(
    module: StageModule,
    teacher: LanguageModel | None,
    run: PhaseRun,
    corpora: Mapping[str, TokenizedCorpus],
    generated: NDArray[np.int64] | None,
    environment: StageEnvironment,
) -> dict[str, Any]:
    """Train one phase with a fresh Trainer and optimizer; returns what was measured.

    Raises:
        NonfiniteStepsError: If the stage has to roll back, or to give up.
        ResourceError: If the device's memory does not suffice.
    """
    config, phase, model, spec = environment.trainer, run.phase, module.model, module.spec
    if run.resume is not None:
        environment.console.print(f"{spec.name}: continuing from {run.resume.name}")
        # Groups of the training text depend on centroids, which the checkpoint holds, whichever phase fitted them.
        state = SafeCheckpointIO().load_checkpoint(run.resume)["state_dict"]
        module.load_state_dict(state, strict=False)
    else:
        torch.manual_seed(run.seed)  # of noise, jitter and dropout; later on it is part of the checkpoint
        module.assignments_before = _sample_assignments(model, spec, corpora[spec.data])
    dataset = phase_dataset(model, teacher, spec, phase, corpora, generated, run.seed)
    if config.cache_teacher and teacher is not None:
        module.teacher_cache = TeacherCache(run.work / f"teacher-{run.number}", spec.model.context)
    data = StageData(
        dataset,
        spec,
        first_step=run.order_step,
        steps=phase.steps,
        batches=lambda step: run.rollbacks.batches(run.number, step, phase.steps),
        accumulate=config.accumulate_grad_batches,
        num_workers=config.num_workers,
    )
    step_flops = loop_flops(spec, model.architecture, teacher.architecture if teacher else None) / spec.steps
    meter = Meter(spec.optim.batch_tokens, step_flops, config.log_every_n_steps, run.rollbacks.count)
    stopping = _stopping(spec, run, corpora[spec.data])
    fit = partial(_fit, module, data, run, meter, environment, stopping)
    model.train()
    trained = phase_parameters(model, phase).values()
    dropout = spec.finetune.expert_dropout if spec.finetune else 0.0
    models = [m for m in (model, teacher) if m is not None]
    with (
        documents_apart(models if spec.finetune else []),
        training_only(model, trained),
        expert_dropout(model, dropout),
        executed(models, config),
        environment.interrupt.until_step_boundary(),
    ):
        try:
            if config.processes == 1:
                fit(0, environment.interrupt, environment.send)
            else:
                _fit_in_ranks(module, run, meter, environment, fit)
        except (RuntimeError, MemoryError) as error:
            if not memory_is_full(error):
                raise
            raise _out_of_memory(spec) from error
    model.cpu()
    if stopping is not None:
        stopping.restore(model)
    measured: dict[str, Any] = {
        "seconds": meter.seconds,
        "data_seconds": meter.data_seconds,
        "joules": meter.energy.joules,
        "nonfinite_steps": module.guard.nonfinite_steps,
        "skipped_spikes": module.guard.skipped_spikes,
        "final": meter.last,
    }
    if stopping is not None:
        measured["stopping"] = {"best_step": stopping.best_step, "held_out_nats_per_token": stopping.curve}
    if module.assignments_before is not None:
        after = _sample_assignments(model, spec, corpora[spec.data])
        assert after is not None
        measured["assignment_churn"] = churn(module.assignments_before.flatten().numpy(), after.flatten().numpy())
    return measured


def _fit(
    module: StageModule,
    data: StageData,
    run: PhaseRun,
    meter: Meter,
    environment: StageEnvironment,
    stopping: EarlyStopping | None,
    rank: int,
    interrupt: Interrupt,
    send: Send,
) -> None:
    """Take the phase's steps in this process; curves and progress are rank 0's."""
    config, checkpoint, spec, phase = environment.trainer, environment.checkpoint, module.spec, run.phase
    title = spec.name if phase.name == "train" else f"{spec.name} ({phase.name})"
    callbacks = [
        meter,
        ProgressReport(title, environment.console, config.enable_progress_bar and rank == 0, meter),
        *([] if stopping is None else [stopping]),
        *_collapse_warning(spec, config.log_every_n_steps if rank == 0 else None),
        StepCheckpoint(run.work, run.number, checkpoint.every_steps, checkpoint.keep, interrupt),
    ]
    logger = BatchedLogger(spec.name, environment.run_id, send, run.first_step) if rank == 0 else None
    trainer = build_trainer(config, phase.steps, callbacks, logger)
    keep_freed_memory()
    if rank and run.resume is None:
        seed_rank(run.seed, rank)  # it was forked with rank 0's numbers
    offloads = environment.frozen.offload == Offload.cpu
    with module.offloaded(courier_to(trainer.strategy.root_device) if offloads else None):
        trainer.fit(module, data, ckpt_path=run.resume, weights_only=True)
    if trainer.global_step != phase.steps and not (stopping is not None and trainer.should_stop):
        raise RuntimeError(f"stage {spec.name}: trained {trainer.global_step} of {phase.steps} steps")


def _collapse_warning(spec: StageSpec, every_steps: int | None) -> list[CollapseWarning]:
    """What warns of collapse in one process, where routers are trained and tokens choose."""
    routing = spec.routing
    if every_steps is None or not routing.has_rows or routing.mode in ("dense", "expert_choice"):
        return []
    return [CollapseWarning(spec.name, routing.top_k, every_steps)]


def _stopping(spec: StageSpec, run: PhaseRun, corpus: TokenizedCorpus) -> EarlyStopping | None:
    """What stops fine-tuning early; None where all steps are taken."""
    config = spec.finetune
    if config is None or config.patience is None:
        return None
    windows = evaluation_windows(corpus.heldout, spec.model.context, config.held_out_tokens)

    def measure(model: LanguageModel) -> float:
        found = evaluate(model, windows, distribution=spec.data, batch_tokens=spec.optim.batch_tokens)
        return found.nats_per_token

    return EarlyStopping(config, measure, run.work)


def _fit_in_ranks(module: StageModule, run: PhaseRun, meter: Meter, environment: StageEnvironment, fit: Work) -> None:
    """Take the phase's steps in several processes; what they come to is the checkpoint after the last step."""

    def work(rank: int, interrupt: Interrupt, send: Send) -> int | None:
        try:
            fit(rank, interrupt, send)
        except NonfiniteStepsError as error:  # on all ranks at once
            return error.last
        return None

    number, meeting = environment.trainer.processes, run.work / ".ranks"
    last = run_ranks(number, work, environment.interrupt, environment.send, meeting)
    if last is not None:
        raise NonfiniteStepsError(module.spec, run.phase, last)
    result = SafeCheckpointIO().load_checkpoint(checkpoint_path(run.work, run.number, run.phase.steps))
    module.on_load_checkpoint(result)
    module.load_state_dict(result["state_dict"], strict=False)
    meter.load_state_dict(result["callbacks"][meter.state_key])


def _out_of_memory(spec: StageSpec) -> ResourceError:
    """What a stage asked of the device and how to ask for less; the global batch is for a person to change."""
    total, now = spec.global_batch, spec.accumulate
    more = next((n for n in range(now + 1, total + 1) if total % n == 0), None)
    remedy = "Set model.context or the model's size lower."
    if more is not None:
        remedy = f"Set trainer.accumulate_grad_batches={more}, which leaves the global batch at {total} sequences."
    return ResourceError(
        f"stage {spec.name}: the device ran out of memory on micro-batches of {total // now} sequences of context "
        f"{spec.model.context}; nothing was committed. {remedy}"
    )


def build_trainer(config: TrainerConfig, steps: int, callbacks: list[Any], logger: BatchedLogger | None) -> Trainer:
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
            callbacks=callbacks,
            logger=logger or False,
            plugins=plugins,
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


def _strategy(config: TrainerConfig) -> tuple[str | DDPStrategy, list[Any]]:
    """How processes work together, and Lightning's plugins; it starts none itself."""
    if config.processes == 1:
        return "auto" if config.strategy == "ddp" else config.strategy, [SafeCheckpointIO()]
    # A rank may have no token for an expert or a bundle. Nothing in a buffer changes in training.
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True, forward_sync_buffers=False)
    return strategy, [SafeCheckpointIO(), LightningEnvironment()]


def _sample_assignments(model: LanguageModel, spec: StageSpec, corpus: TokenizedCorpus) -> Tensor | None:
    """First expert of each sampled real token at each layer, where fixed centroids look at moving hidden states."""
    routing = spec.routing
    if not (routing.mode == "cluster" and routing.level == Level.token and routing.features == Features.hidden):
        return None
    sample = text_sample(model, spec, corpus, 4 * spec.model.context)
    model.eval()
    with torch.no_grad():
        output = model(TokenBatch(sample["token_ids"], sample["document_ids"], mask_BS=sample["mask"]))
    return torch.stack([r.expert_ids_TK[:, 0][sample["mask"].flatten()] for r in output.routings])
