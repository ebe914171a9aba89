"""One phase of a stage, from its mix of text to its measurements."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lifelong_moe.clustering.kmeans import churn
from lifelong_moe.data.tokens.excerpts import excerpts
from lifelong_moe.data.tokens.shards import TokenizedCorpus
from lifelong_moe.data.tokens.windows import evaluation_windows
from lifelong_moe.errors import CorruptError
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.flops import loop_flops
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.retention.teacher_cache import TeacherCache
from lifelong_moe.training.callbacks.checkpoint import SafeCheckpointIO
from lifelong_moe.training.callbacks.looks import stage_looks
from lifelong_moe.training.callbacks.progress import Meter
from lifelong_moe.training.callbacks.resuming import Resumption
from lifelong_moe.training.callbacks.stopping import early_stopping
from lifelong_moe.training.callbacks.watch import ForgettingWatch, Watched
from lifelong_moe.training.loop.context import PhaseRun, StageModels
from lifelong_moe.training.loop.data import StageData, new_text_sample, phase_dataset
from lifelong_moe.training.loop.fit import PhaseFit
from lifelong_moe.training.loop.handover import PhaseJob
from lifelong_moe.training.loop.measure import PhaseMeasures
from lifelong_moe.training.loop.module import StageModule


def train_phase(module: StageModule, models: StageModels, run: PhaseRun) -> PhaseMeasures:
    """Train one phase with a fresh Trainer and optimizer.

    Args:
        module: With the stage's model.
        models: Of the stage; the model is where ``StageEnvironment.place`` puts it at the end.
        run: The phase and its place in the stage.

    Raises:
        NonfiniteStepsError: If the stage has to roll back.
        ResourceError: If the device's memory is full.
    """
    model, spec, config = models.model, run.stage.spec, run.stage.environment.trainer
    _restore_or_seed(module, run)
    if config.cache_teacher and models.teacher is not None:
        module.teacher_cache = TeacherCache(run.stage.work / f"teacher-{run.number}", spec.model.context)
    # After restoring: centroids in the checkpoint decide the generation of each token of the data.
    job = _job(run)
    data = StageData(phase_dataset(models, spec, run.phase, run.stage.corpora, run.seed), job)
    meter, stopping = _meter(models, run), early_stopping(spec, run.stage.corpora, run.stage.work)
    watch = _watch(model, run)
    model.train()
    PhaseFit(job, module, data, meter, stopping, watch).fit(run.stage.environment.surroundings)
    # Lightning has moved it to the CPU; clusters of the next phase and measurements read text with it.
    run.stage.environment.place(model)
    if stopping is not None:
        stopping.restore(model)
    return PhaseMeasures(
        seconds=meter.seconds,
        data_seconds=meter.data_seconds,
        joules=meter.energy.joules,
        nonfinite_steps=module.guard.nonfinite_steps,
        skipped_spikes=module.guard.skipped_spikes,
        final=meter.last,
        stopping=None if stopping is None else stopping.report(),
        assignment_churn=_churn(module, run),
    )


def _job(run: PhaseRun) -> PhaseJob:
    """The phase as plain data."""
    stage, environment = run.stage, run.stage.environment
    return PhaseJob(
        spec=stage.spec,
        phase=run.phase,
        number=run.number,
        first_step=run.first_step,
        order_step=run.order_step,
        seed=run.seed,
        work=stage.work,
        resume=run.resume,
        rollbacks=run.rollbacks,
        trainer=environment.trainer,
        checkpoint=environment.checkpoint,
        frozen=environment.frozen,
        run_id=environment.run_id,
        outlook=environment.outlook,
    )


def _restore_or_seed(module: StageModule, run: PhaseRun) -> None:
    """Load the phase's checkpoint, or seed its random numbers."""
    spec = run.stage.spec
    if run.resume is not None:
        run.stage.environment.console.print(f"{spec.name}: continuing from {run.resume.name}")
        # Lightning loads it again in fit, with optimizer and loop. Centroids are needed earlier, to make the data.
        with Resumption(run.resume).blamed():
            module.load_weights(SafeCheckpointIO().load_parts(run.resume)["state_dict"])
    else:
        # Of noise, jitter and dropout. Every phase seeds anew, so that it does not depend on the draws before it.
        torch.manual_seed(run.seed)
        module.assignments_before = _sample_assignments(module.model, spec, run.stage.corpora)


def _meter(models: StageModels, run: PhaseRun) -> Meter:
    spec, teacher = run.stage.spec, models.teacher
    flops = loop_flops(spec, models.model.architecture, teacher.architecture if teacher else None)
    every_steps = run.stage.environment.trainer.log_every_n_steps
    return Meter(spec.optim.batch_tokens, flops / spec.steps, every_steps, run.rollbacks.count)


def _watch(model: LanguageModel, run: PhaseRun) -> ForgettingWatch | None:
    """What warns of forgetting in the phase; None where there is nothing to lose, or the stage affords no look."""
    stage, spec, before = run.stage, run.stage.spec, run.stage.before
    own = tuple(name for name in stage.own if name in stage.data.heldout)
    names = [*stage.known, *own]
    # Without its own text there is nothing to compare predictions on.
    if before is None or not own:
        return None
    # What a mixture reads old text with is frozen. A new generation begins as a copy that doubles another's weight, so
    # that its going its own way would look like a loss.
    if model.architecture.mixture is not None and spec.grow is not None:
        return None
    looks = stage_looks(stage.environment.watch, spec, model.architecture, before, len(names))
    if looks is None:
        return None
    context, vocabulary_of = spec.model.context, model.architecture.vocabulary_of
    parts = {name: excerpts(stage.data.heldout_by(name, vocabulary_of(name)), context, looks.tokens) for name in names}
    watched = Watched(
        stage=spec.name,
        own=own,
        texts={name: evaluation_windows(part, context, part.num_tokens) for name, part in parts.items()},
        steps=spec.steps,
        after=looks.steps(spec.steps),
        # No more than a step's, whose activations need more memory than those of a look.
        batch_tokens=spec.optim.batch_tokens // (spec.accumulate * spec.processes),
    )
    # Of other excerpts where the setting has changed meanwhile.
    return ForgettingWatch(watched, run.first_step, stage.work / f"watch-{looks.tokens}")


def _churn(module: StageModule, run: PhaseRun) -> float | None:
    """Share of a sample's assignments that the phase changed; None without a sample."""
    if module.assignments_before is None:
        return None
    spec = run.stage.spec
    after = _sample_assignments(module.model, spec, run.stage.corpora)
    # Those of before may have come from a step checkpoint.
    if after is None or after.shape != module.assignments_before.shape:
        raise CorruptError(f"{run.stage.work}: its step checkpoints are not of this stage; remove it to begin again.")
    return churn(module.assignments_before.flatten().numpy(), after.flatten().numpy())


def _sample_assignments(model: LanguageModel, spec: StageSpec, corpora: Mapping[str, TokenizedCorpus]) -> Tensor | None:
    """First expert of each real token of a sample, by mixture layer; None unless fixed centroids read hidden states."""
    # Only there do weights that train move the assignments, although the centroids stay.
    if not spec.routing.clusters_hidden:
        return None
    sample = new_text_sample(model, spec, corpora, 4 * spec.model.context)
    model.eval()
    with torch.no_grad():
        output = model(TokenBatch.of(sample))
    # In a dense layer nothing is chosen.
    chosen = [r.expert_ids_TK for r in output.routings if r.expert_ids_TK.shape[1]]
    return torch.stack([expert_ids_TK[:, 0][sample["mask"].flatten()] for expert_ids_TK in chosen]).cpu()
