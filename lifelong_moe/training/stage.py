"""One stage from beginning to end.

=========  ==============================================================================
restore    the parent's model, or a new one (``continuing.py``, ``restore.py``)
freeze     what the stage must not change (``preparation.py``, ``loop/optimizer.py``)
grow       freeze old experts and add the new generation's (``preparation.py``)
fit        centroids of the new text, where text selects experts (``growth/clusters.py``)
assign     each token of the text to a generation (``loop/generations.py``)
train      phase by phase (``loop/phase.py``), in the order of samples of ``loop/data.py``
average    with the weights of the beginning, if that is asked for (``retention/average.py``)
commit     what changed, and where the rest is stored (``commit.py``)
=========  ==============================================================================
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import torch

from lifelong_moe.config.growth import FrozenWeights
from lifelong_moe.data.tokens.prepare import PreparedData
from lifelong_moe.data.tokens.shards import ShardDocuments
from lifelong_moe.growth.clusters import fit_clusters
from lifelong_moe.model.int8 import hold_frozen, make_whole, round_frozen, unround_frozen
from lifelong_moe.model.transformer import LanguageModel
from lifelong_moe.plan.phase import Trains
from lifelong_moe.plan.planned import PlannedStage
from lifelong_moe.retention.average import average_with
from lifelong_moe.storage.locks import locked
from lifelong_moe.store.stages import CommittedStage
from lifelong_moe.training.callbacks.checkpoint import newest_checkpoint, set_earlier_aside
from lifelong_moe.training.commit import commit_stage
from lifelong_moe.training.loop.context import PhaseRun, StageEnvironment, StageModels, StageRun
from lifelong_moe.training.loop.data import text_sample
from lifelong_moe.training.loop.device import rounds_products
from lifelong_moe.training.loop.execution import give_back_memory
from lifelong_moe.training.loop.measure import PhaseMeasures, StageMetrics, stage_metrics
from lifelong_moe.training.loop.module import StageModule
from lifelong_moe.training.loop.phase import train_phase
from lifelong_moe.training.loop.rollback import NonfiniteStepsError, Rollbacks, read_rollbacks, roll_back
from lifelong_moe.training.preparation import prepare_models

REVIEW_SEED = 500
"""Added to a stage's seed for its review, which reads the same text in another order."""


def train_stage(
    planned: PlannedStage, parent: CommittedStage | None, data: PreparedData, environment: StageEnvironment
) -> CommittedStage:
    """Train one stage and commit it, from its newest step checkpoint if there is one.

    Args:
        planned: What to train.
        parent: The committed stage that it continues.
        data: Tokenized text and its tokenizer.
        environment: Where and how to run.

    Raises:
        TryAgainError: If another process trains this stage, or after SIGTERM; a checkpoint is committed by then.
        KeyboardInterrupt: After Ctrl-C, likewise.
        DivergedError: If loss or gradient stays non-finite after the allowed rollbacks.
        ResourceError: If the disk or the device's memory is full.
    """
    run = StageRun(planned, parent, data, environment)
    with locked(run.work / ".lock", f"stage {run.spec.name}"):
        # Looked up under the lock: another process may have committed the stage while this one waited for it.
        if (committed := environment.store.find(planned.key)) is not None:
            return committed
        set_earlier_aside(run.work)
        model, metrics = _train_with_rollbacks(run)
        stage = commit_stage(run, model, metrics)
        del model
        give_back_memory()
        # After the commit, not before: a process killed in between leaves work that `abandoned.py` removes.
        shutil.rmtree(run.work, ignore_errors=True)
    return stage


def _train_with_rollbacks(run: StageRun) -> tuple[LanguageModel, StageMetrics]:
    """Train until all steps are finite or rollbacks are used up."""
    while True:
        try:
            return _restore_and_train(run)
        except NonfiniteStepsError as error:
            # Everything is read from the disk again, as after a kill: the model in memory holds the bad steps.
            roll_back(run.work, error, run.environment.checkpoint.every_steps)


def _restore_and_train(run: StageRun) -> tuple[LanguageModel, StageMetrics]:
    """Prepare the models, train the phases that are left, and measure the stage."""
    models, rollbacks = prepare_models(run), read_rollbacks(run.work)
    kind = FrozenWeights.full if run.spec.grow is None else run.spec.grow.frozen_weights
    rounds = kind == FrozenWeights.full and run.parent is not None and rounds_products(run.environment.trainer)
    if rounds:
        round_frozen(models.model, models.teacher)
    elif kind != FrozenWeights.full:
        hold_frozen(models.model, kind, models.teacher)
    measured = [_train_or_load(phase, models) for phase in _phase_runs(run, rollbacks)]
    # After the last step and not before a checkpoint of it, so that an interrupted stage averages once.
    average_with(models.model, models.start, run.spec.average)
    metrics = stage_metrics(models.model, run, measured, rollbacks.count)
    if (rounds or kind != FrozenWeights.full) and run.parent is not None:
        # The stored bits, not those made of fewer: a commit proves that frozen tensors are unchanged.
        put_back = unround_frozen if rounds else make_whole
        put_back(models.model, run.environment.store.tensors(run.parent))
    return models.model, metrics


def _phase_runs(run: StageRun, rollbacks: Rollbacks) -> Iterator[PhaseRun]:
    """The stage's phases in order, each with its place in the stage's steps and in the order of samples."""
    # Read once: while a phase trains it writes newer checkpoints, which say nothing of the phases after it.
    newest = newest_checkpoint(run.work)
    current, checkpoint = newest if newest is not None else (0, None)
    first_step = order_step = 0
    for number, phase in enumerate(run.spec.phases()):
        order_step = order_step if phase.follows else 0
        yield PhaseRun(
            stage=run,
            number=number,
            phase=phase,
            first_step=first_step,
            order_step=order_step,
            seed=run.seed if phase.trains == Trains.stage else run.seed + REVIEW_SEED,
            resume=checkpoint if number == current else None,
            rollbacks=rollbacks,
            is_done=number < current,
        )
        first_step += phase.steps
        # Skipped batches belong to the order, so the phase that follows begins after them.
        order_step += phase.steps + rollbacks.shift(number, phase.steps)


def _train_or_load(run: PhaseRun, models: StageModels) -> PhaseMeasures:
    """Train a phase, unless a checkpoint of a later one holds its result; what was measured of it."""
    if not run.is_done:
        if run.phase.fits_clusters and run.resume is None:
            _fit_clusters(models.model, run.stage)  # a checkpoint of the phase already holds the centroids
        module = StageModule(models.model, run.stage.spec, run.phase, models.teacher, models.anchor)
        train_phase(module, models, run).save(run.stage.work, run.number)
        module.release()
    # From the file also when it was just written, so that an interrupted stage reports the same numbers.
    return PhaseMeasures.load(run.stage.work, run.number)


def _fit_clusters(model: LanguageModel, run: StageRun) -> None:
    """Fit the stage's centroids to the text that it learns, the same number of tokens from each distribution."""
    spec, corpora = run.spec, [run.corpora[name] for name in run.spec.learns]
    share = spec.routing.sample_tokens // len(corpora)
    # Only where it is read: to say whose text each chunk is asks all generations.
    is_read = model.architecture.routing.clusters_hidden
    samples = [text_sample(model, spec, one, share) for one in corpora] if is_read else []
    sample = {name: torch.cat([one[name] for one in samples]) for name in (samples[0] if samples else ())}
    documents = ShardDocuments([corpus.train for corpus in corpora])
    # Centroids are fitted on a prefix of the stream, so every distribution's share comes before any of the rest.
    heads, rests = [c.train.tokens[:share] for c in corpora], [c.train.tokens[share:] for c in corpora]
    fit_clusters(model, documents, [*heads, *rests], sample, run.seed)
