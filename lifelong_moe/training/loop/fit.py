"""The steps of one phase, by one Trainer in this process or by one in each of several processes."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch import Callback

from lifelong_moe.config.training import Offload
from lifelong_moe.model.offload import streamer_to
from lifelong_moe.training.callbacks.checkpoint import SafeCheckpointIO, checkpoint_path
from lifelong_moe.training.callbacks.collapse import collapse_warning
from lifelong_moe.training.callbacks.interrupt import Interrupt
from lifelong_moe.training.callbacks.logger import BatchedLogger
from lifelong_moe.training.callbacks.points import Send
from lifelong_moe.training.callbacks.progress import Meter, ProgressReport, StepCheckpoint
from lifelong_moe.training.callbacks.resuming import Resumption
from lifelong_moe.training.callbacks.stopping import EarlyStopping
from lifelong_moe.training.callbacks.watch import ForgettingWatch
from lifelong_moe.training.loop.context import PhaseRun
from lifelong_moe.training.loop.data import StageData
from lifelong_moe.training.loop.execution import keep_freed_memory
from lifelong_moe.training.loop.module import StageModule
from lifelong_moe.training.loop.random_state import seed_rank
from lifelong_moe.training.loop.ranks import run_ranks
from lifelong_moe.training.loop.rollback import NonfiniteStepsError
from lifelong_moe.training.loop.trainer import build_trainer, own_callbacks, own_loggers


@dataclass(frozen=True)
class PhaseFit:
    """The participants in a phase's steps."""

    run: PhaseRun
    module: StageModule
    data: StageData
    meter: Meter
    stopping: EarlyStopping | None
    watch: ForgettingWatch | None = None

    def fit(self) -> None:
        """Take all steps.

        Raises:
            NonfiniteStepsError: If the stage has to roll back.
        """
        environment = self.run.stage.environment
        if environment.trainer.processes == 1:
            self._fit_here(0, environment.interrupt, environment.send)
        else:
            self._fit_in_ranks()

    def _fit_here(self, rank: int, interrupt: Interrupt, send: Send) -> None:
        """Take the steps in this process."""
        run, environment, steps = self.run, self.run.stage.environment, self.run.phase.steps
        logger = BatchedLogger(run.stage.spec.name, environment.run_id, send, run.first_step) if rank == 0 else None
        resumption = Resumption(run.resume)
        callbacks = [resumption, *self._callbacks(rank, interrupt)]
        loggers = [] if logger is None else [logger, *own_loggers(environment.trainer)]
        trainer = build_trainer(environment.trainer, steps, callbacks, loggers)
        keep_freed_memory()
        if rank and run.resume is None:
            # It was forked with rank 0's generator, and would draw the same noise.
            seed_rank(run.seed, rank)
        offloads = environment.frozen.offload == Offload.cpu
        # Before fit, whose setup moves the whole module to the device.
        offloaded = self.module.offloaded(streamer_to(trainer.strategy.root_device) if offloads else None)
        with resumption.blamed(), offloaded:
            trainer.fit(self.module, self.data, ckpt_path=run.resume, weights_only=True)
        # Trainer and module refer to each other: what they hold would stay until Python looks for cycles.
        trainer.strategy.optimizers, trainer.strategy.lr_scheduler_configs = [], []
        # Lightning can end training early without an error; a stage with fewer steps must not be committed.
        if trainer.global_step != steps and not (self.stopping is not None and trainer.should_stop):
            raise RuntimeError(f"stage {run.stage.spec.name}: trained {trainer.global_step} of {steps} steps")

    def _callbacks(self, rank: int, interrupt: Interrupt) -> list[Callback]:
        """In the order in which they act; only rank 0 prints."""
        run, environment = self.run, self.run.stage.environment
        config, checkpoint, spec = environment.trainer, environment.checkpoint, run.stage.spec
        title = spec.name if run.phase.name == "train" else f"{spec.name} ({run.phase.name})"
        if (outlook := environment.outlook) is not None:
            title += f", stage {outlook.place} of {outlook.stages}"
        return [
            # In rank 0 alone: a forward pass in evaluation mode needs no other rank. Before the meter, which takes what
            # comes after it for waiting for data.
            *([] if self.watch is None or rank else [self.watch]),
            self.meter,
            ProgressReport(
                title,
                environment.console,
                config.enable_progress_bar and rank == 0,
                self.meter,
                None if environment.outlook is None else environment.outlook.later_flops,
            ),
            *([] if self.stopping is None else [self.stopping]),
            *collapse_warning(spec, config.log_every_n_steps if rank == 0 else None),
            *own_callbacks(config),
            # Last, so that a checkpoint holds the state of all others after this step.
            StepCheckpoint(run.stage.work, run.number, checkpoint.every_steps, checkpoint.keep, interrupt),
        ]

    def _fit_in_ranks(self) -> None:
        """Take the steps in several processes, and load the result from the checkpoint after the last step."""
        run, module, environment, work = self.run, self.module, self.run.stage.environment, self.run.stage.work

        def fit(rank: int, interrupt: Interrupt, send: Send) -> int | None:
            try:
                self._fit_here(rank, interrupt, send)
            except NonfiniteStepsError as error:
                # Raised on all ranks at once. Returned, since an error crosses processes as a name and a message, and
                # the rollback needs the step.
                return error.last
            return None

        processes = environment.trainer.processes
        last = run_ranks(processes, fit, environment.interrupt, environment.send, work / ".ranks")
        if last is not None:
            raise NonfiniteStepsError(run.stage.spec, run.phase, last)
        # Ranks are forks: their weights reach this process through the file alone.
        result = SafeCheckpointIO().load_checkpoint(checkpoint_path(work, run.number, run.phase.steps))
        module.on_load_checkpoint(result)
        module.load_state_dict(result["state_dict"], strict=False)
        self.meter.load_state_dict(result["callbacks"][self.meter.state_key])
