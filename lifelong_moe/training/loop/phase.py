"""One phase of a stage: its mix of text, its steps, and what is measured of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lifelong_moe.clustering.kmeans import churn
from lifelong_moe.data.tokens.shards import TokenizedCorpus
from lifelong_moe.errors import ResourceError, memory_is_full
from lifelong_moe.model.tokens import TokenBatch
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.flops import loop_flops
from lifelong_moe.plan.spec import StageSpec
from lifelong_moe.retention.teacher_cache import TeacherCache
from lifelong_moe.training.callbacks.checkpoint import SafeCheckpointIO
from lifelong_moe.training.callbacks.progress import Meter
from lifelong_moe.training.callbacks.stopping import early_stopping
from lifelong_moe.training.loop.context import PhaseRun, StageModels
from lifelong_moe.training.loop.data import StageData, phase_dataset, text_sample
from lifelong_moe.training.loop.execution import documents_apart, executed, expert_dropout
from lifelong_moe.training.loop.fit import PhaseFit
from lifelong_moe.training.loop.measure import PhaseMeasures
from lifelong_moe.training.loop.module import StageModule
from lifelong_moe.training.loop.optimizer import phase_parameters, training_only


def train_phase(module: StageModule, models: StageModels, run: PhaseRun) -> PhaseMeasures:
    """Train one phase with a fresh Trainer and optimizer.

    Args:
        module: Of the model; what is measured of its steps is read from it.
        models: Of the stage.
        run: Which phase, from where on.

    Returns:
        What was measured.

    Raises:
        NonfiniteStepsError: If the stage has to roll back, or to give up.
        ResourceError: If the device's memory does not suffice.
    """
    model, spec, config = models.model, run.stage.spec, run.stage.environment.trainer
    corpus = run.stage.corpora[spec.data]
    _begin(module, run)
    if config.cache_teacher and models.teacher is not None:
        module.teacher_cache = TeacherCache(run.stage.work / f"teacher-{run.number}", spec.model.context)
    data = StageData(phase_dataset(models, spec, run.phase, run.stage.corpora, run.seed), run)
    meter, stopping = _meter(models, run), early_stopping(spec, corpus, run.stage.work)
    model.train()
    with _as_the_stage_trains(models, run), _memory_for(spec):
        PhaseFit(run, module, data, meter, stopping).fit()
    model.cpu()
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


def _begin(module: StageModule, run: PhaseRun) -> None:
    """Go on from the phase's checkpoint, or draw its random numbers anew."""
    spec = run.stage.spec
    if run.resume is not None:
        run.stage.environment.console.print(f"{spec.name}: continuing from {run.resume.name}")
        # Groups of the training text depend on centroids, which the checkpoint holds, whichever phase fitted them.
        state = SafeCheckpointIO().load_checkpoint(run.resume)["state_dict"]
        module.load_state_dict(state, strict=False)
    else:
        torch.manual_seed(run.seed)  # of noise, jitter and dropout; later on it is part of the checkpoint
        module.assignments_before = _sample_assignments(module.model, spec, run.stage.corpora[spec.data])


def _meter(models: StageModels, run: PhaseRun) -> Meter:
    spec, teacher = run.stage.spec, models.teacher
    flops = loop_flops(spec, models.model.architecture, teacher.architecture if teacher else None)
    every_steps = run.stage.environment.trainer.log_every_n_steps
    return Meter(spec.optim.batch_tokens, flops / spec.steps, every_steps, run.rollbacks.count)


@contextmanager
def _as_the_stage_trains(models: StageModels, run: PhaseRun) -> Iterator[None]:
    """Within this context models compute and train as the phase wants it, and SIGTERM waits for the end of a step."""
    spec, environment = run.stage.spec, run.stage.environment
    both = [model for model in (models.model, models.teacher) if model is not None]
    with (
        documents_apart(both if spec.finetune else []),
        training_only(models.model, phase_parameters(models.model, run.phase).values()),
        expert_dropout(models.model, spec.finetune.expert_dropout if spec.finetune else 0.0),
        executed(both, environment.trainer),
        environment.interrupt.until_step_boundary(),
    ):
        yield


@contextmanager
def _memory_for(spec: StageSpec) -> Iterator[None]:
    """Answer a full memory with what to set.

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


def _churn(module: StageModule, run: PhaseRun) -> float | None:
    """Share of a sample's assignments that the phase changed; None where none was compared."""
    if module.assignments_before is None:
        return None
    spec = run.stage.spec
    after = _sample_assignments(module.model, spec, run.stage.corpora[spec.data])
    assert after is not None
    return churn(module.assignments_before.flatten().numpy(), after.flatten().numpy())


def _sample_assignments(model: LanguageModel, spec: StageSpec, corpus: TokenizedCorpus) -> Tensor | None:
    """First expert of each sampled real token at each layer, where fixed centroids look at moving hidden states."""
    if not spec.routing.clusters_hidden:
        return None
    sample = text_sample(model, spec, corpus, 4 * spec.model.context)
    model.eval()
    with torch.no_grad():
        output = model(TokenBatch(sample["token_ids"], sample["document_ids"], mask_BS=sample["mask"]))
    return torch.stack([r.expert_ids_TK[:, 0][sample["mask"].flatten()] for r in output.routings])
