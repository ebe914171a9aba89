"""The steps of one phase, by one Trainer in this process or by one in each of several processes."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback

from lifelong_moe.config.training import Offload, TrainerConfig
from lifelong_moe.data.tokens.windows import evaluation_windows
from lifelong_moe.errors import ResourceError, memory_is_full
from lifelong_moe.model.offload import streamer_to
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.retention.teacher_cache import TeacherCache
from lifelong_moe.training.callbacks.checkpoint import BackgroundCheckpointIO, SafeCheckpointIO, checkpoint_path
from lifelong_moe.training.callbacks.collapse import collapse_warning
from lifelong_moe.training.callbacks.interrupt import Interrupt
from lifelong_moe.training.callbacks.logger import BatchedLogger
from lifelong_moe.training.callbacks.progress import Meter, ProgressReport, StepCheckpoint
from lifelong_moe.training.callbacks.resuming import Resumption
from lifelong_moe.training.callbacks.stopping import EarlyStopping
from lifelong_moe.training.callbacks.watch import ForgettingWatch, Watched
from lifelong_moe.training.loop.data import StageData, in_order
from lifelong_moe.training.loop.device import rounds_products
from lifelong_moe.training.loop.execution import (
    execution_options,
    expert_dropout,
    isolated_documents,
    keep_freed_memory,
    tf32,
)
from lifelong_moe.training.loop.handover import PhaseJob, PhaseText, Plain, hand_over, take_over
from lifelong_moe.training.loop.module import StageModule
from lifelong_moe.training.loop.optimizer import phase_parameters, training_only
from lifelong_moe.training.loop.random_state import seed_rank
from lifelong_moe.training.loop.rollback import NonfiniteStepsError
from lifelong_moe.training.loop.trainer import build_trainer, own_callbacks, own_loggers
from lifelong_moe.training.ranks.nodes import joined
from lifelong_moe.training.ranks.supervise import run_ranks
from lifelong_moe.training.ranks.surroundings import Surroundings

RANK_WORK = f"{__name__}:fit_in_rank"
FOLDER = "ranks"
"""In a stage's work directory: what its ranks need."""


@dataclass(frozen=True)
class PhaseFit:
    """The participants in a phase's steps."""

    job: PhaseJob
    module: StageModule
    data: StageData
    meter: Meter
    stopping: EarlyStopping | None = None
    """In one process only."""
    watch: ForgettingWatch | None = None

    def fit(self, here: Surroundings) -> None:
        """Take all steps.

        Raises:
            NonfiniteStepsError: If the stage has to roll back.
        """
        if self.job.trainer.processes == 1:
            self.fit_here(0, here)
        else:
            self._fit_in_ranks(here)

    def fit_here(self, rank: int, here: Surroundings) -> None:
        """Take the steps in this process, which may be one of several.

        Raises:
            NonfiniteStepsError: If the stage has to roll back.
            ResourceError: If the device's memory is full.
        """
        job, spec, steps = self.job, self.job.spec, self.job.phase.steps
        logger = BatchedLogger(spec.name, job.run_id, here.send, job.first_step) if rank == 0 else None
        resumption, writer = Resumption(job.resume), BackgroundCheckpointIO(job.work, job.checkpoint.keep)
        callbacks = [resumption, *self._callbacks(rank, here, writer)]
        loggers = [] if logger is None else [logger, *own_loggers(job.trainer)]
        with self._in_training(here.interrupt), _explained_full_memory(spec):
            trainer = build_trainer(job.trainer, steps, callbacks, loggers, writer)
            if not job.trainer.is_sharded:
                # Gathered weights of all sizes come and go with every block: kept, they took three times the memory.
                keep_freed_memory()
            if rank and job.resume is None:
                # It has rank 0's generator, and would draw the same noise.
                seed_rank(job.seed, rank)
            offloads = job.frozen.offload == Offload.cpu
            # Before fit, whose setup moves the whole module to the device.
            offloaded = self.module.offloaded(streamer_to(trainer.strategy.root_device) if offloads else None)
            # Before all else: a rollback removes checkpoints, and none may come after it.
            with writer.finished(), resumption.blamed(), offloaded:
                trainer.fit(self.module, self.data, ckpt_path=job.resume, weights_only=True)
        # Trainer and module refer to each other: what they hold would stay until Python looks for cycles.
        trainer.strategy.optimizers, trainer.strategy.lr_scheduler_configs = [], []
        # Lightning can end training early without an error; a stage with fewer steps must not be committed.
        if trainer.global_step != steps and not (self.stopping is not None and trainer.should_stop):
            raise RuntimeError(f"stage {spec.name}: trained {trainer.global_step} of {steps} steps")

    @contextmanager
    def _in_training(self, interrupt: Interrupt) -> Iterator[None]:
        """Context with the phase's settings on the models, in which SIGTERM and Ctrl-C wait for the end of a step."""
        spec, model = self.job.spec, self.module.model
        both = [one for one in (model, self.module.teacher) if one is not None]
        with (
            isolated_documents(both if spec.finetune else []),
            training_only(model, phase_parameters(model, self.job.phase).values()),
            expert_dropout(model, spec.finetune.expert_dropout if spec.finetune else 0.0),
            execution_options(both, self.job.trainer),
            tf32(rounds_products(self.job.trainer)),
            interrupt.until_step_boundary(),
        ):
            yield

    def _callbacks(self, rank: int, here: Surroundings, writer: BackgroundCheckpointIO) -> list[Callback]:
        """In the order in which they act; only rank 0 prints."""
        job, config, spec, outlook = self.job, self.job.trainer, self.job.spec, self.job.outlook
        title = spec.name if job.phase.name == "train" else f"{spec.name} ({job.phase.name})"
        if outlook is not None:
            title += f", stage {outlook.place} of {outlook.stages}"
        return [
            # Before the meter, which takes what comes after it for waiting for data.
            *([] if self.watch is None or not _watches(rank, config) else [self.watch]),
            self.meter,
            ProgressReport(
                title,
                here.console,
                config.enable_progress_bar and rank == 0,
                self.meter,
                None if outlook is None else outlook.later_flops,
            ),
            *([] if self.stopping is None else [self.stopping]),
            *collapse_warning(spec, config.log_every_n_steps if rank == 0 else None),
            *own_callbacks(config),
            # Last, so that a checkpoint holds the state of all others after this step.
            StepCheckpoint(job.work, job.number, job.checkpoint.every_steps, here.interrupt, writer.finish),
        ]

    def _fit_in_ranks(self, here: Surroundings) -> None:
        """Take the steps in several processes, and load the result from the checkpoint after the last step."""
        job, module, folder = self.job, self.module, self.job.work / FOLDER
        hand_over(folder, job, module.handed_over(), self._text(), self._more())
        try:
            with here.interrupt.until_step_boundary():
                last = run_ranks(job.trainer.processes_here, RANK_WORK, folder, here, joined(job.trainer))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if last is not None:
            raise NonfiniteStepsError(job.spec, job.phase, last)
        # Without the moments, of which nobody needs the numbers any more.
        result = SafeCheckpointIO().load_parts(checkpoint_path(job.work, job.number, job.phase.steps))
        module.on_load_checkpoint(result)
        module.load_weights(result["state_dict"])
        self.meter.load_state_dict(result["callbacks"][self.meter.state_key])

    def _text(self) -> PhaseText:
        watched = {} if self.watch is None else self.watch.watched.texts
        return PhaseText(self.data.dataset.sources, {name: windows.shard for name, windows in watched.items()})

    def _more(self) -> Plain:
        """How meter, watch and cache begin."""
        meter, watch, cache = self.meter, self.watch, self.module.teacher_cache
        return {
            "meter": [meter.step_tokens, meter.step_flops, meter.every_steps, meter.rollbacks],
            "watch": None if watch is None else _watch_plain(watch),
            "teacher_cache": None if cache is None else str(cache.path),
        }


def fit_in_rank(rank: int, folder: Path, here: Surroundings) -> int | None:
    """Take a phase's steps as one of several processes; see :data:`lifelong_moe.training.ranks.rank.Work`.

    Returns:
        The last of the steps without a finite loss that make the stage roll back; None after the last step.
    """
    job, models, text, more = take_over(folder)
    module = StageModule(models.model, job.spec, job.phase, models.teacher, models.anchor)
    module.assignments_before = models.assignments_before
    if more["teacher_cache"] is not None:
        module.teacher_cache = TeacherCache(Path(more["teacher_cache"]), job.spec.model.context)
    data = StageData(in_order(text.sources, job.spec, job.phase, job.seed), job)
    watch = None if more["watch"] is None or not _watches(rank, job.trainer) else _watch(more["watch"], text, job)
    # After the models, of which the user's own may have drawn.
    torch.set_rng_state(models.random_state)
    try:
        PhaseFit(job, module, data, Meter(*more["meter"]), None, watch).fit_here(rank, here)
    except NonfiniteStepsError as error:
        # Raised on all ranks at once. Returned, since an error crosses processes as a name and a message, and the
        # rollback needs the step.
        return error.last
    return None


def _watches(rank: int, trainer: TrainerConfig) -> bool:
    """Whether a rank looks at forgetting."""
    # A forward pass in evaluation mode needs no other rank, unless they hold the rest of the model.
    return rank == 0 or trainer.is_divided


def _watch_plain(watch: ForgettingWatch) -> Plain:
    watched = watch.watched
    plain = {f.name: getattr(watched, f.name) for f in dataclasses.fields(watched) if f.name != "texts"}
    return {**plain, "after": sorted(watched.after), "path": str(watch.path)}


def _watch(plain: Plain, text: PhaseText, job: PhaseJob) -> ForgettingWatch:
    """The inverse of :func:`_watch_plain`."""
    context = job.spec.model.context
    texts = {name: evaluation_windows(part, context, part.num_tokens) for name, part in text.watched.items()}
    path, after, own = Path(plain.pop("path")), frozenset(plain.pop("after")), tuple(plain.pop("own"))
    return ForgettingWatch(Watched(**plain, own=own, texts=texts, after=after), job.first_step, path)


@contextmanager
def _explained_full_memory(spec: StageSpec) -> Iterator[None]:
    """Context that turns out-of-memory errors into one that names the setting to change.

    Raises:
        ResourceError: In place of the device's error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not memory_is_full(error):
            raise
        raise _out_of_memory(spec) from error


def _out_of_memory(spec: StageSpec) -> ResourceError:
    """The error with the smallest change of settings that needs less memory."""
    # More micro-batches keep the global batch, and so nearly the result; a smaller batch is a user's decision.
    total, now = spec.global_batch, spec.accumulate
    more = next((n for n in range(now + 1, total + 1) if total % n == 0), None)
    remedy = "Set model.context or the model's size lower."
    if more is not None:
        remedy = f"Set trainer.accumulate_grad_batches={more}, which leaves the global batch at {total} sequences."
    return ResourceError(
        f"stage {spec.name}: the device ran out of memory on micro-batches of {total // now} sequences of context "
        f"{spec.model.context}; nothing was committed. {remedy}"
    )
